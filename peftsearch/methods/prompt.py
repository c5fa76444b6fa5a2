"""Prompt tuning: trained embeddings in front of the text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from peftsearch.methods.base import AttachContext, Hyperparameter, Method, learning_rate
from peftsearch.spec import Range

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

_INIT = {"vocabulary": "SAMPLE_VOCAB", "random": "RANDOM", "text": "TEXT"}


class PromptTuning(Method):
    """``tokens`` soft tokens, each a vector of the embedding's width."""

    name = "prompt"
    title = "prompt tuning"
    source = "Lester et al. 2021, arXiv:2104.08691"
    hyperparameters: ClassVar[Mapping[str, Hyperparameter]] = {
        "tokens": Hyperparameter("int", Range(low=4, high=64, log=True), "Number of soft tokens", 1, 4096),
        "init": Hyperparameter(
            "str",
            "text",
            "Where the soft tokens start: text (embeddings of init_text), vocabulary (of random tokens) or random",
            choices=tuple(_INIT),
            shapes_parameters=False,
        ),
        "init_text": Hyperparameter(
            "str",
            "",
            "Text for init: text, repeated or cut to the number of tokens; the task and its labels where empty",
            shapes_parameters=False,
        ),
        "learning_rate": learning_rate(1e-3, 1e-1),
    }
    priors = ({"tokens": 20, "learning_rate": 3e-2},)

    def attach(self, model: PreTrainedModel, hyperparameters: Mapping[str, Any], context: AttachContext) -> nn.Module:
        """See `Method.attach`; raises ValueError where tokens and text exceed the model's positions."""
        from peft import PromptTuningConfig, get_peft_model

        positions = getattr(model.config, "max_position_embeddings", None)
        if positions is not None and hyperparameters["tokens"] >= positions:
            raise ValueError(
                f"{hyperparameters['tokens']} soft tokens leave no room for text: the model has {positions} positions"
            )
        init = hyperparameters["init"]
        config = PromptTuningConfig(
            task_type=context.peft_task_type,
            num_virtual_tokens=hyperparameters["tokens"],
            prompt_tuning_init=_INIT[init],
            prompt_tuning_init_text=hyperparameters["init_text"] or _default_text(context) if init == "text" else None,
            tokenizer_name_or_path=context.model_location if init == "text" else None,
        )
        return get_peft_model(model, config)  # type: ignore[no-any-return]


def _default_text(context: AttachContext) -> str:
    if context.label_names:
        return f"Classify the text as one of: {', '.join(context.label_names)}."
    return "Answer for the following text:"
