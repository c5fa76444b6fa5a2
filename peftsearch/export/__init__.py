"""Trials as folders that `transformers` and `peft` load: written, scored again in a fresh process, and only then shown.

`export_trials` makes the folders, `evaluate_adapter` scores one of them from disk, `Predictor` and `predict_file` use
it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peftsearch.export.evaluate import evaluate_adapter
    from peftsearch.export.predict import Predicted, Predictor, predict_file
    from peftsearch.export.trial_folders import StudyToExport
    from peftsearch.export.trials import ExportedAdapter, export_trials

__all__ = [
    "ExportedAdapter",
    "Predicted",
    "Predictor",
    "StudyToExport",
    "evaluate_adapter",
    "export_trials",
    "predict_file",
]


# The fresh process that verifies (python -m peftsearch.export.verify) imports this package before its own module runs.
def __getattr__(name: str) -> Any:
    if name == "evaluate_adapter":
        from peftsearch.export.evaluate import evaluate_adapter

        return evaluate_adapter
    if name in ("Predicted", "Predictor", "predict_file"):
        from peftsearch.export import predict

        return getattr(predict, name)
    if name in __all__:
        from peftsearch.export import trials

        return getattr(trials, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
