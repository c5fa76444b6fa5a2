"""peftsearch: hyperparameter studies for parameter-efficient fine-tuning.

Importing this package also makes its own PEFT methods loadable by ``peft.PeftModel.from_pretrained``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import wrapt

from peftsearch.deferred_compile import import_bitsandbytes
from peftsearch.spec import StudyError, StudySpec, TrialRecord, TrialState

if TYPE_CHECKING:
    from peftsearch.study import Study

__version__ = "0.1.0"

__all__ = ["Study", "StudyError", "StudySpec", "TrialRecord", "TrialState", "__version__"]


def _register_methods(_: object) -> None:
    from peftsearch.methods import bias, bottleneck, deep_prompt, soft_prompt

    for method in (bias, bottleneck, deep_prompt, soft_prompt):
        method.register()


# PEFT (and torch with it) takes seconds to import, and the processes that only steer a study never need it. So our
# methods register themselves when somebody imports peft, before or after this package.
wrapt.register_post_import_hook(_register_methods, "peft")

# Before another part of PEFT imports it.
wrapt.register_post_import_hook(import_bitsandbytes, "peft.import_utils")


def __getattr__(name: str) -> Any:
    if name == "Study":
        from peftsearch.study import Study

        return Study
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
