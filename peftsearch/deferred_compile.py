"""PEFT without torch's compiler.

PEFT imports bitsandbytes, which decorates functions with `torch.compile`, and that alone loads the compiler: 2 s of CPU
time and 40 MB in every process, whether it ever compiles anything or not (bitsandbytes 0.50,
https://github.com/bitsandbytes-foundation/bitsandbytes/blob/0.50.0/bitsandbytes/backends/default/ops.py).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def deferred_compile() -> Iterator[None]:
    """Within, what `torch.compile` gets is compiled when it is first called, and not at once."""
    import torch

    compile_now = torch.compile

    def compile_later(model: Any = None, **options: Any) -> Any:
        if model is None:
            return functools.partial(compile_later, **options)
        if isinstance(model, torch.nn.Module):
            return compile_now(model, **options)
        compiled: Callable[..., Any] | None = None

        @functools.wraps(model)
        def call(*arguments: Any, **keywords: Any) -> Any:
            nonlocal compiled
            if compiled is None:
                compiled = compile_now(model, **options)
            return compiled(*arguments, **keywords)

        return call

    torch.compile = compile_later
    try:
        yield
    finally:
        torch.compile = compile_now


def import_bitsandbytes(_: object = None) -> None:
    """Import it so, where it is; what keeps it from being imported is for those to say who need it."""
    with contextlib.suppress(Exception), deferred_compile():
        import bitsandbytes  # noqa: F401
