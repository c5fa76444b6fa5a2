"""LoRA and its variants: a low-rank update beside chosen linear layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from peftsearch.methods.base import AttachContext, Hyperparameter, Method, dropout, learning_rate
from peftsearch.spec import Range, first_line, suggest

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

ATTENTION = "attention"
ALL_LINEAR = "all-linear"


def lora_hyperparameters(targets: str) -> dict[str, Hyperparameter]:
    """What describes a LoRA, alone or as a part of another method.

    Args:
        targets: The layers adapted where the study file is silent.
    """
    return {
        "rank": Hyperparameter("int", Range(low=1, high=64, log=True), "Rank of the update", 1, 65536),
        "alpha": Hyperparameter(
            "float",
            32.0,
            "The update is scaled by alpha / rank (rslora: by alpha / sqrt(rank))",
            1e-6,
            1e6,
            shapes_parameters=False,
        ),
        "targets": Hyperparameter(
            "str",
            targets,
            "Adapted layers: attention (its query and value projections), all-linear, or names of modules separated "
            "by commas",
        ),
    }


VARIANT = Hyperparameter(
    "str",
    "lora",
    "lora; dora: magnitude and direction are trained apart (Liu et al. 2024, arXiv:2402.09353); rslora: scaled so that "
    "high ranks learn (Kalajdzievski 2023, arXiv:2312.03732)",
    choices=("lora", "dora", "rslora"),
)


class Lora(Method):
    """W + (alpha / rank) B A with A of shape (rank, in) and B of shape (out, rank); B starts at zero."""

    name = "lora"
    title = "LoRA"
    source = "Hu et al. 2021, arXiv:2106.09685"
    hyperparameters: ClassVar[Mapping[str, Hyperparameter]] = {
        **lora_hyperparameters(ATTENTION),
        "variant": VARIANT,
        "dropout": dropout(),
        "learning_rate": learning_rate(1e-4, 1e-2),
    }
    priors = ({"rank": 16, "alpha": 32.0, "learning_rate": 3e-4},)

    def packs(self, hyperparameters: Mapping[str, Any], *, bare: bool = False) -> bool:
        """All but DoRA, whose magnitudes scale the base's own output."""
        return bool(hyperparameters["variant"] != "dora")

    def attach(self, model: PreTrainedModel, hyperparameters: Mapping[str, Any], context: AttachContext) -> nn.Module:
        """See `Method.attach`; raises ValueError where the model has no such layers."""
        from peft import LoraConfig, get_peft_model

        targets = str(hyperparameters["targets"])
        config = LoraConfig(
            task_type=context.peft_task_type,
            r=hyperparameters["rank"],
            lora_alpha=hyperparameters["alpha"],
            lora_dropout=hyperparameters["dropout"],
            use_dora=hyperparameters["variant"] == "dora",
            use_rslora=hyperparameters["variant"] == "rslora",
            target_modules=target_modules(model, targets),
            modules_to_save=list(context.modules_to_save) or None,
        )
        try:
            return get_peft_model(model, config)  # type: ignore[no-any-return]
        except ValueError as error:
            if targets in (ATTENTION, ALL_LINEAR):
                raise
            # PEFT's advice is about its own options.
            reason = first_line(error).split(". ")[0].rstrip(".")
            raise ValueError(f"targets {targets!r} do not fit {type(model).__name__}: {reason}") from None


def target_modules(model: nn.Module, targets: str) -> str | list[str]:
    """PEFT's ``target_modules`` for the hyperparameter ``targets``.

    ``attention`` is the projections of query and value: by the names that PEFT has for the architecture, where it knows
    it, without those that are something else (Phi's ``fc1``); elsewhere as the model itself shows them.

    Raises:
        ValueError: The model shows no attention, or has no module of a given name.
    """
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    from peftsearch.methods.sublayers import find_sublayers, linear_layers, name_pattern

    if targets == ALL_LINEAR:
        return targets
    if targets != ATTENTION:
        names = [name.strip() for name in targets.split(",") if name.strip()]
        paths = [path for path, _ in model.named_modules()]
        for name in names:
            # PEFT takes what it finds, and says nothing of a name among others that it does not.
            if not any(path == name or path.endswith(f".{name}") for path in paths):
                linear = {
                    path.rpartition(".")[2]
                    for path, module in model.named_modules()
                    if "Linear" in type(module).__name__ or type(module).__name__ == "Conv1D"
                }
                hint = suggest(name, {*linear, ATTENTION, ALL_LINEAR})
                raise ValueError(f"{type(model).__name__} has no linear layer named {name!r}{hint}")
        return names
    known = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(getattr(model.config, "model_type", None))
    if isinstance(known, str):
        return known
    sublayers = find_sublayers(model)
    if known is not None:
        wanted = [path for path in sublayers.query_and_value if any(path.endswith(f".{name}") for name in known)]
        names = [name for name in known if any(path.endswith(f".{name}") for path in wanted)]
        others = set(linear_layers(model)) - set(wanted)
        if not wanted or not any(path.endswith(f".{name}") for name in names for path in others):
            return names or list(known)
        return name_pattern(sublayers, wanted)
    if not sublayers.query_and_value:
        raise ValueError(
            f"No attention was found in {type(model).__name__}: let targets be all-linear, or name the layers to adapt"
        )
    return name_pattern(sublayers, sublayers.query_and_value)
