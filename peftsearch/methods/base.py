"""What every method of adaptation provides. Adding a method is one file with one `Method` in it.

This module and the method files import neither torch nor PEFT at the top: the search reads their spaces in processes
that never train.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from peftsearch.spec import Range, Scalar, Space, StudyError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


Quantization = Literal["nf4", "int8"]

BYTES_PER_WEIGHT: Mapping[Quantization, float] = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}
"""A weight in memory. nf4 with double quantisation (Dettmers et al. 2023, "QLoRA", section 3): four bits, a scale of
one byte for 64 weights, and a scale of four bytes for 256 of these. int8: a byte; the scale of a row hardly counts."""


@dataclass(frozen=True)
class Hyperparameter:
    """One searchable hyperparameter of a method.

    Attributes:
        kind: Type of its values.
        space: What is searched where the study file is silent.
        meaning: One line for documentation and errors.
        minimum: Smallest allowed value (numbers).
        maximum: Largest allowed value (numbers).
        choices: The allowed words, or None for free text (words).
        shapes_parameters: Whether it changes the number of trainable parameters.
    """

    kind: Literal["int", "float", "str", "bool"]
    space: Space
    meaning: str
    minimum: float = -math.inf
    maximum: float = math.inf
    choices: tuple[str, ...] | None = None
    shapes_parameters: bool = True

    def check(self, space: Space, loc: tuple[str | int, ...]) -> Space:
        """Check what the study file says against kind and bounds; returns the space with its numbers in the right type.

        Raises:
            StudyError: With one sentence that names the place and the fix.
        """
        name = loc[-1]
        if isinstance(space, Range):
            if self.kind not in ("int", "float"):
                raise StudyError(f"{name} takes {self._expected()}, not a range", loc)
            for bound, value in (("low", space.low), ("high", space.high)):
                self._check_value(value, (*loc, bound), f"{bound} of {name}")
            if self.kind == "int" and space.step is not None and space.step != int(space.step):
                raise StudyError(f"step of {name} must be a whole number, not {space.step:g}", (*loc, "step"))
            return space
        if isinstance(space, tuple):
            return tuple(self._check_value(value, loc, str(name)) for value in space)
        return self._check_value(space, loc, str(name))

    def _check_value(self, value: Scalar, loc: tuple[str | int, ...], name: str) -> Scalar:
        number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
        fits = {
            "int": number.is_integer(),
            "float": math.isfinite(number),
            "str": isinstance(value, str),
            "bool": isinstance(value, bool),
        }[self.kind]
        if not fits:
            raise StudyError(f"{name} must be {self._expected()}, not {value!r}", loc)
        if self.kind in ("int", "float"):
            assert isinstance(value, int | float)
            if not self.minimum <= value <= self.maximum:
                raise StudyError(f"{name} must be {self._expected()}, not {value:g}", loc)
            return int(value) if self.kind == "int" else float(value)
        if self.choices is not None and value not in self.choices:
            raise StudyError(f"{name} must be {self._expected()}, not {value!r}", loc)
        return value

    def _expected(self) -> str:
        if self.kind == "bool":
            return "true or false"
        if self.kind == "str":
            return f"one of {', '.join(self.choices)}" if self.choices else "a text"
        kind = "a whole number" if self.kind == "int" else "a number"
        if math.isfinite(self.minimum) and math.isfinite(self.maximum):
            return f"{kind} from {self.minimum:g} to {self.maximum:g}"
        if math.isfinite(self.minimum):
            return f"{kind} of at least {self.minimum:g}"
        return kind


@dataclass(frozen=True)
class AttachContext:
    """What a method may need to know besides the model.

    Attributes:
        peft_task_type: PEFT's name of the task, for example ``SEQ_CLS``.
        model_location: Folder or Hub id of the base model (and of its tokenizer).
        label_names: The task's labels, or () where it has none.
        modules_to_save: Paths of the modules that the base's checkpoint does not hold (the task head, sometimes a
            pooler): every method trains them and PEFT saves them in full.
        revision: Hub revision of the base model.
    """

    peft_task_type: str | None
    model_location: str
    label_names: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    revision: str | None = None


class Method(ABC):
    """A family of adaptation: its search space, its published defaults, and how it attaches to a frozen base."""

    name: ClassVar[str]
    """The word in the study file."""
    title: ClassVar[str]
    """The name in tables and plots."""
    source: ClassVar[str]
    """The paper that describes it."""
    hyperparameters: ClassVar[Mapping[str, Hyperparameter]]
    priors: ClassVar[tuple[Mapping[str, Scalar], ...]] = ()
    """Published defaults, tried first. Hyperparameters that a prior leaves out are sampled."""
    trains_copy: ClassVar[bool] = False
    """Whether the base's own weights are trained, so that the model needs a copy of them."""

    def quantization(self, hyperparameters: Mapping[str, Any]) -> Quantization | None:
        """How the frozen base is stored for a configuration: nf4 or int8 (bitsandbytes), or None for as it is.

        Methods that can train over a quantised base have the hyperparameter ``quantization``.
        """
        value = hyperparameters.get("quantization", "none")
        return None if value == "none" else value

    @abstractmethod
    def attach(self, model: PreTrainedModel, hyperparameters: Mapping[str, Any], context: AttachContext) -> nn.Module:
        """Make the model trainable by this method.

        Args:
            model: A model with its task head whose parameters are frozen; unless `trains_copy`, its base tensors are
                shared with every other trial and must not be written to. May live on the meta device.
            hyperparameters: A value for each of `hyperparameters`.
            context: What else is known.

        Returns:
            The model to train: exactly the parameters to be trained require a gradient. Its ``save_pretrained``
            writes what `transformers` and `peft` load.

        Raises:
            ValueError: The configuration does not fit the model; the sentence becomes the trial's error.
        """

    def packs(self, hyperparameters: Mapping[str, Any], *, bare: bool = False) -> bool:
        """Whether trials of such a configuration can be trained together over one frozen base.

        `peftsearch.training.packing` knows low-rank updates, bottlenecks, soft tokens and modules of a trial's own. A
        method that trains anything else leaves this as it is, and its trials are trained one after another.

        Args:
            hyperparameters: The configuration.
            bare: Whether the task reads the base's own output, and the model has no head.
        """
        return False

    def check(self, hyperparameters: Mapping[str, Any]) -> None:  # noqa: B027
        """Refuse combinations of values that cannot work, before anything is built.

        Raises:
            ValueError: With one sentence.
        """


@dataclass(frozen=True)
class MethodSpace:
    """A method with the search space of one study: defaults filled in, everything checked."""

    method: Method
    space: Mapping[str, Space] = field(default_factory=dict)

    @property
    def searched(self) -> tuple[str, ...]:
        """Names of the hyperparameters that vary."""
        return tuple(name for name, space in self.space.items() if isinstance(space, Range | tuple))

    def structure(self, hyperparameters: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
        """The part of a configuration that decides how many parameters it trains; hashable."""
        shaping = self.method.hyperparameters
        return tuple(sorted((k, v) for k, v in hyperparameters.items() if shaping[k].shapes_parameters))

    def draw(self, generator: Random) -> dict[str, Scalar]:
        """A configuration at random, every hyperparameter by itself, on the scale of its range.

        No proposal of a search: samplers draw those. `Method.check` may refuse it.
        """
        return {name: self._drawn(name, space, generator) for name, space in self.space.items()}

    def _drawn(self, name: str, space: Space, generator: Random) -> Scalar:
        if isinstance(space, tuple):
            return generator.choice(space)
        if not isinstance(space, Range):
            return space
        if space.values is not None:
            value = generator.choice(space.values)
        elif space.log:
            value = math.exp(generator.uniform(math.log(space.low), math.log(space.high)))
        else:
            value = generator.uniform(space.low, space.high)
        value = min(max(value, space.low), space.high)
        return round(value) if self.method.hyperparameters[name].kind == "int" else value


def learning_rate(low: float, high: float) -> Hyperparameter:
    """The learning rate, which is searched for every method, over the method's useful range."""
    return Hyperparameter(
        kind="float",
        space=Range(low=low, high=high, log=True),
        meaning="Peak learning rate of AdamW",
        minimum=1e-8,
        maximum=10.0,
        shapes_parameters=False,
    )


def dropout(space: Space = 0.0) -> Hyperparameter:
    """Dropout inside the adapter."""
    return Hyperparameter("float", space, "Dropout inside the adapter", 0.0, 0.9, shapes_parameters=False)


def base_quantization(choices: tuple[str, ...] = ("none", "nf4", "int8")) -> Hyperparameter:
    """How the frozen base is stored, for methods that train over a quantised one too; the first is the default."""
    return Hyperparameter(
        "str",
        choices[0],
        "How the frozen base is stored (bitsandbytes): nf4 (4 bits, with double quantisation) or int8"
        + ("; none: as it is" if "none" in choices else ""),
        choices=choices,
        shapes_parameters=False,
    )
