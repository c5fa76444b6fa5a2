"""Faults at random, for some minutes.

``PEFTSEARCH_CHAOS_SEED`` (0) and ``PEFTSEARCH_CHAOS_MINUTES`` (2) choose which, and for how long. Studies are run one
after another until the time is up; each must end as the one to which nothing happened.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from agreement import Undisturbed, assert_ended_trials_are_kept, assert_undisturbed
from injections import RAY_PARTS, Driver
from mlflow_proxy import Proxy
from table import Row
from tracking_study import Server

from peftsearch.spec import TrialRecord
from peftsearch.study import Study

pytestmark = [pytest.mark.slow, pytest.mark.ray]
SEED = int(os.environ.get("PEFTSEARCH_CHAOS_SEED", "0"))
MINUTES = float(os.environ.get("PEFTSEARCH_CHAOS_MINUTES", "2"))


class Chaos:
    """One study after another, and what is done to them.

    Args:
        start: Starts (or continues) a study by its name.
        proxy: In front of MLflow's server.
        server: MLflow's server.
        storage: Of the studies.
        chance: Decides.
    """

    def __init__(
        self, start: Callable[[str], Driver], proxy: Proxy, server: Server, storage: Path, chance: random.Random
    ) -> None:
        self.start, self.proxy, self.server, self.storage, self.chance = start, proxy, server, storage, chance
        self.faults: Counter[str] = Counter()
        self.log: list[str] = []
        self.seconds: list[float] = []
        self.began = time.monotonic()
        self._study = 0
        self._dead: list[Driver] = []
        self.driver = start(self.name)

    @property
    def name(self) -> str:
        """The present study's name."""
        return f"chaos-{SEED}-{self._study}"

    def records(self) -> list[TrialRecord]:
        """The present study's ledger."""
        ledger = self.storage / "studies" / self.name / "ledger.db"
        return Study.open(self.name, self.storage).trials() if ledger.exists() else []

    def inject(self) -> None:
        """One fault, at a random moment; returns when the study has gone on, or has ended."""
        kinds: dict[str, Callable[[], bool]] = {
            "driver killed": self.driver_killed,
            **{fault: functools.partial(self.killed, *titles) for fault, titles in RAY_PARTS.items()},
            "MLflow fails": self.mlflow_fails,
            "MLflow restarted": self.mlflow_restarted,
            "Ctrl-C": self.interrupted,
            "checkpoint damaged": self.checkpoint_damaged,
            "ledger locked": self.ledger_locked,
        }
        # MLflow fails in four ways.
        fault = self.chance.choice([*kinds, "MLflow fails"])
        moment = self.chance.choice(["warming up", "training", "training"])
        pause = self.chance.uniform(0.0, 8.0 if moment == "warming up" else 0.5)
        if moment == "training":
            self.driver.wait_progress(1)
        time.sleep(pause)
        if not self.driver.running:
            return
        before, began = self.driver.evaluations(), time.monotonic()
        self.log.append(f"{began - self.began:6.1f} s, {before} evaluations: {fault} ({moment})")
        ended = self.records()
        if kinds[fault]():
            self.faults[fault] += 1
        else:
            self.log.append("         there was nothing to do it to")
        assert_ended_trials_are_kept(ended, self.records())
        if self.driver.reach(before + 1):
            self.seconds.append(time.monotonic() - began)

    def settle(self, undisturbed: Undisturbed) -> None:
        """The study has ended: it must be as if nothing had happened to it. Another one begins."""
        assert self.driver.wait() == 0, self.driver.output[-3000:]
        self.proxy.mode = "pass"
        self.proxy.listen()
        left = [line for driver in [*self._dead, self.driver] for line in driver.leftovers()]
        assert left == []
        if "peftsearch sync" in self.driver.output:
            Study.open(self.name, self.storage).sync()
            self.log.append("synced")
        assert_undisturbed(Study.open(self.name, self.storage), undisturbed, self.proxy.uri)
        self.log.append(f"{time.monotonic() - self.began:6.1f} s: {self.name} ended as it should")
        self._dead = []
        self._study += 1

    def next_study(self) -> None:
        """Begin another one."""
        self.driver = self.start(self.name)

    # --- faults; each returns whether it was done ---

    def driver_killed(self) -> bool:
        self.driver.signal(signal.SIGKILL)
        self._continue()
        return True

    def killed(self, *titles: str) -> bool:
        return self.driver.kill(*titles) > 0

    def mlflow_fails(self) -> bool:
        way = self.chance.choice(["error", "lost", "hang", "refuse"])
        pause = self.chance.uniform(0.5, 4.0)
        self.log.append(f"         MLflow: {way} for {pause:.1f} s")
        if way == "refuse":
            self.proxy.refuse()
        else:
            self.proxy.mode = way  # type: ignore[assignment]
        time.sleep(pause)
        self.proxy.mode = "pass"
        self.proxy.listen()
        return True

    def mlflow_restarted(self) -> bool:
        self.server.kill()
        self.server.start()
        return True

    def interrupted(self) -> bool:
        self.driver.interrupt()
        if self.chance.random() < 0.5:
            time.sleep(self.chance.uniform(0.0, 2.0))
            self.driver.interrupt()
        assert self.driver.wait(180) in (0, 130, -signal.SIGINT), self.driver.output[-3000:]
        self._continue()
        return True

    def checkpoint_damaged(self) -> bool:
        self.driver.signal(signal.SIGKILL)
        self.driver.wait()
        self.driver.leftovers()
        files = sorted((self.storage / "studies" / self.name / "trials").glob("*/*state*.safetensors"))
        if files:
            file = self.chance.choice(files)
            content = bytearray(file.read_bytes())
            place = self.chance.randrange(len(content))
            if self.chance.random() < 0.5:
                content = content[:place]
            else:
                content[place] ^= 1 << self.chance.randrange(8)
            file.write_bytes(content)
            self.log.append(f"         {file.parent.name}/{file.name} damaged at byte {place}")
        self._continue()
        return bool(files)

    def ledger_locked(self) -> bool:
        file = self.storage / "studies" / self.name / "ledger.db"
        if not file.exists():
            return False
        with contextlib.closing(sqlite3.connect(file, timeout=30, isolation_level=None)) as connection:
            connection.execute("BEGIN EXCLUSIVE")
            time.sleep(self.chance.uniform(1.0, 4.0))
            connection.execute("ROLLBACK")
        return True

    def _continue(self) -> None:
        self.driver.wait()
        self._dead.append(self.driver)
        self.driver = self.start(self.name)


@pytest.mark.timeout(1800 + 60 * MINUTES)
def test_chaos(
    undisturbed: Undisturbed,
    drive: Callable[..., Driver],
    tmp_path: Path,
    proxy: Proxy,
    mlflow_server: Server,
    note: Callable[[Row], None],
) -> None:
    chance = random.Random(SEED)
    options = ("--set", f"tracking.mlflow={proxy.uri}")
    chaos = Chaos(
        lambda name: drive(undisturbed.file, tmp_path, name, *options), proxy, mlflow_server, tmp_path, chance
    )
    studies = 0
    try:
        while True:
            over = time.monotonic() > chaos.began + 60 * MINUTES
            if chaos.driver.running and not over:
                chaos.inject()
                continue
            chaos.settle(undisturbed)
            studies += 1
            if over:
                break
            chaos.next_study()
    finally:
        print("\n".join(chaos.log))
    faults = ", ".join(f"{kind} {count} times" for kind, count in chaos.faults.most_common())
    note(
        Row(
            "chaos",
            f"at random (seed {SEED}) for {MINUTES:g} minutes: {faults}",
            f"{studies} studies ended as the one to which nothing happened",
            0,
            0,
            tuple(chaos.seconds),
        )
    )
