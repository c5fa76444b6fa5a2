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
    """``tokens`` soft tokens, each a vector of the embedding's width.

    Heads read what they were trained to read: the soft tokens' outputs are cut off before them. With PEFT's prompt
    tuning an encoder's pooler, or a head on the first token, would read the first soft token instead of the text's
    ``[CLS]`` (measured with all-MiniLM-L6-v2: accuracy 0.803 instead of 0.853); so its class only serves bare models,
    and what is exported needs this package to load.
    """

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

    def packs(self, hyperparameters: Mapping[str, Any], *, bare: bool = False) -> bool:
        """Soft tokens, but for PEFT's own, on a bare model."""
        return not bare

    def attach(self, model: PreTrainedModel, hyperparameters: Mapping[str, Any], context: AttachContext) -> nn.Module:
        """See `Method.attach`; raises ValueError where the soft tokens leave no positions for text."""
        from peft import PromptTuningConfig

        tokens, init = hyperparameters["tokens"], hyperparameters["init"]
        text = hyperparameters["init_text"] or _default_text(context)
        check_positions(model, tokens)
        if not peft_serves(model, context):
            return _attach_own(model, context, tokens, init, text)
        config = PromptTuningConfig(
            task_type=context.peft_task_type,
            num_virtual_tokens=tokens,
            prompt_tuning_init=_INIT[init],
            prompt_tuning_init_text=text if init == "text" else None,
            tokenizer_name_or_path=context.model_location if init == "text" else None,
        )
        return attach_pefts(model, config)


def check_positions(model: PreTrainedModel, tokens: int) -> None:
    """Refuse more soft tokens than the model has positions.

    Raises:
        ValueError: They leave no room for text.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and tokens >= positions:
        raise ValueError(f"{tokens} soft tokens leave no room for text: the model has {positions} positions")


def peft_serves(model: PreTrainedModel, context: AttachContext) -> bool:
    """Whether PEFT's own soft prompts do this task right on this model (see `peftsearch.methods.soft_prompt`).

    Only on a bare model, where nothing reads a certain position.
    """
    return context.peft_task_type == "FEATURE_EXTRACTION"


def attach_pefts(model: PreTrainedModel, config: Any) -> nn.Module:
    """Attach PEFT's own soft tokens; a text that they leave no room for is then refused with a sentence."""
    from peft import get_peft_model

    from peftsearch.domains.models import positions_of
    from peftsearch.methods.soft_prompt.layer import check_length

    attached: nn.Module = get_peft_model(model, config)
    positions = positions_of(model)

    def check(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is not None:
            check_length(config.num_virtual_tokens, ids.shape[1], positions)

    attached.register_forward_pre_hook(check, with_kwargs=True)
    return attached


def _attach_own(model: PreTrainedModel, context: AttachContext, tokens: int, init: str, text: str) -> nn.Module:
    import torch
    from peft import get_peft_model

    from peftsearch.methods.soft_prompt import register
    from peftsearch.methods.soft_prompt.config import SoftPromptConfig
    from peftsearch.methods.soft_prompt.layer import SoftPromptLayer

    register()
    config = SoftPromptConfig(
        task_type=context.peft_task_type,
        num_virtual_tokens=tokens,
        modules_to_save=list(context.modules_to_save) or None,
    )
    attached = get_peft_model(model, config)
    words = model.get_input_embeddings().weight
    assert isinstance(words, torch.Tensor)
    if init == "random" or words.is_meta:
        return attached  # type: ignore[no-any-return]
    ids = _token_ids(context.model_location, context.revision, text, tokens) if init == "text" else None
    with torch.no_grad():
        for layer in attached.modules():
            if isinstance(layer, SoftPromptLayer):
                chosen = torch.tensor(ids) if ids is not None else torch.randint(len(words), (tokens,))
                layer.soft_prompt_embedding["default"].copy_(words[chosen.to(words.device)])
    return attached  # type: ignore[no-any-return]


def _token_ids(location: str, revision: str | None, text: str, tokens: int) -> list[int]:
    """The text's tokens, repeated or cut to a number."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(location, revision=revision, trust_remote_code=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(f"init_text {text!r} has no tokens")
    return [ids[index % len(ids)] for index in range(tokens)]


def _default_text(context: AttachContext) -> str:
    # A regression's one output is no class.
    if len(context.label_names) > 1:
        return f"Classify the text as one of: {', '.join(context.label_names)}."
    return "Answer for the following text:"
