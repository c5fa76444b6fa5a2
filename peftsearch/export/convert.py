"""Other forms of an exported adapter: merged into its base, or as a plain LoRA."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from peftsearch.methods import METHODS
from peftsearch.spec import StudyError, TrialRecord, suggest

if TYPE_CHECKING:
    import torch
    from torch import nn

    from peftsearch.domains import PreparedDomain

Form = Literal["adapter", "merged", "lora"]
"""An adapter as it was trained; a complete model; a plain LoRA."""

_NOT_MERGED = {
    "adapter": "a bottleneck adapter is a layer of its own, which no weight of the base can hold",
    "hybrid": "its bottleneck adapter is a layer of its own, which no weight of the base can hold",
    "prompt": "its soft tokens stand in front of every text and are no part of any weight",
    "prefix": "its keys and values stand in front of every text and are no part of any weight",
    "p_tuning": "its soft tokens stand in front of every text and are no part of any weight",
    "p_tuning_v2": "its keys and values stand in front of every text and are no part of any weight",
    "bitfit": "its biases are kept beside the base's, which are never written to",
}
_NO_LORA = "it is no low-rank update of weights"


def check_form(form: str, record: TrialRecord) -> None:
    """See that a trial can be exported in that form.

    Raises:
        StudyError: It cannot, with the reason; or there is no such form.
    """
    if form not in get_args(Form):
        raise StudyError(f"unknown form {form!r}{suggest(form, get_args(Form))}")
    method, named = METHODS[record.method], f"trial {record.number} ({record.method})"
    quantised = method.quantization(record.hyperparameters)
    if form == "merged":
        why = _NOT_MERGED.get(record.method)
        if quantised is not None:
            why = f"its base is stored as {quantised}, and merging would round the update away"
        if why is not None:
            raise StudyError(f"{named} cannot be merged: {why}; export it as an adapter, without --merge")
    elif form == "lora":
        variant = record.hyperparameters.get("variant")
        why = None if record.method in ("lora", "qlora") else _NO_LORA
        if variant == "dora":
            # PEFT 0.21.2 says that it converts DoRA (`supports_lora_conversion`), and drops its magnitudes: the
            # converted adapter answers otherwise.
            why = "DoRA changes the length of weights too, which a low-rank update cannot hold"
        if why is not None:
            raise StudyError(f"{named} cannot become a plain LoRA: {why}; export it as it is, without --as-lora")


def convert(adapter: Path, folder: Path, form: Form, domain: PreparedDomain, *, trust_remote_code: bool) -> None:
    """Write another form of an exported adapter.

    Args:
        adapter: The exported folder. Its base is loaded anew: merging writes into weights.
        folder: Where the model is written to; made here.
        form: ``merged`` or ``lora``; see `check_form`.
        domain: What it does.
        trust_remote_code: Whether code that the base brings along may run.

    Raises:
        StudyError: It cannot be loaded.
        OSError: The folder cannot be written.
    """
    import torch

    from peftsearch.export.folder import ExportedFolder
    from peftsearch.training.base_model import quiet_loading

    exported = ExportedFolder.read(adapter)
    model: Any = exported.load(domain, torch.device("cpu"), trust_remote_code=trust_remote_code)
    folder.mkdir(parents=True)
    if form == "lora":
        _write_lora(model, folder)
        return
    with quiet_loading():
        _unwrap_trained(model.get_base_model())
        merged = model.merge_and_unload()
        for name, value in domain.task.config_kwargs(exported.labels).items():
            setattr(merged.config, name, value)
        merged.save_pretrained(str(folder))


def _unwrap_trained(model: nn.Module) -> None:
    """Put modules that were trained in full where PEFT keeps them beside the base's own.

    PEFT 0.21.2 does so too, and fails at modules without a weight of their own, such as a pooler, for tuners other than
    LoRA (`BaseTuner._replace_module`).
    """
    from peft.utils import ModulesToSaveWrapper

    for name, module in list(model.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.modules_to_save[module.active_adapters[0]])


def _write_lora(model: Any, folder: Path) -> None:
    """Write an adapter as a plain LoRA that any program knows, with the scale in its weights."""
    from peft import convert_to_lora, get_peft_model_state_dict
    from safetensors.torch import save_file

    from peftsearch.export.folder import ADAPTER_WEIGHTS

    known = model.peft_config["default"]
    with warnings.catch_warnings():
        # "There is typically no need for that": rank-stabilised scaling is the need.
        warnings.filterwarnings("ignore", message="Converting a PEFT adapter to LoRA")
        config, converted = convert_to_lora(model, rank=int(known.r))
    # Of heads with several layers PEFT 0.21.2 keeps one tensor, under a name that nobody reads (`classifier.dense` and
    # `classifier.out_proj` of a RoBERTa both become `classifier.weight`); and it forgets the task.
    whole: Mapping[str, torch.Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {name: value for name, value in converted.items() if ".lora_" in name}
    tensors |= {name: value for name, value in whole.items() if ".lora_" not in name}
    config.modules_to_save, config.task_type = known.modules_to_save, known.task_type
    config.revision, config.inference_mode = known.revision, True
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / ADAPTER_WEIGHTS)
    config.save_pretrained(str(folder))
