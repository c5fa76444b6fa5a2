"""The model that a pack runs: the frozen base without any adapter, and hooks that make it all members' at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from peftsearch.domains.models import positions_of
from peftsearch.methods import Quantization
from peftsearch.methods.sublayers import feed_forward_input
from peftsearch.training.base_model import FrozenBase, share_tensors
from peftsearch.training.dropout import use_fast_dropout
from peftsearch.training.packing.banks import Banks, Key, Placed, along_columns, along_rows, as_it_is
from peftsearch.training.packing.layers import Change, PackedBottleneck, PackedLowRank, Range
from peftsearch.training.packing.layout import Layout
from peftsearch.training.packing.parts import Bottleneck, LowRank, NotPackableError, Parts, read_parts
from peftsearch.training.packing.prompts import PackedPrompts
from peftsearch.training.recompute import enable

if TYPE_CHECKING:
    from peftsearch.domains import PreparedDomain
    from peftsearch.training.session import TrialSession


class Host:
    """The base of a pack, kept from pack to pack.

    Args:
        base: The frozen base.
        domain: Decides the task head.
        quantization: How the base is stored.
    """

    def __init__(self, base: FrozenBase, domain: PreparedDomain, quantization: Quantization | None) -> None:
        template = base.template(domain, quantization)
        self.model: nn.Module = share_tensors(template.model)
        self.own: dict[str, OwnModules] = {}
        for path in template.modules_to_save:
            self.own[path] = OwnModules()
            parent, _, child = path.rpartition(".")
            setattr(self.model.get_submodule(parent), child, self.own[path])
        if base.device.type == "cpu":
            use_fast_dropout(self.model)
        self._frozen = dict(self.model.named_parameters(remove_duplicate=False))
        self._handles: list[Any] = []
        self._recomputes = False
        self._parts: WeakKeyDictionary[TrialSession, Parts] = WeakKeyDictionary()
        self._begins: dict[str, str] = {}
        """Where feed-forward sublayers begin, by their ends; seeking them takes milliseconds each."""

    def attach(self, layout: Layout, parts: Sequence[Parts], banks: Banks) -> list[PackedPrompts]:
        """Make the model that of these members, until `detach`; returns what puts soft tokens in front of texts."""
        leaf = banks.leaves
        changes: dict[str, list[Change]] = {}
        # Low-rank updates first: in a hybrid the bottleneck reads what they have changed.
        for path in _paths(own.low_rank for own in parts):
            changes.setdefault(path, []).append(_low_rank(path, parts, leaf))
        for parallel in (False, True):
            for path in _paths(
                {path: item for path, item in own.bottlenecks.items() if item.parallel == parallel} for own in parts
            ):
                change = _bottleneck(path, parts, leaf, parallel)
                changes.setdefault(path, []).append(change)
                if parallel:
                    if path not in self._begins:
                        self._begins[path] = feed_forward_input(self.model, path)
                    begin = self.model.get_submodule(self._begins[path])
                    self._handles.append(begin.register_forward_pre_hook(_remember(change)))
        for path, several in changes.items():
            module = self.model.get_submodule(path)
            self._handles.append(module.register_forward_hook(_changed(layout, several)))
        found = []
        stacks = list(_paths(own.prompts for own in parts))
        for path in stacks:
            stack: Any = self.model.get_submodule(path)
            present = [own.prompts.get(path) for own in parts]
            keep = any(own.keep for own in present if own is not None)
            tokens = [
                None if own is None else leaf[path, "prompt"][row, : len(own.tokens)] for row, own in enumerate(present)
            ]
            source = "input_ids" if keep or len(stacks) == 1 else "decoder_input_ids"
            prompts = PackedPrompts(layout, tokens, source, keep, positions_of(stack))
            self._handles.append(stack.register_forward_pre_hook(prompts.insert, with_kwargs=True))
            self._handles.append(stack.register_forward_hook(prompts.remove))
            found.append(prompts)
        for path, modules in self.own.items():
            modules.of(layout, [own.own[path] for own in parts])
        return found

    def recompute(self, wanted: bool) -> None:
        """Compute activations twice, or once, in what is trained from now on."""
        model: Any = self.model
        if wanted and not self._recomputes:
            enable(model)
        elif self._recomputes and not wanted:
            model.activation_checkpointing_disable()
        self._recomputes = wanted

    def detach(self) -> None:
        """Undo `attach`."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for modules in self.own.values():
            modules.of(None, ())

    def parts_of(self, session: TrialSession) -> Parts:
        """What a trial adds to this base; read once, as going through a model takes milliseconds.

        Raises:
            NotPackableError: It is not this base with what a pack can add to it; it names the trial.
        """
        if session not in self._parts:
            try:
                parts = read_parts(session.model)
                self.check(parts)
            except NotPackableError as error:
                error.session = session
                raise
            self._parts[session] = parts
        return self._parts[session]

    def check(self, parts: Parts) -> None:
        """Refuse a member that is not this base with what a pack can add to it.

        Raises:
            NotPackableError: With the reason.
        """
        if parts.own.keys() != self.own.keys():
            raise NotPackableError("the trial's own modules are not the task's head")
        for name, parameter in parts.frozen.items():
            if self._frozen.get(name) is not parameter:
                raise NotPackableError(f"{name} is not the base's")
        for path in parts.low_rank.keys() | parts.bottlenecks.keys():
            with suppress(AttributeError):
                self.model.get_submodule(path)
                continue
            raise NotPackableError(f"the base has no module {path}")


class OwnModules(nn.Module):
    """Each member's own module, called with its own slice."""

    def __init__(self) -> None:
        super().__init__()
        self._layout: Layout | None = None
        # Not as children: they belong to the trials.
        self._modules_of: list[Callable[..., Any]] = []

    def of(self, layout: Layout | None, modules: Sequence[nn.Module]) -> None:
        """From now on, the modules of these members."""
        self._layout, self._modules_of = layout, list(modules)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The members' outputs below one another."""
        layout = self._layout
        assert layout is not None
        rows = layout.members * layout.rows

        def shares(value: Any) -> Sequence[Any]:
            if not isinstance(value, Tensor) or not value.ndim or value.shape[0] != rows:
                return [value] * layout.members
            return layout.shares(value)

        given, named = [shares(value) for value in args], {name: shares(value) for name, value in kwargs.items()}
        outputs = [
            module(*(own[member] for own in given), **{name: own[member] for name, own in named.items()})
            for member, module in enumerate(self._modules_of)
        ]
        if isinstance(outputs[0], Tensor):
            return torch.cat(outputs)
        return tuple(torch.cat(several) for several in zip(*outputs, strict=True))

    def __getattr__(self, name: str) -> Any:
        # Some models ask their head for its data type or size.
        try:
            return super().__getattr__(name)
        except AttributeError:
            modules = self.__dict__.get("_modules_of")
            if not modules:
                raise
            return getattr(modules[0], name)


def placed_of(parts: Parts) -> list[Placed]:
    """Where a member's parameters lie in a row of the banks."""
    found: list[Placed] = []
    for path, low in parts.low_rank.items():
        found.append(along_rows(low.down, (path, "low rank down")))
        found.append(along_columns(low.up, (path, "low rank up")))
    for path, item in parts.bottlenecks.items():
        # Sequential and parallel ones at the same place are different parts.
        kind = "parallel" if item.parallel else "bottleneck"
        found.append(along_rows(item.down.weight, (path, kind, "down")))
        found.append(along_rows(item.down.bias, (path, kind, "down bias")))
        found.append(along_columns(item.up.weight, (path, kind, "up")))
        found.append(along_rows(item.up.bias, (path, kind, "up bias")))
    for path, prompt in parts.prompts.items():
        found.append(along_rows(prompt.tokens, (path, "prompt")))
    seen: set[int] = set()
    for path, module in parts.own.items():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                found.append(as_it_is(parameter, (path, name, "own")))
    return found


def _low_rank(path: str, parts: Sequence[Parts], leaf: Mapping[Key, Tensor]) -> PackedLowRank:
    present: list[LowRank | None] = [own.low_rank.get(path) for own in parts]
    return PackedLowRank(
        leaf[path, "low rank down"],
        leaf[path, "low rank up"],
        [item.scale if item else 0.0 for item in present],
        [item.dropout if item else 0.0 for item in present],
        _range(present),
    )


def _bottleneck(path: str, parts: Sequence[Parts], leaf: Mapping[Key, Tensor], parallel: bool) -> PackedBottleneck:
    present: list[Bottleneck | None] = [own.bottlenecks.get(path) for own in parts]
    present = [item if item and item.parallel == parallel else None for item in present]
    kind = "parallel" if parallel else "bottleneck"
    some = next(item.activation for item in present if item)
    return PackedBottleneck(
        (leaf[path, kind, "down"], leaf[path, kind, "down bias"]),
        (leaf[path, kind, "up"], leaf[path, kind, "up bias"]),
        [item.activation if item else some for item in present],
        [item.scale if item else 1.0 for item in present],
        [item.dropout if item else 0.0 for item in present],
        _range(present),
        parallel=parallel,
    )


def _range(present: Sequence[object | None]) -> Range:
    there = [row for row, item in enumerate(present) if item is not None]
    return Range(there[0], there[-1] + 1)


def _paths(several: Any) -> dict[str, None]:
    """All paths, in order, without those that come twice."""
    return dict.fromkeys(path for parts in several for path in parts)


def _changed(layout: Layout, changes: Sequence[Change]) -> Callable[..., Tensor]:
    def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        for change in changes:
            output = change(layout, args[0], output)
        return output

    return hook


def _remember(change: PackedBottleneck) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        change.remember(args[0])

    return hook
