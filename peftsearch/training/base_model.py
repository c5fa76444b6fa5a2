"""The frozen base: loaded once, shared by every trial of a worker, never written to."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from peftsearch.domains.models import model_config
from peftsearch.spec import StudyError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peftsearch.domains import Head, PreparedDomain, Task


class FrozenBase:
    """A pretrained model in memory, from which trials take models that share its tensors.

    Args:
        location: Folder or Hub id.
        revision: Hub revision.
        device: Where the weights live.
    """

    def __init__(self, location: str, revision: str | None = None, device: torch.device | None = None) -> None:
        self.location = location
        self.revision = revision
        self.device = device or torch.device("cpu")
        self._templates: dict[tuple[str, tuple[str, ...]], Template] = {}
        self._tensors: dict[str, nn.Parameter] = {}

    def trial_model(self, domain: PreparedDomain, *, seed: int, copy_weights: bool) -> PreTrainedModel:
        """A model for one trial: the base's own tensors (frozen), in modules of its own, with a freshly drawn head.

        The modules are the trial's: PEFT may replace them at will and nothing needs to be undone afterwards, which is
        what makes a warm worker exact. The head is drawn from torch's global generator: seed it before.

        Args:
            domain: Its task and labels decide the head.
            seed: Seeds torch's global generator, from which the head (and then the method's own weights) are drawn.
            copy_weights: Give the trial a copy of the weights, for methods that train them.
        """
        template = self.template(domain)
        # Only now: loading a template, which the first trial of a worker does, draws random numbers itself.
        torch.manual_seed(seed)
        model = copy.deepcopy(template.model) if copy_weights else share_tensors(template.model)
        _draw_anew(model, template.fresh)
        return model

    def fingerprint(self) -> dict[str, int]:
        """A hash per pretrained tensor; equal before and after a study, or something wrote to the base."""
        return {name: _hash(tensor) for name, tensor in self._tensors.items()}

    def template(self, domain: PreparedDomain) -> Template:
        """The model with a domain's head, around the base's tensors; loaded at the first call for such a head."""
        task, labels, head = domain.task, domain.labels, domain.head
        key = (head.auto_model, labels)
        if key not in self._templates:
            model, fresh = load_model(self.location, self.revision, head, task.config_kwargs(labels))
            for name, parameter in list(model.named_parameters()):
                known = self._tensors.get(name)
                if name in fresh:
                    continue
                if known is not None and known.shape == parameter.shape and known.dtype == parameter.dtype:
                    _replace(model, name, known)
                else:
                    self._tensors[name] = parameter
            # Decoders classify at the last token before the padding: the model must know what batches are padded with.
            model.config.pad_token_id = domain.pad_token_id
            model.requires_grad_(False)
            model.to(self.device)
            self._templates[key] = Template(model, fresh, fresh_modules(model, fresh))
        return self._templates[key]


@dataclass(frozen=True)
class Template:
    """What trial models are made from.

    Attributes:
        model: The model with a task head; its weights are the base's.
        fresh: Names of the parameters that the checkpoint does not hold: the head's, and sometimes a pooler's.
        modules_to_save: Paths of the modules that hold them, which every method trains.
    """

    model: PreTrainedModel
    fresh: frozenset[str]
    modules_to_save: tuple[str, ...]


def load_model(
    location: str, revision: str | None, head: Head, config_kwargs: dict[str, Any], **kwargs: Any
) -> tuple[PreTrainedModel, frozenset[str]]:
    """The model with a task head, and the names of the parameters that the checkpoint does not hold.

    Args:
        location: Folder or Hub id.
        revision: Hub revision.
        head: Class of the model.
        config_kwargs: What the configuration has to know to build the head.
        kwargs: Further arguments of ``from_pretrained``.
    """
    import transformers

    auto = getattr(transformers, head.auto_model)
    with quiet_loading():
        model, info = auto.from_pretrained(
            location,
            revision=revision,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            use_safetensors=True if Path(location).is_dir() else None,
            **config_kwargs,
            **kwargs,
        )
    mismatched = {entry[0] if isinstance(entry, tuple) else entry for entry in info["mismatched_keys"]}
    model.eval()
    return model, frozenset(set(info["missing_keys"]) | mismatched)


def fresh_modules(model: nn.Module, fresh: Collection[str]) -> tuple[str, ...]:
    """The outermost modules all of whose parameters are fresh, in the order of the model.

    A module that also holds a pretrained parameter (a language-model head whose weight is the embedding's) is not
    among them: saving it in full would save that too.
    """
    found: list[str] = []
    for path, module in model.named_modules():
        if not path or any(path.startswith(f"{outer}.") for outer in found):
            continue
        own = [_join(path, name) for name, _ in module.named_parameters(remove_duplicate=False)]
        if own and all(name in fresh for name in own):
            found.append(path)
    return tuple(found)


def meta_model(
    location: str, revision: str | None, task: Task, head: Head, labels: Sequence[str]
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """The model without weights, on the meta device, for counting parameters; and its modules to save.

    Of a model in a folder the names in its files decide what is fresh. A Hub model is not downloaded for that: what
    the bare model of its architecture does not have is taken for the head.

    Raises:
        StudyError: There is no such model, or it cannot do the task.
    """
    import transformers

    config_kwargs = task.config_kwargs(labels)
    config = model_config(location, revision, **config_kwargs)
    try:
        if Path(location).is_dir():
            model, fresh = load_model(location, revision, head, config_kwargs, device_map="meta")
        else:
            with torch.device("meta"), quiet_loading():
                model = getattr(transformers, head.auto_model).from_config(config)
                bare = transformers.AutoModel.from_config(config)
            prefix = f"{model.base_model_prefix}."
            known = {name.removeprefix(prefix) for name, _ in bare.named_parameters()}
            fresh = frozenset(
                name
                for name, _ in model.named_parameters()
                if name.removeprefix(prefix) not in known and not name.startswith("lm_head.")
            )
    except ValueError as error:
        raise StudyError(
            f"the model {location!r} ({config.model_type}) cannot do {task.name}: {str(error).splitlines()[0]}"
        ) from None
    return model.requires_grad_(False), fresh_modules(model, fresh)


def share_tensors(model: nn.Module) -> Any:
    """A deep copy of the module tree around the very same parameter and buffer tensors."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        memo[id(tensor)] = tensor
    return copy.deepcopy(model, memo)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by name; tied ones once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def count_trainable(model: nn.Module) -> int:
    """Number of trainable parameters, the task head included."""
    return sum(parameter.numel() for parameter in trainable(model).values())


def count_exported(model: nn.Module) -> int:
    """Number of parameters in the exported adapter, the task head included."""
    from peft import PeftModel, get_peft_model_state_dict

    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        # PEFT computes the exported soft tokens, which the meta device cannot; what computes them is not exported.
        config = model.active_peft_config
        soft_tokens = config.num_virtual_tokens * config.num_transformer_submodules * config.token_dim
        return count_trainable(model) - count_trainable(model.prompt_encoder) + soft_tokens
    if isinstance(model, PeftModel):
        return sum(tensor.numel() for tensor in get_peft_model_state_dict(model).values())
    return sum(parameter.numel() for parameter in model.parameters())


def _draw_anew(model: PreTrainedModel, names: frozenset[str]) -> None:
    """Give the trial its own, freshly initialised parameters for everything that the checkpoint does not hold."""
    for path, module in model.named_modules():
        own = [name for name, _ in module.named_parameters(recurse=False) if _join(path, name) in names]
        if not own:
            continue
        for name in own:
            old = getattr(module, name)
            setattr(module, name, nn.Parameter(torch.zeros_like(old), requires_grad=False))
        # transformers' own initialisation of the architecture, as from_pretrained applies it to missing weights.
        model._init_weights(module)


def _replace(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    path, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(path), attribute, parameter)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _hash(tensor: torch.Tensor) -> int:
    """XOR of the tensor's 8-byte words, computed where it lives; the bytes of an odd tail are hashed by themselves."""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    whole = data.numel() // 8 * 8
    words = int(torch.hash_tensor(data[:whole].view(torch.int64)).item()) if whole else 0
    tail = int(torch.hash_tensor(data[whole:]).item()) if whole < data.numel() else 0
    return words ^ (tail << 1)


class quiet_loading:
    """Keeps transformers from reporting missing heads and drawing bars: a missing head is what we expect."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self._verbosity = logging.get_verbosity()
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        from transformers.utils import logging

        logging.set_verbosity(self._verbosity)
