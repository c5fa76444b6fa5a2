"""Prefix tuning: trained keys and values in front of every attention, computed by a small network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from peftsearch.methods.base import AttachContext, Hyperparameter, Method, learning_rate
from peftsearch.spec import Range

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


class PrefixTuning(Method):
    """``tokens`` keys and values in front of every attention, by default computed by an MLP that is not exported."""

    name = "prefix"
    title = "prefix tuning"
    source = "Li and Liang 2021, arXiv:2101.00190"
    hyperparameters: ClassVar[Mapping[str, Hyperparameter]] = {
        "tokens": Hyperparameter("int", Range(low=4, high=64, log=True), "Keys and values per attention", 1, 4096),
        "projection": Hyperparameter(
            "bool",
            True,
            "Train a small matrix and an MLP (which is not exported), rather than keys and values themselves",
        ),
        "hidden": Hyperparameter("int", 512, "Hidden size of the MLP", 1, 65536),
        "learning_rate": learning_rate(1e-5, 1e-2),
    }
    # Li and Liang's summarisation settings took 200 tokens and 800 hidden units; their table-to-text ones 5 and 512.
    priors = ({"tokens": 10, "hidden": 512, "projection": True, "learning_rate": 5e-4},)

    def attach(self, model: PreTrainedModel, hyperparameters: Mapping[str, Any], context: AttachContext) -> nn.Module:
        """See `Method.attach`; raises ValueError for an architecture without transformers' attention interface."""
        return attach_deep_prompt(
            model,
            context,
            tokens=hyperparameters["tokens"],
            hidden=hyperparameters["hidden"] if hyperparameters["projection"] else None,
        )


def attach_deep_prompt(model: PreTrainedModel, context: AttachContext, *, tokens: int, hidden: int | None) -> nn.Module:
    """Give every attention of a model its prompt.

    Args:
        model: A frozen model.
        context: See `Method.attach`.
        tokens: Keys and values per attention.
        hidden: Hidden size of the MLP that computes them, or None to train them directly.
    """
    from peft import get_peft_model

    from peftsearch.methods.deep_prompt import register
    from peftsearch.methods.deep_prompt.config import DeepPromptConfig

    register()
    config = DeepPromptConfig(
        task_type=context.peft_task_type,
        num_virtual_tokens=tokens,
        projection=hidden is not None,
        projection_size=hidden or 1,
        modules_to_save=list(context.modules_to_save) or None,
    )
    return get_peft_model(model, config)  # type: ignore[no-any-return]
