"""One trial in a worker's memory: built from its plan or its checkpoint, trained segment by segment."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import torch
from torch import nn

from peftsearch.domains import PreparedDomain
from peftsearch.domains.tasks import LossOptions
from peftsearch.files import Place, delete, patiently, persist, read_json, write_bytes, write_json
from peftsearch.methods import METHODS, AttachContext
from peftsearch.spec import TrainingSpec
from peftsearch.training.attention import use_fast_attention
from peftsearch.training.base_model import FrozenBase, count_trainable, move, trainable
from peftsearch.training.batches import Batch, ahead, load, padded_to, padding_known
from peftsearch.training.budget import Budget, tokens_of_a_pass
from peftsearch.training.checkpoint import (
    TEST_PREDICTIONS,
    TEST_READING,
    WEIGHTS,
    CorruptCheckpointError,
    belongs,
    delete_states,
    read_checkpoint,
    sound_states,
    trial_folder,
    write_checkpoint,
)
from peftsearch.training.compiled import compile_layers, uncompiled
from peftsearch.training.data_order import DataOrder
from peftsearch.training.distributed import WorkerGroup
from peftsearch.training.dropout import use_fast_dropout
from peftsearch.training.evaluate import Evaluation, evaluate
from peftsearch.training.forgetting import FORGETTING, GeneralText
from peftsearch.training.memory import forget_peak, peak_resident
from peftsearch.training.optimizer import (
    learning_rate_factor,
    load_optimizer_tensors,
    make_optimizer,
    master_weights,
    optimizer_tensors,
    set_learning_rate,
    step_optimizer,
)
from peftsearch.training.precision import training_autocast, trains_bf16
from peftsearch.training.recompute import recompute
from peftsearch.training.segment import SegmentResult, TestReading, TrialPlan
from peftsearch.training.sharding import part_like
from peftsearch.training.state_writer import WRITER
from peftsearch.training.usage import METER, of_workers

log = logging.getLogger(__name__)

_STEPS_BETWEEN_QUESTIONS = 8
"""Several workers ask one another so often whether one of them has to leave; sooner where their steps take long."""
_SECONDS_BETWEEN_QUESTIONS = 2.0


class DivergedError(RuntimeError):
    """The training loss is not a finite number any more."""


class LeavingError(RuntimeError):
    """A worker has to leave; the trial's state is written."""


def build_model(
    base: FrozenBase, domain: PreparedDomain, method: str, hyperparameters: Mapping[str, Any], seed: int
) -> nn.Module:
    """The model of a trial before its first step, on the base's device.

    Args:
        base: The frozen base.
        domain: Decides task and labels.
        method: Name of the method.
        hyperparameters: Its configuration.
        seed: Seeds the head's and the adapter's initialisation; torch's global generator is left advanced.

    Raises:
        ValueError: The configuration does not fit the model.
    """
    chosen = METHODS[method]
    chosen.check(hyperparameters)
    quantization = chosen.quantization(hyperparameters)
    model = base.trial_model(domain, seed=seed, copy_weights=chosen.trains_copy, quantization=quantization)
    fresh = base.template(domain, quantization).modules_to_save
    context = AttachContext(domain.head.peft_task_type, base.location, domain.labels, fresh, base.revision)
    attached = chosen.attach(model, hyperparameters, context)
    if count_trainable(attached) == 0:
        raise ValueError(f"{method} found nothing to train in {type(model).__name__}")
    return move(attached, base.device)


def load_trained(model: nn.Module, path: Place) -> dict[str, Any]:
    """Put a finished trial's trained weights into a freshly built model; returns the checkpoint's metadata.

    Raises:
        FileNotFoundError, CorruptCheckpointError: There are none, or they are damaged.
        ValueError: They belong to another configuration.
    """
    tensors, meta = read_checkpoint(path)
    _load_parameters(trainable(model), tensors)
    return meta


def finished_result(study_folder: Place, plan: TrialPlan) -> SegmentResult | None:
    """The last result of a trial that has been trained to its end already; None where it has not.

    Weights of another trial, of which the ledger knows nothing any more, are deleted.
    """
    weights = trial_folder(study_folder, plan.key) / WEIGHTS
    try:
        _, meta = read_checkpoint(weights)
    except (FileNotFoundError, CorruptCheckpointError):
        return None
    if not belongs(meta, plan.digest):
        log.warning("the weights in trial folder %s are of another trial: the ledger is older than they are", plan.key)
        delete(weights)
        return None
    return _result(meta["result"])


def _result(written: Mapping[str, Any]) -> SegmentResult:
    test = written.get("test")
    # Earlier versions wrote more.
    known = {name: value for name, value in written.items() if name in SegmentResult.__dataclass_fields__}
    return SegmentResult(**{**known, "test": TestReading(**test) if test else None})


class TrialSession:
    """A trial between its segments.

    A trial's result depends on its plan alone: head, adapter, data order, dropout and schedule derive from its seed and
    step, so it does not matter which worker trains which segment, nor what that worker trained before.

    Args:
        plan: The trial.
        base: The frozen base of the trial's model.
        domain: Its data.
        training: What all trials of the study share.
        budget: Its full budget.
        group: The workers that train it.
        study_folder: Where checkpoints go.
        general_text: On which forgetting is measured once the trial is at its end; nothing is measured for None.

    Raises:
        ValueError: The configuration does not fit the model.
    """

    def __init__(
        self,
        plan: TrialPlan,
        base: FrozenBase,
        domain: PreparedDomain,
        training: TrainingSpec,
        budget: Budget,
        group: WorkerGroup,
        study_folder: Place,
        general_text: GeneralText | None = None,
    ) -> None:
        self.plan = plan
        self.domain = domain
        self.training = training
        self.budget = budget
        self.group = group
        self.study_folder = study_folder
        self.general_text = general_text
        self.folder = trial_folder(study_folder, plan.key)
        self.step = 0
        self.must_leave: Callable[[], bool] = bool
        """Asked at every step: whether this worker is to leave, because its machine is about to be taken away or the
        study stops."""
        self.tell: Callable[[str], None] = log.warning
        """Told, in a sentence, what a person should know of the trial."""
        self._asked, self._asks_at = (0, time.perf_counter()), 0
        self._part = Part()
        self._done = Part()
        """What `_train` did of the last segment."""
        self.last: SegmentResult | None = None
        """Result of the segment that ended at `step`: given again when the answer was lost on its way."""
        with nullcontext() if group.sharded else group.together():
            self.model = build_model(base, domain, plan.method, plan.hyperparameters, plan.seed)
        if group.device.type == "cpu":
            use_fast_attention()
            use_fast_dropout(self.model)
        self.half = trains_bf16(training.precision, group.device)
        lengths, bound = domain.lengths("train"), training.tokens_per_batch
        parts = group.size * training.gradient_accumulation
        tokens = tokens_of_a_pass(training.batch_size, bound, max(lengths), parts)
        self.recomputes = recompute(self.model, training.gradient_checkpointing, tokens, self.half, group)
        """Whether activations are computed twice."""
        if training.compile:
            compile_layers(self.model)
        self.wrapped = group.wrap(self.model, self.half)
        self.parameters = trainable(self.model)
        self.masters = master_weights(self.model)
        self.optimizer = make_optimizer(
            self.model,
            head_parameters(self.model),
            float(plan.hyperparameters["learning_rate"]),
            training,
            group.device,
            self.masters,
        )
        self.loss_options = _loss_options(domain, training, group.device)
        self.best = _Best()
        self.order = DataOrder(lengths, training.batch_size, plan.seed, bound, budget.steps_per_epoch)
        # Ranks draw different dropout masks; rank 0's stream is that of a single worker.
        torch.manual_seed(plan.seed * 65_537 + 1 + group.rank)
        self._random_state = _random_state(group.device)

    def resume(self, latest: int) -> None:
        """Continue from the latest sound state of the trial up to a step, where there is one.

        Raises:
            StorageError: The storage cannot be read.
        """
        # It may be on its way.
        WRITER.wait()
        found = patiently(
            self.folder, lambda: next(sound_states(self.folder, latest, self.plan.digest, self.tell), None), "read"
        )
        if found is None:
            return
        tensors, meta = found
        _load_parameters(self.parameters, _strip(tensors, "model/"))
        self.best = _Best(_strip(tensors, "best/"), meta["best_value"], meta["best_step"], meta["waited"])
        _load_parameters(self.masters, _strip(tensors, "master/"))
        load_optimizer_tensors(self.optimizer, {**self.parameters, **self.masters}, _strip(tensors, "optimizer/"))
        # A group that has grown since has workers without a state, and a state that was written on a CPU has none of a
        # GPU: those are drawn from the seed.
        self._random_state = self._random_state | _strip(tensors, f"random/{self.group.rank}/")
        self.step = int(meta["step"])
        self.last = _result(meta["result"]) if meta["result"] else None
        part = Part(**meta.get("part", {}))
        # The sum over all workers is one's from here on.
        self._part = part if self.group.rank == 0 else replace(part, loss=0.0)

    def run(self, to_step: int, *, final: bool, read_test: bool = False) -> SegmentResult:
        """Train up to a step, evaluate on the validation split, and write the state.

        With ``training.patience`` a trial ends before its full budget when it has stopped improving, and then (or at
        the full budget) goes back to its best weights.

        Args:
            to_step: Steps done afterwards.
            final: This is the full budget: keep the trained weights and drop the rest.
            read_test: Score the test split once the last step is done.

        Raises:
            DivergedError: The loss is not finite.
            LeavingError: `must_leave` said so; the state is written.
            StorageError: The state cannot be written.
        """
        _forget_peak(self.group.device)
        _set_random_state(self._random_state, self.group.device)
        self._train(to_step)
        self._random_state = _random_state(self.group.device)
        try:
            return self.conclude(self._done, final=final, read_test=read_test)
        except LeavingError:
            self._part = self._done
            self.pause()
            raise

    def conclude(
        self,
        done: Part,
        *,
        final: bool,
        read_test: bool = False,
        peak_memory: int | None = None,
    ) -> SegmentResult:
        """The end of `run`, for a trial whose steps are done: evaluate and write the state.

        Args:
            done: The segment's training.
            final: As `run`.
            read_test: As `run`.
            peak_memory: What training took, in bytes, where this process does not know it of this trial alone.

        Raises:
            DivergedError, StorageError: As `run`.
            LeavingError: `must_leave` said so: the evaluation is still to be made, and the state to be written.
        """
        trained = time.perf_counter()
        stopped = False
        if self.group.any(self.must_leave()):
            raise LeavingError
        with uncompiled() if self.training.compile else nullcontext():
            if self.training.patience is None:
                evaluation = self._evaluate(final, self._leave_between)
            else:
                # Evaluations are compared on equal terms, the last one too: under autocast, and greedy where a task
                # writes.
                evaluation = self._evaluate(False, self._leave_between)
                exhausted = self._note_improvement(evaluation)
                stopped = exhausted and not final
                if final or stopped:
                    # Otherwise the same computation, of which the numbers are there.
                    differs = self.half or self.domain.task.decodes
                    if self.best.step != self.step:
                        # The last weights are not the best ones: what is scored and kept are those.
                        _load_parameters(self.parameters, self.best.weights)
                        differs = True
                    if differs:
                        evaluation = self._evaluate(final=True)
            scores = evaluation.scores
            if self.general_text is not None and (final or stopped):
                scores = {**scores, FORGETTING: self.general_text.rise(self.model)}
            test = self._read_test(done) if read_test and (final or stopped) else None
        evaluated = time.perf_counter()
        self.last = SegmentResult(
            step=self.step,
            loss=evaluation.loss,
            train_loss=done.loss / max(1, done.examples),
            scores=scores,
            train_seconds=done.seconds,
            evaluation_seconds=evaluated - trained,
            peak_memory_bytes=_peak_memory(self.group.device) if peak_memory is None else peak_memory,
            usage=of_workers(self.group.gather(METER.read(self.group.device))),
            test=test,
            stopped=stopped,
        )
        self._write(final or stopped)
        return self.last

    @property
    def part(self) -> Part:
        """What is done of a segment that was cut short; for whoever trains this trial elsewhere than in `run`."""
        return self._part

    @part.setter
    def part(self, part: Part) -> None:
        self._part = part

    def draw_anew(self, seed: int) -> None:
        """Go on with random numbers from another seed: those so far were drawn together with other trials'."""
        torch.manual_seed(seed)
        self._random_state = _random_state(self.group.device)

    def pause(self) -> None:
        """Write the state in the middle of a segment, so that any worker can go on.

        Raises:
            StorageError: It cannot be written.
        """
        self._write(final=False)
        with self.group.together():
            WRITER.wait()

    def owed(self, to_step: int) -> list[int]:
        """Evaluations before a step that the trial has to pass by on its way, where the states after them are lost.

        The first may be due at once, where a worker had to leave before it.
        """
        made = self.last is not None and self.last.step == self.step
        first = self.step + 1 if made else self.step
        return [step for step in self.budget.evaluation_steps if first <= step < to_step]

    def check_loss(self, mean: float, to_step: int) -> None:
        """Refuse a training loss that is no number.

        Raises:
            DivergedError: It is not finite.
        """
        if not math.isfinite(mean):
            rate = self.plan.hyperparameters["learning_rate"]
            raise DivergedError(f"the training loss became {mean} before step {to_step} (learning rate {rate:g})")

    def catch_up(self, step: int) -> None:
        """Train up to an evaluation that was made and recorded before, and whose state was lost.

        Raises:
            DivergedError: As `run`.
            StorageError: As `run`.
        """
        if self.training.patience is not None:
            # Early stopping goes by every evaluation.
            self.run(step, final=False)
            return
        _set_random_state(self._random_state, self.group.device)
        self._train(step)
        self._random_state = _random_state(self.group.device)

    def _note_improvement(self, evaluation: Evaluation) -> bool:
        """Remember the weights if they are the best so far; whether patience is exhausted."""
        value = evaluation.scores[self.domain.metric]
        sign = 1.0 if self.domain.direction == "maximize" else -1.0
        if self.best.value is None or sign * value > sign * self.best.value:
            weights = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
            self.best = _Best(weights, value, self.step, 0)
        else:
            self.best.waited += 1
        assert self.training.patience is not None
        return self.best.waited >= self.training.patience

    def _read_test(self, done: Part) -> TestReading | None:
        """Score the test split, once: a worker that died before its checkpoint was written left its reading behind.

        It may take hours (of a whole test split, by beams): what was trained is written first, and where a worker dies
        or leaves meanwhile, another one makes the evaluations anew, and no step.
        """
        if "test" not in self.domain.rows:
            return None
        before = self.group.from_first(_earlier_reading(self.folder, self.plan) if self.group.rank == 0 else None)
        if before is not None:
            return before
        self._part = done
        self._write(final=False)
        self._part = Part()
        began = time.perf_counter()
        found = evaluate(
            self.model,
            self.domain,
            "test",
            self.training.evaluation_batch_size,
            self.group,
            between=self._leave_between,
        )
        seconds = time.perf_counter() - began
        path = self.folder / TEST_PREDICTIONS
        if self.group.rank == 0:
            lines = (
                json.dumps({"prediction": prediction, "reference": reference}, ensure_ascii=False)
                for prediction, reference in zip(found.predictions, found.references, strict=True)
            )
            content = "".join(f"{line}\n" for line in lines).encode()
            persist(path, lambda: write_bytes(path, content))
        reading = TestReading(
            loss=found.loss,
            scores=found.scores,
            examples=found.examples,
            seconds=seconds,
            predictions=f"trials/{self.plan.key}/{TEST_PREDICTIONS}",
            read_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
        )
        if self.group.rank == 0:
            # Written whole or not at all; without it the predictions above would count for nothing.
            path = self.folder / TEST_READING
            persist(path, lambda: write_json(path, {"trial": self.plan.digest, **asdict(reading)}))
        return reading

    def _train(self, to_step: int) -> float:
        group, task = self.group, self.domain.task
        self.wrapped.train()
        group.prepare(self.model, self.half)
        total = torch.full((), self._part.loss, dtype=torch.float64, device=group.device)
        examples, began = self._part.examples, time.perf_counter() - self._part.seconds
        self._part = Part()
        parameters = list(self.parameters.values())
        for step, count, loaded in ahead(range(self.step, to_step), self._loaded, group.device):
            if self._leaves(step):
                self.step, self._random_state = step, _random_state(group.device)
                loss_so_far = float(group.sum(total).item())
                self._part = Part(loss_so_far, examples, time.perf_counter() - began)
                self.pause()
                raise LeavingError
            loss = torch.zeros((), device=group.device)
            for number, (moved, weight) in enumerate(loaded, start=1):
                batch = moved.values
                group.place = f"{self.plan.key}: forward pass {number} of step {step}"
                with group.no_sync(self.wrapped) if number < len(loaded) else nullcontext():
                    with training_autocast(self.training.precision, group.device), padding_known(moved.full):
                        inputs = {name: value for name, value in batch.items() if name not in task.hidden}
                        output = self.wrapped(**inputs)
                    losses = task.losses(output, batch, self.loss_options)
                    # DDP averages over ranks: scaled so that the average is the mean over the whole batch.
                    part_loss = losses.sum() * weight
                    group.place = f"{self.plan.key}: backward pass of step {step} on worker {group.rank}"
                    part_loss.backward()  # type: ignore[no-untyped-call]
                loss += part_loss.detach()
            group.average_gradients(parameters)
            group.place = f"{self.plan.key}: step {step}"
            group.clip_gradients(parameters, self.training.max_grad_norm)
            set_learning_rate(self.optimizer, learning_rate_factor(step, self.budget.total_steps, self.training))
            step_optimizer(self.optimizer, self.parameters, self.masters)
            # Summed on the device: reading it every step would make the host wait for the GPU.
            total += loss.double() * count / group.size
            examples += count
        self.step = to_step
        self._done = Part(float(group.sum(total).item()), examples, time.perf_counter() - began)
        mean = self._done.loss / max(1, examples)
        self.check_loss(mean, to_step)
        return mean

    def _loaded(self, step: int) -> tuple[int, int, list[tuple[Batch, float]]]:
        """A step, its examples, and this worker's parts of its batch, each with the weight of an example's loss."""
        group, data, indices = self.group, self.domain.split("train"), self.order.batch(step)
        mine = indices[group.rank :: group.size] or indices[:1]
        # A rank without examples of its own still takes part in the collectives, with weight zero.
        weight = group.size / len(indices) if len(indices) > group.rank else 0.0
        largest = -(-len(indices) // group.size)
        part = -(-largest // self.training.gradient_accumulation)
        parts = [(mine[first : first + part], weight) for first in range(0, len(mine), part)]
        if group.sharded:
            # Each forward pass gathers weights from all ranks: they make the same number of them.
            parts += [(mine[:1], 0.0)] * (-(-largest // part) - len(parts))
        task, fill, multiple = self.domain.task, self.domain.pad_token_id, padded_to(group.device)
        made = [(task.collate(data[rows], fill, multiple_of=multiple), weight) for rows, weight in parts]
        return step, len(indices), [(load(values, group.device), weight) for values, weight in made]

    def _leaves(self, step: int) -> bool:
        if self.group.size == 1:
            return self.must_leave()
        if step < self._asks_at:
            return False
        asked, at = self._asked
        now = time.perf_counter()
        said = torch.tensor([float(self.must_leave()), (now - at) / max(1, step - asked)], device=self.group.device)
        # All go by the same sums, and so ask again at the same step.
        leaving, seconds = self.group.sum(said).tolist()
        steps = min(_STEPS_BETWEEN_QUESTIONS, int(_SECONDS_BETWEEN_QUESTIONS * self.group.size / max(seconds, 1e-6)))
        self._asked, self._asks_at = (step, now), step + max(1, steps)
        return bool(leaving)

    def _leave_between(self) -> None:
        """Between the batches of an evaluation; several workers have different numbers of them, and finish it."""
        if self.group.size == 1 and self.must_leave():
            raise LeavingError

    def _evaluate(self, final: bool, between: Callable[[], None] = lambda: None) -> Evaluation:
        # The score at the full budget is the adapter's: what plain transformers gives, in the weights' own precision.
        # On the way there the training's precision is as good for comparing trials, and up to four times as fast.
        self.group.prepare(self.model, self.half and not final)
        context = nullcontext() if final else training_autocast(self.training.precision, self.group.device)
        with context:
            evaluation = evaluate(
                self.model,
                self.domain,
                "validation",
                self.training.evaluation_batch_size,
                self.group,
                final=final,
                between=between,
            )
        if not math.isfinite(evaluation.loss):
            raise DivergedError(f"the validation loss is {evaluation.loss} after step {self.step}")
        return evaluation

    def _write(self, final: bool) -> None:
        self.group.place = f"{self.plan.key}: writing step {self.step}"
        random_states = self.group.gather(self._random_state)
        weights = self.group.collected({name: parameter.data for name, parameter in self.parameters.items()})
        tensors = {f"model/{name}": tensor for name, tensor in weights.items()}
        if not final:
            names = {id(parameter): name for name, parameter in (*self.parameters.items(), *self.masters.items())}
            further = {f"master/{name}": master.data for name, master in self.masters.items()}
            further |= {f"best/{name}": tensor for name, tensor in self.best.weights.items()}
            further |= {f"optimizer/{k}": v for k, v in optimizer_tensors(self.optimizer, names).items()}
            tensors |= self.group.collected(further)
        with self.group.together():
            if self.group.rank == 0:
                self._write_to_storage(final, weights, tensors, random_states)

    def _write_to_storage(
        self,
        final: bool,
        weights: Mapping[str, torch.Tensor],
        tensors: dict[str, torch.Tensor],
        random_states: list[dict[str, torch.Tensor]],
    ) -> None:
        meta = {
            "number": self.plan.number,
            "trial": self.plan.digest,
            "step": self.step,
            "result": asdict(self.last) if self.last else None,
            "best_value": self.best.value,
            "best_step": self.best.step,
            "waited": self.best.waited,
            "part": asdict(self._part),
        }
        if final:
            WRITER.wait()
            # Without the states, a trial whose weights do not survive would be lost.
            write_checkpoint(self.folder / WEIGHTS, weights, meta, lasting=True)
            delete_states(self.folder)
            return
        for rank, state in enumerate(random_states):
            tensors |= {f"random/{rank}/{name}": tensor for name, tensor in state.items()}
        WRITER.write(self.folder, self.step, tensors, meta)


@dataclass(frozen=True)
class Part:
    """What was done of a segment that was cut short: a sum of losses over examples, their number, and seconds."""

    loss: float = 0.0
    examples: int = 0
    seconds: float = 0.0


@dataclass
class _Best:
    """The best evaluation so far, for early stopping."""

    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    value: float | None = None
    step: int = -1
    waited: int = 0
    """Evaluations since then."""


def _earlier_reading(folder: Place, plan: TrialPlan) -> TestReading | None:
    """What a session of the same trial read of the test split before its worker died."""
    try:
        found = read_json(folder / TEST_READING)
        if found is None or not belongs(found, plan.digest):
            return None
        return TestReading(**{name: value for name, value in found.items() if name != "trial"})
    except (AttributeError, ValueError, TypeError):
        return None


def _loss_options(domain: PreparedDomain, training: TrainingSpec, device: torch.device) -> LossOptions:
    weights = None
    if training.class_weights == "balanced":
        found = domain.task.balanced_weights(domain.split("train")[:], domain.labels)
        if found is not None:
            weights = torch.tensor(found, dtype=torch.float32, device=device)
    return LossOptions(training.label_smoothing, weights)


def head_parameters(model: nn.Module) -> frozenset[int]:
    """The task head: what PEFT saves beside the adapter, or the modules outside the backbone of a plain model."""
    from peft import PeftModel
    from peft.utils import ModulesToSaveWrapper

    if isinstance(model, PeftModel):
        return frozenset(
            id(parameter)
            for module in model.modules()
            if isinstance(module, ModulesToSaveWrapper)
            for parameter in module.parameters()
            if parameter.requires_grad
        )
    backbone: nn.Module = model.base_model  # type: ignore[assignment]
    inside = {id(parameter) for parameter in backbone.parameters()}
    return frozenset(id(parameter) for parameter in model.parameters() if id(parameter) not in inside)


def _load_parameters(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, torch.Tensor]) -> None:
    if parameters.keys() != tensors.keys():
        raise ValueError("the weights belong to another configuration than the trial's")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(part_like(tensors[name], parameter))


def _strip(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _random_state(device: torch.device) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state: Mapping[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        forget_peak()


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident()
