"""In a pack every trial drops as it would alone: at its own rates, by its own masks, with losses as spread as alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_packing import Trials, planned
from tiny_models import SAMPLES

from peftsearch.training.packing import Pack
from peftsearch.training.session import TrialSession

DRAWS = 200

LORA = {**SAMPLES["lora"], "learning_rate": 3e-2}
ADAPTER = {**SAMPLES["adapter"], "learning_rate": 3e-2}
MEMBERS: list[tuple[str, dict[str, Any]]] = [
    ("lora", {**LORA, "dropout": 0.0}),
    ("lora", {**LORA, "dropout": 0.5}),
    ("adapter", {**ADAPTER, "dropout": 0.0}),
    ("adapter", {**ADAPTER, "dropout": 0.5}),
]


def losses_alone(session: TrialSession) -> torch.Tensor:
    """Of its next batch, with many draws of its masks."""
    task, domain = session.domain.task, session.domain
    rows = session.order.batch(session.step)
    batch = task.collate(domain.split("train")[rows], domain.pad_token_id)
    session.model.train()
    found = []
    with torch.no_grad():
        for draw in range(DRAWS):
            torch.manual_seed(draw)
            output = session.model(**{name: value for name, value in batch.items() if name not in task.hidden})
            found.append(task.losses(output, batch, session.loss_options).mean())
    return torch.stack(found).double()


def what_runs(pack: Pack) -> list[Any]:
    """The base, and of each trial the modules of its own: a head each at least."""
    heads = [module for own in pack.host.own.values() for module in own._modules_of]
    assert len(heads) >= len(pack.sessions)
    return [pack.host.model, *heads]


def test_gradients_are_compared_without_dropout(tmp_path: Path) -> None:
    """A pack is checked against each member's own model, which draws other masks."""
    trials = Trials(planned(tmp_path, "encoder", "classification"), tmp_path / "out")
    pack = trials.pack([trials.session(number, *member, seed=number) for number, member in enumerate(MEMBERS)])
    pack.check()
    # In training they drop all the same.
    rates = [session.plan.hyperparameters["dropout"] for session in pack.sessions]
    pack.step()
    indices = [session.order.batch(session.step) for session in pack.sessions]
    first, second = (pack._gradients(indices, pack._parts(indices)) for _ in range(2))
    pack.close()
    assert [mine != own for mine, own in zip(first.tolist(), second.tolist(), strict=True)] == [r > 0 for r in rates]


@pytest.mark.parametrize("kind", ["encoder", "deep-headed encoder", "encoder-decoder"])
def test_who_joins_a_trial_that_has_stepped_is_compared_without_dropout_too(kind: str, tmp_path: Path) -> None:
    """Training leaves a trial's head in training mode, and some heads (RoBERTa's, T5's) drop inside."""
    plan = planned(tmp_path, kind, "classification")
    config = tmp_path / "model" / "config.json"
    written = json.loads(config.read_text())
    config.write_text(json.dumps({k: 0.5 if "dropout" in k else v for k, v in written.items()}))
    trials = Trials(plan, tmp_path / "out")
    first, second = (trials.session(number, "lora", LORA, seed=number) for number in range(2))
    first._train(2)
    pack = trials.pack([first, second])
    pack.check()
    pack.step()
    assert all(module.training for running in what_runs(pack) for module in running.modules())
    pack.close()


@pytest.mark.parametrize("checked", [True, False])
def test_heads_drop_in_a_pack_from_its_first_step_on(checked: bool, tmp_path: Path) -> None:
    """A freshly built trial says of itself that it is in training mode, and its head is not."""
    trials = Trials(planned(tmp_path, "deep-headed encoder", "classification"), tmp_path / "out")
    members = [trials.session(number, "lora", LORA, seed=number) for number in range(2)]
    assert any(not module.training for session in members for module in session.model.modules())
    pack = trials.pack(members)
    if checked:
        pack.check()
    pack.step()
    assert all(module.training for running in what_runs(pack) for module in running.modules())
    pack.close()


@pytest.mark.parametrize("of_base", [0.0, 0.1], ids=["the trials' own", "the base's too"])
def test_losses_of_packed_trials_are_spread_as_those_alone(of_base: float, tmp_path: Path) -> None:
    plan = planned(tmp_path, "encoder", "classification")
    config = tmp_path / "model" / "config.json"
    written = json.loads(config.read_text())
    config.write_text(json.dumps({k: of_base if k.endswith("dropout_prob") else v for k, v in written.items()}))
    trials = Trials(plan, tmp_path / "out")
    sessions = [trials.session(number, *member, seed=number) for number, member in enumerate(MEMBERS)]
    for session in sessions:
        # Adapters begin as no change at all, whatever they drop.
        session._train(5)
    alone = [losses_alone(session) for session in sessions]

    pack = trials.pack(sessions)
    pack._train()
    indices = [session.order.batch(session.step) for session in pack.sessions]
    packed: dict[int, list[float]] = {session.plan.number: [] for session in sessions}
    parts = pack._parts(indices)
    for draw in range(DRAWS):
        torch.manual_seed(draw)
        for session, loss in zip(pack.sessions, pack._gradients(indices, parts).tolist(), strict=True):
            packed[session.plan.number].append(loss)
    pack.close()
    together = [torch.tensor(packed[number], dtype=torch.float64) for number in range(len(MEMBERS))]

    for (_, values), own, found in zip(MEMBERS, alone, together, strict=True):
        if values["dropout"] == 0.0 and of_base == 0.0:
            assert found.std() < 1e-6
            assert found.mean().item() == pytest.approx(own.mean().item(), rel=1e-4)
            continue
        error = ((own.var() + found.var()) / DRAWS).sqrt()
        assert own.std() > 1e-4
        assert abs(found.mean() - own.mean()) < 4 * error
        assert 0.75 < found.std() / own.std() < 1.33
    varying = torch.stack([found for found in together if found.std() > 1e-6])
    correlation = torch.corrcoef(varying) - torch.eye(len(varying))
    assert correlation.abs().max() < 4 / DRAWS**0.5
