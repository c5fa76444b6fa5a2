"""A trial that is trained in a pack equals the same trial alone, step by step, for every method that packs."""

from __future__ import annotations

import json
import threading
from collections.abc import Hashable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from task_data import task_domain
from test_batches import Waits
from test_recompute import Kept
from tiny_models import SAMPLES, tiny_decoder, tiny_deep_headed_encoder, tiny_encoder, tiny_encoder_decoder

from peftsearch.methods import METHODS
from peftsearch.search.plan import StudyPlan, plan_study
from peftsearch.spec import StudyFile
from peftsearch.training.batches import in_thread
from peftsearch.training.distributed import WorkerGroup
from peftsearch.training.packing import NotPackableError, Pack
from peftsearch.training.packing import pack as pack_module
from peftsearch.training.packing.host import Host
from peftsearch.training.packing_key import pack_key
from peftsearch.training.segment import Segment, TrialPlan
from peftsearch.training.session import TrialSession
from peftsearch.training.worker import Worker

BUILDERS = {
    "encoder": tiny_encoder,
    "deep-headed encoder": tiny_deep_headed_encoder,
    "encoder-decoder": tiny_encoder_decoder,
    "decoder": tiny_decoder,
}
STEPS = 6

ADAPTER = SAMPLES["adapter"]
MEMBERS: dict[str, list[dict[str, Any]]] = {
    "lora": [
        SAMPLES["lora"],
        {**SAMPLES["lora"], "rank": 1, "alpha": 4.0, "learning_rate": 2e-2},
        {**SAMPLES["lora"], "rank": 9, "variant": "rslora", "targets": "all-linear"},
    ],
    "adapter": [
        ADAPTER,
        {**ADAPTER, "bottleneck": 9, "placement": "houlsby", "activation": "relu", "learning_rate": 2e-2},
        {**ADAPTER, "bottleneck": 2, "placement": "parallel", "scale": 2.0, "activation": "tanh"},
    ],
    "prompt": [
        SAMPLES["prompt"],
        {**SAMPLES["prompt"], "tokens": 1, "learning_rate": 1e-2},
        {**SAMPLES["prompt"], "tokens": 11, "init": "vocabulary"},
    ],
    "hybrid": [
        SAMPLES["hybrid"],
        {**SAMPLES["hybrid"], "rank": 5, "bottleneck": 7, "placement": "parallel"},
    ],
}
"""Method -> configurations that differ in everything that is padded, scaled or chosen."""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def without_dropout(folder: Path) -> Path:
    """A base whose own dropout, which a pack draws for all members at once, is off."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({name: 0.0 if "dropout" in name else value for name, value in config.items()}))
    return folder


def planned(
    tmp_path: Path, kind: str, task: str, options: Mapping[str, Any] | None = None, **training: Any
) -> StudyPlan:
    model = without_dropout(BUILDERS[kind](tmp_path / "model"))
    domain = task_domain(task, tmp_path)
    document = {
        "name": "packs",
        "model": str(model),
        "domains": {"d": domain | {"options": {**domain["options"], **(options or {})}}},
        "methods": {method: {} for method in METHODS if method != "bitfit" or kind == "encoder"},
        "training": {
            "epochs": 3,
            "evaluations": 3,
            "batch_size": 8,
            "max_length": 32,
            "precision": "fp32",
            **training,
        },
        "tracking": {"mlflow": "off"},
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(document))
    return plan_study(StudyFile.load(path), tmp_path / "cache")


class Trials:
    """Sessions of some trials over one base, as a worker makes them."""

    def __init__(self, plan: StudyPlan, folder: Path) -> None:
        self.plan = plan
        self.worker = Worker(plan.for_workers(folder, threads=1), WorkerGroup())
        (self.model,) = plan.models
        self.base = self.worker.base(self.model)
        self.domain = self.worker.domain(self.model, "d")

    def session(self, number: int, method: str, hyperparameters: dict[str, Any], seed: int = 0) -> TrialSession:
        trial = TrialPlan(number, self.model, "d", method, hyperparameters, seed)
        plan = self.worker.plan
        return TrialSession(
            trial,
            self.base,
            self.domain,
            plan.training[method],
            plan.budgets["d", method],
            self.worker.group,
            plan.study_folder,
        )

    def pack(self, sessions: Sequence[TrialSession], quantization: Any = None) -> Pack:
        return Pack(sessions, Host(self.base, self.domain, quantization))


def alone(session: TrialSession, steps: int) -> list[float]:
    """The loss of every further step of a trial by itself."""
    return [session._train(session.step + 1) for _ in range(steps)]


def together(pack: Pack, steps: int) -> dict[int, list[float]]:
    """The loss of every further step, by the trial's number."""
    found: dict[int, list[float]] = {session.plan.number: [] for session in pack.sessions}
    for _ in range(steps):
        pack.step()
        for session, loss, count in zip(pack.sessions, pack.losses.tolist(), pack.counts, strict=True):
            found[session.plan.number].append(loss / count)
    return found


def weights_of(session: TrialSession) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in session.parameters.items()}


def assert_same(pack: TrialSession, solo: TrialSession, tolerance: float = 1e-4) -> None:
    """Weights, moments and steps of two sessions of one trial."""
    for name, parameter in solo.parameters.items():
        moments = solo.optimizer.state.get(parameter, {})
        # Where a gradient is rounding and nothing else (a bias that softmax takes out again), AdamW makes steps of it.
        told = moments["exp_avg_sq"].sqrt() > 1e-7 if moments else torch.ones_like(parameter, dtype=torch.bool)
        mine, own = pack.parameters[name].detach()[told], parameter.detach()[told]
        torch.testing.assert_close(mine, own, rtol=10 * tolerance, atol=10 * tolerance, msg=name)
        ours, theirs = (s.optimizer.state.get(s.parameters[name], {}) for s in (pack, solo))
        assert ours.keys() == theirs.keys()
        assert not theirs or float(ours["step"]) == float(theirs["step"]) == solo.step
    assert pack.step == solo.step


@pytest.mark.parametrize("method", MEMBERS)
@pytest.mark.parametrize(
    ("kind", "task"),
    [
        ("encoder", "classification"),
        ("encoder-decoder", "summarization"),
        ("decoder", "classification"),
    ],
)
def test_every_step_equals_that_of_the_trial_alone(kind: str, task: str, method: str, tmp_path: Path) -> None:
    trials = Trials(planned(tmp_path, kind, task), tmp_path / "study")
    # The trials' seeds differ: so do their batches, and how long the texts in them are.
    solo = [trials.session(n, method, values, seed=n) for n, values in enumerate(MEMBERS[method])]
    expected = [alone(session, STEPS) for session in solo]
    members = [trials.session(n, method, values, seed=n) for n, values in enumerate(MEMBERS[method])]
    pack = trials.pack(members)
    found = together(pack, STEPS)
    pack.close()
    for number, losses in enumerate(expected):
        assert found[number] == pytest.approx(losses, rel=1e-4)
        assert losses[-1] != pytest.approx(losses[0], rel=1e-2)
    for mine, own in zip(members, solo, strict=True):
        assert_same(mine, own)


@pytest.mark.parametrize(
    ("kind", "task"),
    [("decoder", "language_modeling"), ("decoder", "summarization"), ("encoder-decoder", "summarization")],
)
def test_no_step_waits_for_the_device(kind: str, task: str, tmp_path: Path) -> None:
    trials = Trials(planned(tmp_path, kind, task), tmp_path / "study")
    with Waits() as waits:
        trials.session(9, "lora", SAMPLES["lora"])._train(2)
    # The loss is read once, at the end of a segment.
    assert waits.count == 1
    configurations = [("prompt", MEMBERS["prompt"][0]), ("prompt", MEMBERS["prompt"][2]), ("lora", SAMPLES["lora"])]
    members = [trials.session(n, method, values, seed=n) for n, (method, values) in enumerate(configurations)]
    pack = trials.pack(members)
    with Waits() as waits:
        pack.step()
        pack.step()
    pack.close()
    assert waits.count == 0


def test_a_pack_whose_batches_are_made_ahead_trains_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trials = Trials(planned(tmp_path, "encoder", "classification", gradient_accumulation=2), tmp_path / "study")
    configurations = [("prompt", SAMPLES["prompt"]), ("lora", SAMPLES["lora"])]

    def losses() -> list[dict[int, list[float]]]:
        members = [trials.session(n, method, values, seed=n) for n, (method, values) in enumerate(configurations)]
        found = []
        # Apart and together again: what was made ahead in between counts for nothing. Over the end of a pass.
        for _ in range(2):
            pack = trials.pack(members)
            found.append(together(pack, 4))
            pack.close()
        return found

    expected = losses()
    monkeypatch.setattr(pack_module, "ahead", lambda items, make, device: in_thread(items, make))
    assert losses() == expected
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


MIXED = [
    ("lora", SAMPLES["lora"]),
    ("adapter", {**SAMPLES["adapter"], "placement": "parallel"}),
    ("prompt", SAMPLES["prompt"]),
    ("lora", {**SAMPLES["lora"], "rank": 2, "targets": "all-linear"}),
    ("hybrid", SAMPLES["hybrid"]),
    ("adapter", {**SAMPLES["adapter"], "placement": "houlsby"}),
]


def compare(trials: Trials, configurations: Sequence[tuple[str, dict[str, Any]]], tolerance: float = 1e-4) -> None:
    """All of them in one pack, and each alone."""
    solo = [trials.session(n, method, values, seed=n) for n, (method, values) in enumerate(configurations)]
    expected = [alone(session, STEPS) for session in solo]
    members = [trials.session(n, method, values, seed=n) for n, (method, values) in enumerate(configurations)]
    pack = trials.pack(members)
    found = together(pack, STEPS)
    pack.close()
    for number, losses in enumerate(expected):
        assert found[number] == pytest.approx(losses, rel=tolerance), configurations[number]
    for mine, own in zip(members, solo, strict=True):
        assert_same(mine, own, tolerance)


@pytest.mark.parametrize(
    ("kind", "task"),
    [
        ("encoder", "classification"),
        ("encoder", "token_classification"),
        pytest.param("encoder", "question_answering", marks=pytest.mark.slow),
        pytest.param("encoder", "multiple_choice", marks=pytest.mark.slow),
        pytest.param("encoder", "similarity", marks=pytest.mark.slow),
        pytest.param("encoder", "multi_label", marks=pytest.mark.slow),
        pytest.param("encoder", "language_modeling", marks=pytest.mark.slow),
        pytest.param("decoder", "language_modeling", marks=pytest.mark.slow),
        pytest.param("decoder", "instruction", marks=pytest.mark.slow),
        pytest.param("encoder-decoder", "classification", marks=pytest.mark.slow),
        pytest.param("encoder-decoder", "summarization", marks=pytest.mark.slow),
    ],
)
def test_methods_share_a_pack_whatever_the_task(kind: str, task: str, tmp_path: Path) -> None:
    compare(Trials(planned(tmp_path, kind, task), tmp_path / "study"), MIXED)


def test_options_of_the_training_are_each_trials_own(tmp_path: Path) -> None:
    training = {
        "gradient_accumulation": 3,
        "head_learning_rate": 1e-3,
        "label_smoothing": 0.1,
        "class_weights": "balanced",
        "weight_decay": 0.2,
        "max_grad_norm": 0.05,
        "schedule": "cosine",
        "batch_size": 7,
    }
    compare(Trials(planned(tmp_path, "encoder", "classification", **training), tmp_path / "study"), MIXED[:4])


def test_activations_are_computed_twice_where_they_are_alone(tmp_path: Path) -> None:
    folders = {wanted: tmp_path / str(wanted) for wanted in (False, True)}
    kept = {}
    for wanted, folder in folders.items():
        folder.mkdir()
        plan = planned(folder, "encoder", "classification", gradient_checkpointing=wanted)
        trials = Trials(plan, folder / "study")
        pack = trials.pack([trials.session(n, *MIXED[n], seed=n) for n in range(3)])
        pack._train()
        indices = [session.order.batch(session.step) for session in pack.sessions]
        with Kept() as found:
            pack._gradients(indices, pack._parts(indices))
        pack.close()
        kept[wanted] = found.now
        compare(trials, MIXED)
    assert kept[True] < kept[False] / 1.5
    # A host is kept from pack to pack.
    host = Host(trials.base, trials.domain, None)
    model: Any = host.model
    for wanted in (True, False, True):
        host.recompute(wanted)
        assert model.is_activation_checkpointing is wanted


def test_trials_of_other_settings_are_not_packed(tmp_path: Path) -> None:
    def key(**training: Any) -> Hashable | None:
        plan = planned(tmp_path, "encoder", "classification", **training)
        trial = TrialPlan(0, next(iter(plan.models)), "d", "lora", SAMPLES["lora"], 0)
        return pack_key(plan.for_workers(tmp_path, threads=1), Segment(trial, 1))

    assert key(tokens_per_batch=256) is None
    assert len({key(), key(gradient_checkpointing=True), key(batch_size=4), key(gradient_accumulation=2)}) == 4
    assert key(weight_decay=0.2) == key()


@pytest.mark.parametrize(("quantization", "packs"), [("none", True), ("nf4", True), ("int8", False)])
def test_what_eight_bits_round_to_is_not_for_others_to_decide(quantization: str, packs: bool, tmp_path: Path) -> None:
    plan = planned(tmp_path, "encoder", "classification").for_workers(tmp_path, threads=1)
    values = {**SAMPLES["adapter"], "quantization": quantization}
    key = pack_key(plan, Segment(TrialPlan(0, next(iter(plan.models)), "d", "adapter", values, 0), 1))
    assert (key is not None) is packs


def test_a_trial_may_join_and_leave_between_steps(tmp_path: Path) -> None:
    trials = Trials(planned(tmp_path, "encoder", "classification"), tmp_path / "study")
    (first, second, third) = [trials.session(n, *MIXED[n], seed=n) for n in range(3)]
    expected = [alone(trials.session(n, *MIXED[n], seed=n), count) for n, count in enumerate((9, 7, 4))]
    found: dict[int, list[float]] = {0: alone(first, 2), 1: [], 2: []}

    def train(members: Sequence[TrialSession], steps: int) -> None:
        pack = trials.pack(members)
        for number, losses in together(pack, steps).items():
            found[number] += losses
        pack.close()

    train([first, second], 3)
    train([first, second, third], 2)
    train([third, second], 2)
    found[0] += alone(first, 2)
    for number in range(3):
        assert found[number] == pytest.approx(expected[number], rel=1e-4)


def test_a_trial_that_diverges_does_not_disturb_the_others(tmp_path: Path) -> None:
    trials = Trials(planned(tmp_path, "encoder", "classification"), tmp_path / "study")
    members = [trials.session(n, *MIXED[n], seed=n) for n in range(4)]
    solo = [trials.session(n, *MIXED[n], seed=n) for n in range(4)]
    # Every parameter of one trial is beyond all numbers.
    for parameter in members[1].parameters.values():
        parameter.data.fill_(torch.nan)
    expected = [alone(session, STEPS) for session in (solo[0], solo[2], solo[3])]
    pack = trials.pack(members)
    found = together(pack, STEPS)
    pack.close()
    assert not any(loss == loss for loss in found[1])
    assert [found[0], found[2], found[3]] == [pytest.approx(losses, rel=1e-4) for losses in expected]
    assert_same(members[0], solo[0])


def test_what_no_loss_reaches_is_left_alone(tmp_path: Path) -> None:
    """A pack decays what AdamW decays, and nothing else."""
    trials = Trials(planned(tmp_path, "encoder", "classification", weight_decay=0.5), tmp_path / "study")
    members = [trials.session(n, "lora", SAMPLES["lora"], seed=n) for n in range(2)]
    # A part of one trial's head that nothing reads.
    idle = torch.nn.Parameter(torch.ones(3, 3))
    for session in members:
        own = next(module for path, module in session.model.named_modules() if path.endswith("modules_to_save.default"))
        own.register_parameter("idle", torch.nn.Parameter(idle.detach().clone()))
        name = next(name for name, parameter in session.model.named_parameters() if name.endswith(".idle"))
        session.parameters[name] = own.get_parameter("idle")
        session.optimizer.param_groups[0]["params"].append(own.get_parameter("idle"))
    pack = trials.pack(members)
    together(pack, 3)
    pack.close()
    for session in members:
        name = next(name for name in session.parameters if name.endswith(".idle"))
        assert torch.equal(session.parameters[name], idle)
        assert session.parameters[name] not in session.optimizer.state


@pytest.mark.parametrize(("kind", "quantization"), [("encoder", "nf4"), ("decoder", "nf4")])
def test_over_a_quantised_base(kind: str, quantization: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    trials = Trials(planned(tmp_path, kind, "classification"), tmp_path / "study")
    configurations = [
        ("qlora", {**SAMPLES["qlora"], "quantization": quantization}),
        ("qlora", {**SAMPLES["qlora"], "quantization": quantization, "rank": 7}),
        ("adapter", {**SAMPLES["adapter"], "quantization": quantization, "placement": "houlsby"}),
    ]
    solo = [trials.session(n, method, values, seed=n) for n, (method, values) in enumerate(configurations)]
    expected = [alone(session, STEPS) for session in solo]
    members = [trials.session(n, method, values, seed=n) for n, (method, values) in enumerate(configurations)]
    pack = trials.pack(members, quantization)
    found = together(pack, STEPS)
    pack.close()
    for number, losses in enumerate(expected):
        # What bitsandbytes rounds to in bf16 depends on the sizes of the products.
        assert found[number] == pytest.approx(losses, rel=2e-2)


@pytest.mark.parametrize("method", ["ia3", "bitfit", "prefix", "p_tuning", "full"])
def test_other_methods_say_that_they_are_not_packed(method: str, tmp_path: Path) -> None:
    assert not METHODS[method].packs(SAMPLES[method])
    trials = Trials(planned(tmp_path, "encoder", "classification"), tmp_path / "study")
    session = trials.session(0, method, SAMPLES[method])
    before = weights_of(session)
    with pytest.raises(NotPackableError):
        trials.pack([trials.session(1, "lora", SAMPLES["lora"]), session])
    assert all(torch.equal(before[name], parameter) for name, parameter in session.parameters.items())


def test_soft_tokens_of_a_model_without_a_head_are_trained_alone(tmp_path: Path) -> None:
    """PEFT's own serve there, which a pack does not know."""

    def key(options: dict[str, Any], method: str) -> Hashable | None:
        folder = tmp_path / ("separate" if options else "joint")
        folder.mkdir(exist_ok=True)
        plan = planned(folder, "encoder", "similarity", options=options)
        trial = TrialPlan(0, next(iter(plan.models)), "d", method, SAMPLES[method], 0)
        return pack_key(plan.for_workers(folder, threads=1), Segment(trial, 1))

    separate = {"encoding": "separate", "range": [0, 5]}
    assert key(separate, "prompt") is None
    assert key(separate, "lora") is not None
    assert key({}, "prompt") is not None


def test_trials_of_two_domains_are_not_packed(tmp_path: Path) -> None:
    """Their labels, and so their heads, may have the same shapes."""
    plan = planned(tmp_path, "encoder", "classification")
    trials = Trials(plan, tmp_path / "study")
    handed = trials.worker.plan
    trials.worker.plan = replace(
        handed,
        domains={**handed.domains, (trials.model, "e"): handed.domains[trials.model, "d"]},
        budgets={**handed.budgets, ("e", "lora"): handed.budgets["d", "lora"]},
    )
    other = TrialPlan(1, trials.model, "e", "lora", SAMPLES["lora"], 1)
    sessions = [trials.session(0, "lora", SAMPLES["lora"]), trials.worker.new_session(Segment(other, 1))]
    with pytest.raises(NotPackableError, match="several domains"):
        trials.pack(sessions)


def test_a_model_that_mixes_up_its_batch_is_found_out(tmp_path: Path) -> None:
    trials = Trials(planned(tmp_path, "encoder", "classification"), tmp_path / "study")
    host = Host(trials.base, trials.domain, None)

    def pack() -> Pack:
        return Pack([trials.session(n, *MIXED[n], seed=n) for n in range(len(MIXED))], host)

    sound = pack()
    sound.check()
    found = together(sound, STEPS)
    sound.close()
    untouched = pack()
    assert together(untouched, STEPS) == found
    untouched.close()
    # As of a model that works on its tokens one after another, for all texts at once.
    layer = next(module for name, module in host.model.named_modules() if name.endswith("encoder.layer.0"))
    layer.register_forward_hook(lambda module, args, output: output.roll(1, 0))
    mixed = pack()
    with pytest.raises(NotPackableError, match="gradients of trial"):
        mixed.check()
    mixed.close()


@pytest.mark.parametrize(
    ("difference", "size", "sound"),
    [(0.04, 1.0, True), (0.06, 1.0, False), (2e-7, 1e-6, True), (0.0, 0.0, True), (1e-6, 0.0, True), (1.0, 0.0, False)],
)
def test_trials_that_are_sure_of_their_examples_are_not_refused_for_rounding(
    difference: float, size: float, sound: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = Trials(planned(tmp_path, "encoder", "classification"), tmp_path / "study")
    pack = trials.pack([trials.session(n, *MIXED[n], seed=n) for n in range(2)])
    monkeypatch.setattr(pack.banks, "difference", lambda row, loss: (difference, size))
    with nullcontext() if sound else pytest.raises(NotPackableError, match="gradients of trial"):
        pack.check()
    pack.close()


def test_half_precision_weights_have_their_masters_in_a_pack_too(tmp_path: Path) -> None:
    """A head in bf16 would lose most steps: what AdamW steps on is float32, alone and in a pack."""
    plan = planned(tmp_path, "decoder", "classification")
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": "bfloat16"}))
    trials = Trials(plan, tmp_path / "study")
    configurations = MIXED[:2]
    solo = [trials.session(n, method, values, seed=n) for n, (method, values) in enumerate(configurations)]
    assert all(session.masters for session in solo)
    expected = [alone(session, STEPS) for session in solo]
    members = [trials.session(n, method, values, seed=n) for n, (method, values) in enumerate(configurations)]
    pack = trials.pack(members)
    found = together(pack, STEPS)
    pack.close()
    for number, losses in enumerate(expected):
        assert found[number] == pytest.approx(losses, rel=3e-2)
    for mine, own in zip(members, solo, strict=True):
        for name, master in own.masters.items():
            torch.testing.assert_close(mine.masters[name], master, rtol=0.1, atol=5e-3)
            assert torch.equal(mine.parameters[name].detach(), mine.masters[name].detach().to(torch.bfloat16))
