"""The process that forks: see `forks`. Its argument is the Unix socket's path; it ends with its standard input."""

from __future__ import annotations

import array
import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import threading
import traceback
from pathlib import Path
from typing import IO, Any, NoReturn

# With the tests' own folder, in which the warden is.
sys.path.insert(0, str(Path(__file__).parent / "faults"))

# What `peftsearch run` imports on its way, and, lazily, the libraries below it.
MODULES = (
    "peftsearch.__main__",
    "peftsearch.cli.app",
    "peftsearch.running",
    "peftsearch.driver",
    "peftsearch.study_mlflow",
    "peftsearch.search.tune",
    "peftsearch.training.worker",
    "peftsearch.export",
    "ray.train.torch",
    "ray.tune",
    "ray.air.integrations.mlflow",
    "mlflow",
    "peft",
    "sklearn.linear_model",
    "transformers.models.bert.modeling_bert",
    "transformers.models.auto.modeling_auto",
    "transformers.generation",
    "torch.distributed.fsdp",
    "plotly.graph_objects",
    "matplotlib.pyplot",
)


def serve(address: str) -> dict[str, Any]:
    """Fork at each order, and tell of each fork's end; returns, in a fork, what it is to do."""
    # What a driver says to libraries before it imports them.
    from peftsearch.cli import quiet_libraries
    from peftsearch.workers import quiet_ray_environment

    before = dict(os.environ)
    quiet_libraries()
    quiet_ray_environment()
    for module in MODULES:
        importlib.import_module(module)
    # Forks need not look at these for garbage, nor copy the pages that they are on.
    gc.freeze()
    own = {name: value for name, value in os.environ.items() if before.get(name) != value}
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(address)
    listening.listen()
    print("ready", flush=True)
    links: dict[int, socket.socket] = {}
    chosen = selectors.DefaultSelector()
    for file in (listening, sys.stdin):
        chosen.register(file, selectors.EVENT_READ)
    while True:
        for key, _ in chosen.select(0.05):
            if key.fileobj is not listening:
                os._exit(0)
            link, _ = listening.accept()
            first, ancillary, *_ = link.recvmsg(1, socket.CMSG_SPACE(8))
            files = array.array("i", ancillary[0][2])
            data = first
            while not data.endswith(b"\n"):
                data += link.recv(65536)
            order = json.loads(data)
            pid = os.fork()
            if pid == 0:
                listening.close()
                link.close()
                for other in links.values():
                    other.close()
                nothing = os.open(os.devnull, os.O_RDONLY)
                for number, file in enumerate((nothing, *files)):
                    os.dup2(file, number)
                return {**order, "environment": {**own, **order["environment"]}}
            for file in files:
                os.close(file)
            links[pid] = link
            link.sendall(f"{pid:12d}".encode())
        while links:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            with links.pop(pid) as link:
                try:
                    link.sendall(f"{os.waitstatus_to_exitcode(status):12d}".encode())
                except OSError:  # nobody waits for it any more
                    continue


def run(order: dict[str, Any]) -> None:
    """Be the command line, the warden above it, or a program."""
    os.environ.clear()
    os.environ.update(order["environment"])
    os.chdir(order["cwd"])
    if order["warden"]:
        import warden

        if not warden.watch(*order["warden"]):
            os._exit(0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # As an interpreter makes them at its start.
    for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        file: IO[str] = os.fdopen(number, mode, 1 if name == "stderr" or os.isatty(number) else -1, closefd=False)
        setattr(sys, name, file)
        setattr(sys, f"__{name}__", file)
    if order["program"] is not None:
        sys.argv = [order["program"], *order["arguments"]]
        sys.path[:] = order["path"]
        runpy.run_path(order["program"], run_name="__main__")
        return
    import peftsearch.__main__
    from peftsearch.cli import main

    sys.argv = [str(peftsearch.__main__.__file__), *order["arguments"]]
    main()


def leave(status: int) -> NoReturn:
    """End as an interpreter does, but for taking a hundred thousand objects of the libraries apart."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


if __name__ == "__main__":
    order = serve(sys.argv[1])
    status = 1
    try:
        run(order)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    leave(status)
