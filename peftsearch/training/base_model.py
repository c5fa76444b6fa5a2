"""The frozen base: loaded once, shared by every trial of a worker, never written to."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from peftsearch.domains.models import Architecture, custom_code_refused, model_config, needs_custom_code
from peftsearch.domains.tasks import Head
from peftsearch.spec import StudyError, first_line
from peftsearch.training.distributed import WorkerGroup
from peftsearch.training.quantised import (
    check_memory,
    check_quantisable,
    left_unquantised,
    quantised_layers,
    quantization_config,
    scales,
    settle,
    share_layer,
    shared_state,
)
from peftsearch.training.sharding import ShardedWeight, matrices_in_layers, split

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peftsearch.domains import PreparedDomain, Task
    from peftsearch.methods import Quantization

M = TypeVar("M", bound=nn.Module)


class FrozenBase:
    """A pretrained model in memory, from which trials take models that share its tensors.

    Args:
        location: Folder or Hub id.
        revision: Hub revision.
        device: Where the weights live.
        trust_remote_code: Whether code that the model brings along may run.
        form: How it is stored for what is not a trial.
        group: The workers that share it; each holds a part of it where the group is sharded.
    """

    def __init__(
        self,
        location: str,
        revision: str | None = None,
        device: torch.device | None = None,
        *,
        trust_remote_code: bool = False,
        form: Quantization | None = None,
        group: WorkerGroup | None = None,
    ) -> None:
        self.location = location
        self.revision = revision
        self.trust_remote_code = trust_remote_code
        self.form = form
        self.device = device or torch.device("cpu")
        self._group = group or WorkerGroup(device=self.device)
        self._templates: dict[tuple[str, str, Quantization | None], Template] = {}
        self._tensors: dict[str, nn.Parameter] = {}
        self._quantised: dict[str, nn.Module] = {}

    def trial_model(
        self,
        domain: PreparedDomain,
        *,
        seed: int,
        copy_weights: bool,
        quantization: Quantization | None = None,
    ) -> PreTrainedModel:
        """A model for one trial: the base's own tensors (frozen), in modules of its own, with a freshly drawn head.

        The modules are the trial's: PEFT may replace them at will and nothing needs to be undone afterwards, which is
        what makes a warm worker exact. The head is drawn from torch's global generator: seed it before.

        Args:
            domain: Its task and labels decide the head.
            seed: Seeds torch's global generator, from which the head (and then the method's own weights) are drawn.
            copy_weights: Give the trial a copy of the weights, for methods that train them.
            quantization: How the base is to be stored.

        Raises:
            ValueError: The base cannot be stored so.
        """
        template = self.template(domain, quantization)
        # Only now: loading a template, which the first trial of a worker does, draws random numbers itself.
        torch.manual_seed(seed)
        model = _copy(template.model) if copy_weights else share_tensors(template.model)
        _draw_anew(model, template.fresh)
        return model

    def common_model(self, domain: PreparedDomain) -> PreTrainedModel:
        """A model for what is not a trial (a baseline, a measurement), with any head, in the base's common form.

        Raises:
            ValueError: The base cannot be stored so.
        """
        return self.trial_model(domain, seed=0, copy_weights=False, quantization=self.form)

    def fingerprint(self) -> dict[str, int]:
        """A hash per pretrained tensor; equal before and after a study, or something wrote to the base."""
        found = {name: _hash(tensor) for name, tensor in self._tensors.items()}
        for name, layer in self._quantised.items():
            found |= {f"{name} scale {index}": _hash(tensor) for index, tensor in enumerate(scales(layer))}
        return found

    def template(self, domain: PreparedDomain, quantization: Quantization | None = None) -> Template:
        """The model with a domain's head, around the base's tensors; loaded at the first call for such a head.

        Raises:
            ValueError: The base cannot be stored in this quantization.
        """
        task, labels, head = domain.task, domain.labels, domain.head
        key = (head.auto_model, json.dumps(task.config_kwargs(labels), sort_keys=True), quantization)
        if key not in self._templates:
            if quantization is None:
                model, fresh = self._load_anywhere(head, task.config_kwargs(labels))
            else:
                model, fresh = self._load_quantised(head, task.config_kwargs(labels), quantization)
            self._share_known(model, fresh)
            # Decoders classify at the last token before the padding: the model must know what batches are padded with.
            model.config.pad_token_id = domain.pad_token_id
            model.requires_grad_(False)
            if quantization is None:
                move(model, self.device)
            self._templates[key] = Template(model, fresh, fresh_modules(model, fresh))
        return self._templates[key]

    def tokenizer(self) -> Any:
        """The base's tokenizer, loaded anew."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.location, revision=self.revision, trust_remote_code=False)

    def language_model(self, architecture: Architecture) -> PreTrainedModel | None:
        """The frozen base with the language-modelling head that it was pretrained with, for prompting; not kept.

        It shares the tensors that are in memory already, whatever task's model brought them.

        Args:
            architecture: Encoder-decoder or decoder.

        Returns:
            The model in evaluation mode; None where the checkpoint holds no such head.
        """
        auto = "AutoModelForSeq2SeqLM" if architecture == "encoder-decoder" else "AutoModelForCausalLM"
        head = Head(auto, None)
        if self.form is None:
            model, fresh = self._load(head, {})
        else:
            model, fresh = self._load_quantised(head, {}, self.form)
        if fresh:
            return None
        # A backbone has a name of its own in some classes (T5's in a classifier), and none in others.
        prefix = f"{model.base_model_prefix}."
        known = {key.removeprefix(prefix): key for key in self._tensors}
        layers, aliases = quantised_layers(model), _aliases(model)
        for name, parameter in list(model.named_parameters()):
            layer = layers.get(name.removesuffix(".weight"))
            key = known.get(_key(name.removeprefix(prefix), parameter, layer))
            same = None if key is None else self._tensors[key]
            if key is None or same is None or same.shape != parameter.shape or same.dtype != parameter.dtype:
                continue
            if layer is None or isinstance(same, ShardedWeight):
                _replace(model, aliases[name], same)
            else:
                share_layer(layer, self._quantised[key])
        return move(model.requires_grad_(False), self.device).eval()

    def _load_anywhere(self, head: Head, config_kwargs: dict[str, Any]) -> tuple[PreTrainedModel, frozenset[str]]:
        """The model in memory, or this worker's parts of it on its device."""
        group = self._group
        if group.mesh is None:
            return self._load(head, config_kwargs)
        # The first worker alone has all of the model, in the host's memory; the devices see it matrix by matrix.
        with group.together():
            model, fresh = self._load(head, config_kwargs, **({} if group.rank == 0 else {"device_map": "meta"}))
        parts = matrices_in_layers(model)
        aliases = _aliases(model)
        # Where weights are tied once they are loaded, the first worker knows.
        for names in group.from_first(list(aliases.values())) or ():
            parameter = model.get_parameter(names[0])
            known = None if names[0] in fresh else self._tensors.get(names[0])
            if known is not None and known.shape == parameter.shape and known.dtype == parameter.dtype:
                continue
            complete = group.broadcast(_room_for(parameter.detach(), self.device))
            part = split(complete, group.mesh) if names[0] in parts else complete
            _replace(model, names, nn.Parameter(part, requires_grad=False))
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = group.broadcast(_room_for(buffer, self.device))
        return model, fresh

    def _load(self, head: Head, config_kwargs: dict[str, Any], **kwargs: Any) -> tuple[PreTrainedModel, frozenset[str]]:
        trusted = self.trust_remote_code
        return load_model(self.location, self.revision, head, config_kwargs, trust_remote_code=trusted, **kwargs)

    def _load_quantised(
        self, head: Head, config_kwargs: dict[str, Any], quantization: Quantization
    ) -> tuple[PreTrainedModel, frozenset[str]]:
        bare, fresh = self._load(head, config_kwargs, device_map="meta")
        unquantised = left_unquantised(bare, fresh_modules(bare, fresh))
        check_memory(self.location, bare, quantization, self.device, unquantised)
        model, fresh = self._load(
            head,
            config_kwargs,
            device_map={"": str(self.device)},
            quantization_config=quantization_config(quantization, self.device, unquantised),
        )
        settle(model)
        if self._group.mesh is not None:
            parts = matrices_in_layers(model)
            for names in _aliases(model).values():
                if names[0] in parts:
                    weight = model.get_parameter(names[0])
                    part = nn.Parameter(split(weight, self._group.mesh), requires_grad=False)
                    # What PEFT and bitsandbytes ask a packed weight for.
                    vars(part).update(vars(weight))
                    _replace(model, names, part)
        return model, fresh

    def _share_known(self, model: PreTrainedModel, fresh: frozenset[str]) -> None:
        """Let a freshly loaded model use the tensors that are in memory already, and remember the others."""
        layers, aliases = quantised_layers(model), _aliases(model)
        for name, parameter in list(model.named_parameters()):
            if name in fresh:
                continue
            layer = layers.get(name.removesuffix(".weight"))
            key = _key(name, parameter, layer)
            known = self._tensors.get(key)
            if known is None or known.shape != parameter.shape or known.dtype != parameter.dtype:
                self._tensors[key] = parameter
                if layer is not None:
                    self._quantised[key] = layer
            elif layer is not None:
                share_layer(layer, self._quantised[key])
            else:
                _replace(model, aliases[name], known)


def _key(name: str, parameter: nn.Parameter, layer: Any | None) -> str:
    """What a tensor is known as. Those that are not quantised are the same whatever becomes of the others."""
    return name if layer is None else f"{name} ({type(parameter).__name__})"


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
    location: str,
    revision: str | None,
    head: Head,
    config_kwargs: dict[str, Any],
    *,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> tuple[PreTrainedModel, frozenset[str]]:
    """The model with a task head, and the names of the parameters that the checkpoint does not hold.

    Of a model without a head none are named.

    Args:
        location: Folder or Hub id.
        revision: Hub revision.
        head: Class of the model.
        config_kwargs: What the configuration has to know to build the head.
        trust_remote_code: Whether code that the model brings along may run.
        kwargs: Further arguments of ``from_pretrained``.

    Raises:
        ValueError: The model is stored quantised.
        OSError: It has no safetensors: pickled weights are not loaded.
    """
    import transformers

    check_quantisable(location, model_config(location, revision, trust_remote_code=trust_remote_code))
    auto = getattr(transformers, head.auto_model)
    with quiet_loading():
        model, info = auto.from_pretrained(
            location,
            revision=revision,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            # Pickled weights can run code as they are read.
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            **config_kwargs,
            **kwargs,
        )
    mismatched = {entry[0] if isinstance(entry, tuple) else entry for entry in info["mismatched_keys"]}
    model.eval()
    if head.auto_model == "AutoModel":
        # A model without a head lacks at most a pooler (RoBERTa's checkpoints do), which embeddings do not read:
        # trained, it would count and never learn.
        return model, frozenset()
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
    location: str,
    revision: str | None,
    task: Task,
    head: Head,
    labels: Sequence[str],
    *,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """The model without weights, on the meta device, for counting parameters; and its modules to save.

    Of a model in a folder the names in its files decide what is fresh. A Hub model is not downloaded for that, and a
    folder may hold no more than a configuration: what the bare model of an architecture does not have is taken for the
    head.

    Raises:
        StudyError: There is no such model, or it cannot do the task.
    """
    import transformers

    config_kwargs = task.config_kwargs(labels)
    config = model_config(location, revision, trust_remote_code=trust_remote_code, **config_kwargs)
    try:
        check_quantisable(location, config)
    except ValueError as error:
        raise StudyError(str(error)) from None
    try:
        if any(Path(location).glob("*.safetensors")):
            model, fresh = load_model(
                location, revision, head, config_kwargs, trust_remote_code=trust_remote_code, device_map="meta"
            )
        else:
            with torch.device("meta"), quiet_loading():
                model = getattr(transformers, head.auto_model).from_config(config, trust_remote_code=trust_remote_code)
                bare = transformers.AutoModel.from_config(config, trust_remote_code=trust_remote_code)
            prefix = f"{model.base_model_prefix}."
            known = {name.removeprefix(prefix) for name, _ in bare.named_parameters()}
            # Language models bring their heads along.
            named = [] if head.auto_model.endswith("LM") else [name for name, _ in model.named_parameters()]
            fresh = frozenset(name for name in named if name.removeprefix(prefix) not in known)
    except ValueError as error:
        if needs_custom_code(error):
            raise StudyError(custom_code_refused(location)) from None
        raise StudyError(
            f"the model {location!r} ({config.model_type}) cannot do {task.name}: {first_line(error)}"
        ) from None
    return model.requires_grad_(False), fresh_modules(model, fresh)


def share_tensors(model: nn.Module) -> Any:
    """A deep copy of the module tree around the very same parameter and buffer tensors, quantised ones included."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        memo[id(tensor)] = tensor
    for layer in quantised_layers(model).values():
        memo |= {id(state): state for state in shared_state(layer)}
    return copy.deepcopy(model, memo)


def _copy(model: PreTrainedModel) -> PreTrainedModel:
    """A deep copy. Parts of weights get parameters of their own, and are copied when the trial is handed its parts."""
    return copy.deepcopy(
        model,
        {
            id(part): nn.Parameter(part.detach(), requires_grad=False)
            for part in model.parameters()
            if isinstance(part, ShardedWeight)
        },
    )


def move(model: M, device: torch.device) -> M:
    """A model on a device; what is in parts is there already."""
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is None or isinstance(parameter, ShardedWeight):
                continue
            if parameter.device.type != device.type or device.index not in (None, parameter.device.index):
                parameter.data = parameter.data.to(device)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    return model


def _room_for(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on a device, or room for it where it has no data."""
    if tensor.is_meta:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    return tensor.to(device).contiguous()


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
        soft_tokens: int = config.num_virtual_tokens * config.num_transformer_submodules * config.token_dim
        return count_trainable(model) - count_trainable(model.prompt_encoder) + soft_tokens
    if isinstance(model, PeftModel):
        return sum(tensor.numel() for tensor in get_peft_model_state_dict(model).values())
    return sum(parameter.numel() for parameter in model.parameters())


def _draw_anew(model: PreTrainedModel, names: frozenset[str]) -> None:
    """Give the trial its own, freshly initialised parameters for everything that the checkpoint does not hold."""
    fresh: set[int] = set()
    for aliases in _aliases(model).values():
        # What is tied stays tied: BERT's language-modelling head has two names for one bias, and saves only one.
        if names.issuperset(aliases):
            parameter = nn.Parameter(torch.zeros_like(model.get_parameter(aliases[0])), requires_grad=False)
            _replace(model, aliases, parameter)
            fresh.add(id(parameter))
    # transformers' own initialisation of the architecture, as from_pretrained applies it to missing weights: modules
    # inside first, then those around them, which may know better (T5 draws its heads there). What is marked like this
    # it leaves alone.
    kept = [t for t in (*model.parameters(), *model.buffers()) if id(t) not in fresh]
    kept = [tensor for tensor in kept if not getattr(tensor, "_is_hf_initialized", False)]
    for tensor in kept:
        tensor._is_hf_initialized = True
    try:
        for module in _inside_first(model):
            if any(id(parameter) in fresh for parameter in module.parameters()):
                model._init_weights(module)
    finally:
        for tensor in kept:
            del tensor._is_hf_initialized


def _inside_first(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        yield from _inside_first(child)
    yield module


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    """All names of each parameter, by its first one: tied ones (embedding and head) have several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {several[0]: several for several in names.values()}


def _replace(model: nn.Module, names: Sequence[str], parameter: nn.Parameter) -> None:
    for name in names:
        path, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(path), attribute, parameter)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _hash(tensor: torch.Tensor) -> int:
    """XOR of the tensor's 8-byte words, computed where it lives; the bytes of an odd tail are hashed by themselves."""
    if isinstance(tensor, ShardedWeight):
        tensor = tensor.local
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
