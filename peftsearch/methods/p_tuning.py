"""P-tuning: soft tokens in front of the text, computed by a small network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from peftsearch.methods.base import AttachContext, Hyperparameter, Method, learning_rate
from peftsearch.methods.prompt import attach_pefts, check_positions, peft_serves
from peftsearch.spec import Range

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


class PTuning(Method):
    """``tokens`` soft tokens, the output of an MLP or an LSTM; only that output is exported."""

    name = "p_tuning"
    title = "P-tuning"
    source = "Liu et al. 2021, arXiv:2103.10385"
    hyperparameters: ClassVar[Mapping[str, Hyperparameter]] = {
        "tokens": Hyperparameter("int", Range(low=4, high=64, log=True), "Number of soft tokens", 1, 4096),
        "encoder": Hyperparameter(
            "str", "mlp", "The network that computes the soft tokens (it is not exported)", choices=("mlp", "lstm")
        ),
        "hidden": Hyperparameter("int", 128, "Its hidden size", 1, 65536),
        "learning_rate": learning_rate(1e-4, 1e-2),
    }
    priors = ({"tokens": 20, "encoder": "mlp", "hidden": 128, "learning_rate": 1e-3},)

    def attach(self, model: PreTrainedModel, hyperparameters: Mapping[str, Any], context: AttachContext) -> nn.Module:
        """See `Method.attach`; raises ValueError where the soft tokens leave no positions for text."""
        from peft import PromptEncoderConfig, get_peft_model

        from peftsearch.methods.soft_prompt import register
        from peftsearch.methods.soft_prompt.config import SoftPromptConfig

        tokens, encoder, hidden = (hyperparameters[name] for name in ("tokens", "encoder", "hidden"))
        check_positions(model, tokens)
        if peft_serves(model, context):
            described = PromptEncoderConfig(
                task_type=context.peft_task_type,
                num_virtual_tokens=tokens,
                encoder_reparameterization_type=encoder.upper(),
                encoder_hidden_size=hidden,
            )
            return attach_pefts(model, described)
        register()
        config = SoftPromptConfig(
            task_type=context.peft_task_type,
            num_virtual_tokens=tokens,
            encoder=encoder,
            encoder_hidden_size=hidden,
            modules_to_save=list(context.modules_to_save) or None,
        )
        return get_peft_model(model, config)  # type: ignore[no-any-return]
