"""What a worker uses of its machine."""

from __future__ import annotations

import os
import time

import psutil
import pytest
import torch

from peftsearch.training.usage import UsageMeter


def test_a_busy_process_has_its_share_of_the_processors() -> None:
    meter, cpu = UsageMeter(), torch.device("cpu")
    process = psutil.Process()
    until = sum(process.cpu_times()[:2]) + 0.3
    while sum(process.cpu_times()[:2]) < until:
        sum(range(10_000))
    busy = meter.read(cpu)
    assert 0 < busy["cpu_utilization_percentage"] <= 100
    # Trials that are trained together ask one after the other.
    assert meter.read(cpu)["cpu_utilization_percentage"] == busy["cpu_utilization_percentage"]
    time.sleep(0.5)
    assert meter.read(cpu)["cpu_utilization_percentage"] < busy["cpu_utilization_percentage"]


def test_memory_is_in_megabytes() -> None:
    found = UsageMeter().read(torch.device("cpu"))
    assert found["process_memory_usage_megabytes"] == pytest.approx(psutil.Process().memory_info().rss / 1e6, rel=0.2)
    assert found["system_memory_usage_megabytes"] <= psutil.virtual_memory().total / 1e6
    assert not [name for name in found if name.startswith("gpu")]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpus_memory_is_read() -> None:
    device = torch.device("cuda", 0)
    held = torch.zeros(100_000_000, dtype=torch.uint8, device=device)
    found = UsageMeter().read(device)
    assert found["gpu_0_memory_usage_megabytes"] >= held.numel() / 1e6
    assert 0 < found["gpu_0_memory_usage_percentage"] <= 100


def test_a_fork_reads_what_it_uses_itself() -> None:
    meter, cpu = UsageMeter(), torch.device("cpu")
    receiving, sending = os.pipe()
    pid = os.fork()
    if pid == 0:
        before = meter.read(cpu)["process_memory_usage_megabytes"]
        filled = bytearray(b"x") * 200_000_000
        grown = meter.read(cpu)["process_memory_usage_megabytes"] - before
        os.write(sending, f"{grown}".encode())
        os._exit(len(filled) == 0)
    os.close(sending)
    with os.fdopen(receiving) as file:
        assert float(file.read()) > 150
    assert os.waitpid(pid, 0)[1] == 0
