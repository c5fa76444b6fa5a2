"""How the workers of one slot find each other: on the address that Ray has on their node, and on no other.

Ray Train has torch open a store for this, which listens on every address of the machine, answers everybody, and stays
open for the whole study; gloo listens where the machine's name points to. Here both keep to the address that Ray itself
listens on (loopback, where the cluster is a study's own), and a slot of one worker opens nothing.
"""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import Any

import psutil
import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _TorchBackend
from torch import distributed
from torch.distributed import TCPStore  # type: ignore[attr-defined]

_stores: list[TCPStore] = []
"""Keeps the store of this worker's group open for as long as the worker lives."""


class SlotTorchConfig(TorchConfig):  # type: ignore[misc]
    """Ray Train's configuration of torch, with the process group as this module makes it."""

    @property
    def backend_cls(self) -> type[Any]:
        return _SlotBackend


class _SlotBackend(_TorchBackend):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        size = len(worker_group)
        worker_group.execute(_set_torch_distributed_env_vars)
        if size == 1:
            return
        resources = worker_group.get_resources_per_worker()
        backend = backend_config.backend or ("nccl" if resources.get("GPU", 0) else "gloo")
        address, port = worker_group.execute_single(0, _open_store, size, backend_config.timeout_s)
        ray.get(
            [
                worker_group.execute_single_async(
                    rank, _join, backend, rank, size, address, port, backend_config.timeout_s
                )
                for rank in range(size)
            ]
        )


def _open_store(size: int, seconds: float) -> tuple[str, int]:
    """On rank 0: open the store through which the workers find each other; returns its address and port."""
    address = ray.util.get_node_ip_address()
    # Bound here: torch itself has no say in the address.
    listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    listener.bind((address, 0))
    port = int(listener.getsockname()[1])
    _stores[:] = [
        TCPStore(
            address,
            port,
            size,
            is_master=True,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
    ]
    return address, port


def _join(backend: str, rank: int, size: int, address: str, port: int, seconds: float) -> None:
    """On every worker: become part of the group."""
    timeout = timedelta(seconds=seconds)
    if rank > 0:
        _stores[:] = [TCPStore(address, port, size, is_master=False, timeout=timeout)]
    own = ray.util.get_node_ip_address()
    interface = _interface(own)
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        if own in ("127.0.0.1", "::1"):
            # NCCL never takes loopback by itself. Between machines it knows better than Ray what network is fast.
            os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
    distributed.init_process_group(backend, store=_stores[0], rank=rank, world_size=size, timeout=timeout)


def _interface(address: str) -> str | None:
    for name, addresses in psutil.net_if_addrs().items():
        if any(item.address.partition("%")[0] == address for item in addresses):
            return name
    return None
