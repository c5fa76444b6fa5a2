"""What one worker of a group does by itself may take longer than a collective may wait."""

from __future__ import annotations

from pathlib import Path

import pytest
from forks import programs

# Rank, number of workers, the store's file, and whether rank 0 fails.
SCRIPT = """
import sys, time
from datetime import timedelta
import torch
from torch import distributed as c10d
from peftsearch.training import distributed

rank, size, file, fails = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4] == "fails"
distributed._NOTICE_SECONDS = 0.2
store, patience = c10d.FileStore(file, size), timedelta(seconds=4)
c10d.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=patience)
group = distributed.WorkerGroup(rank, size)

def work(goes_on):
    assert rank == 0
    for _ in range(80):
        time.sleep(0.1)
        goes_on()
    if fails:
        raise ValueError("a damaged file")

try:
    group.first_alone(work)
except ValueError as error:
    print(error)
print(group.gather(rank))
c10d.barrier()
c10d.destroy_process_group()
"""


@pytest.mark.parametrize("how", ["ends", "fails"])
def test_the_others_wait_for_the_first_one_however_long_it_takes(how: str, tmp_path: Path) -> None:
    program = tmp_path / "worker.py"
    program.write_text(SCRIPT)
    processes = programs(program, [(rank, 2, tmp_path / "store", how) for rank in range(2)], 300)
    said = [process.stdout for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert all("[0, 1]" in text for text in said)
    assert ["a damaged file" in text for text in said] == [how == "fails", False]
