"""What the signals do that ask a study to stop; without a study, so that it is seen in seconds."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from injections import WARDEN, Terminal

from peftsearch.stopping import TWICE_SECONDS

SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from peftsearch.stopping import StopRequest, stop_on_signals

def note(text):
    with open(sys.argv[1], "a") as file:
        file.write(text + chr(10))

request = StopRequest()
try:
    with stop_on_signals(request, lambda: note("told")):
        PREPARATION
        note("ready")
        while not request():
            time.sleep(0.01)
        for _ in range(100):
            print("x" * 1000, flush=True)
        print("y", file=sys.stderr, flush=True)
        note("stopping")
        MEANWHILE
        time.sleep(SECONDS)
    note("stopped")
except KeyboardInterrupt:
    note("at once")
"""


def script(preparation: str = "pass", seconds: float = 0.0, meanwhile: str = "pass") -> list[str]:
    code = SCRIPT.replace("PREPARATION", preparation).replace("MEANWHILE", meanwhile)
    return [sys.executable, "-c", code.replace("SECONDS", str(seconds))]


def wait_for(notes: Path, text: str, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not (notes.exists() and text in notes.read_text().splitlines()):
        assert time.monotonic() < deadline, notes.read_text() if notes.exists() else "nothing noted"
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_asks_and_the_second_interrupts(number: signal.Signals, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    process = subprocess.Popen([*script(seconds=300), str(notes)], stdout=subprocess.DEVNULL)
    wait_for(notes, "ready")
    process.send_signal(number)
    wait_for(notes, "stopping")
    if number == signal.SIGTERM:
        time.sleep(TWICE_SECONDS)
    process.send_signal(number)
    assert process.wait(60) == 0
    assert notes.read_text().split("\n") == ["ready", "told", "stopping", "at once", ""]


def test_one_wish_of_timeout_is_heard_once(tmp_path: Path) -> None:
    """It signals its command and then the group that it is in; a scheduler may do so a moment apart."""
    notes = tmp_path / "notes"
    again = "os.kill(os.getpid(), signal.SIGTERM)"
    process = subprocess.Popen([*script(again, meanwhile=again), str(notes)], stdout=subprocess.DEVNULL)
    assert process.wait(60) == 0
    assert notes.read_text().split() == ["told", "ready", "stopping", "stopped"]


def test_a_lost_terminal_asks_to_stop_and_breaks_no_output(tmp_path: Path) -> None:
    notes, terminal = tmp_path / "notes", Terminal()
    log = tmp_path / "log"
    arguments = [sys.executable, "-S", "-E", str(WARDEN), str(log), terminal.path, *script(), str(notes)]
    warden = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    wait_for(notes, "ready")
    terminal.lose()
    said, _ = warden.communicate(timeout=60)
    assert said.splitlines()[-1] == "ended 0"
    assert notes.read_text().split() == ["ready", "told", "stopping", "stopped"]


def test_nohup_is_respected(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    process = subprocess.Popen(
        [*script(), str(notes)],
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    wait_for(notes, "ready")
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert notes.read_text().split() == ["ready"]
    process.terminate()
    assert process.wait(60) == 0


@pytest.mark.ray
def test_sigterm_asks_to_stop_though_ray_takes_it_for_itself(tmp_path: Path) -> None:
    """After a plain `ray.init` the process dies of it (if it did not, this test would be pointless)."""
    ours = "from peftsearch.driver import ray_cluster; cluster = ray_cluster(None); cluster.__enter__()"
    plain = "import ray; ray.init(address='local', include_dashboard=False)"
    outcomes = []
    for preparation in (ours, plain):
        notes = tmp_path / f"notes-{len(outcomes)}"
        with (tmp_path / "log").open("wb") as log:
            process = subprocess.Popen([*script(preparation), str(notes)], stdout=subprocess.DEVNULL, stderr=log)
        try:
            wait_for(notes, "ready")
            process.terminate()
            process.wait(120)
        finally:
            process.kill()
        outcomes.append(notes.read_text().split())
    assert outcomes == [["ready", "told", "stopping", "stopped"], ["ready"]]
