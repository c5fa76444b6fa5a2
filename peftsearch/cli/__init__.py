"""The command line: a thin skin over the Python API."""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings


def main() -> None:
    """Entry point of ``peftsearch``: exit status 0 when what was asked for happened, 2 for a bad file or option."""
    quiet_libraries()
    # Two notices of the libraries that nobody at our command line can act on: an optional speed-up of bitsandbytes that
    # is not installed, and a renaming inside transformers.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
    for stream in (sys.stdout, sys.stderr):
        # A path may hold bytes that no encoding has a character for: they are shown as \xff.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    from peftsearch.cli.app import run_app

    sys.exit(run_app())


def quiet_libraries() -> None:
    """Set what libraries read when they are imported: no progress bars or notices of theirs between our own lines."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
