"""A stand-in for a GPU: what is trained there, without one.

Its tensors say that they are on ``cuda:0``, and hold their numbers in a tensor of the CPU, which computes. What a GPU
would refuse is refused: an operation on tensors of both, and numpy. What would make the host wait for it is counted.
So code that has a path of its own for GPUs runs here to its end, with numbers to compare. It says nothing of kernels,
of memory, of speed, or of what happens at the same time.

A process that has used it must end by `os._exit`: torch's backward thread of the device outlives the interpreter.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda", 0)
COMPILER = shutil.which("g++")

_aten = torch.ops.aten
_COPIES = (_aten._to_copy.default, _aten.copy_.default)
_READS = (
    *(_aten._local_scalar_dense.default, _aten.equal.default, _aten.nonzero.default, _aten.masked_select.default),
    *(_aten._unique2.default, _aten.unique_dim.default, _aten.bincount.default, _aten.repeat_interleave.Tensor),
)
_INDEXED = (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._index_put_impl_.default)
_BYTES = 64 * 2**30


class Waits:
    """How often the host would have waited for the GPU: numbers read from it, and copies that are not in the
    background, as those from memory that is not pinned."""

    def __init__(self) -> None:
        self.count = 0


class OnGpu(torch.Tensor):
    """A tensor on the stand-in."""

    held: torch.Tensor
    """Its numbers."""
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> OnGpu:
        made: OnGpu = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=GPU,
        )
        made.held = held
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnGpu({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


def held(value: Any) -> torch.Tensor | None:
    """The numbers of what is on the stand-in (a parameter, too); None for anything else."""
    return value.__dict__.get("held") if isinstance(value, torch.Tensor) else None


_waits = Waits()


def _compute(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
    there = [tensor for tensor in tensors if held(tensor) is not None]
    kwargs = {name: value for name, value in kwargs.items() if name != "pin_memory"}
    if func is _aten._pin_memory.default:
        if there:
            raise RuntimeError("cannot pin a tensor of the GPU: only dense CPU tensors can be pinned")
        pinned = args[0].clone()
        pinned.pinned = True
        return pinned
    to_gpu = bool(there)
    if kwargs.get("device") is not None:
        to_gpu = torch.device(kwargs["device"]).type == "cuda"
        kwargs["device"] = torch.device("cpu") if to_gpu else kwargs["device"]
    if func is _aten.copy_.default:
        to_gpu = held(args[0]) is not None
    elif there and func not in _COPIES:
        # Places to look at may be on the CPU.
        for tensor in tree_leaves((args[0], args[2:])) if func in _INDEXED else tensors:
            if isinstance(tensor, torch.Tensor) and held(tensor) is None and tensor.dim() > 0:
                raise RuntimeError(
                    f"{func}: a tensor of shape {list(tensor.shape)} is on {tensor.device}, not on {GPU}"
                )
    _waits.count += _waited(func, args, kwargs, there, to_gpu)
    plain, plain_kwargs = tree_map(lambda value: value if held(value) is None else held(value), (args, kwargs))
    made = func(*plain, **plain_kwargs)
    if func is _aten._to_copy.default and made is plain[0]:
        made = made.clone()
    if not to_gpu:
        return made
    same = {id(held(tensor)): tensor for tensor in there}
    return tree_map(lambda value: _on_gpu(value, same) if isinstance(value, torch.Tensor) else value, made)


def _on_gpu(made: torch.Tensor, same: Mapping[int, torch.Tensor]) -> torch.Tensor:
    known = same.get(id(made))
    if known is None:
        return OnGpu(made)
    assert known.shape == made.shape, "an operation in place has changed the shape"
    return known


def _waited(func: Any, args: Any, kwargs: Any, there: Any, to_gpu: bool) -> bool:
    if func in _COPIES:
        source = args[1] if func is _aten.copy_.default else args[0]
        if (held(source) is not None) == to_gpu or source.numel() == 0:
            return False
        background = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        return not (background and (held(source) is not None or source.__dict__.get("pinned")))
    if not there:
        return False
    if func in _INDEXED:
        # A mask in brackets is looked up as the numbers of its places, and places on the CPU are copied first.
        places = [at for at in args[1] if at is not None]
        return any(at.dtype == torch.bool or (held(at) is None and at.dim() > 0) for at in places)
    return func in _READS


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


_thread = threading.local()


def _enter(*_: Any) -> None:
    """Let this thread know the stand-in, until it ends."""
    if not getattr(_thread, "knows", False):
        _thread.knows = True
        _Mode().__enter__()


def _made_on_gpu(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`torch.tensor` and its like fill a tensor in C++, where no mode is asked."""

    def made(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        if device is None or torch.device(device).type != "cuda":
            return make(data, *args, **({} if device is None else {"device": device}), **kwargs)
        return make(data, *args, **kwargs).to(GPU)

    return made


def _patches() -> Iterator[Any]:
    """What torch does in C++ where no mode is asked, and what it asks of CUDA."""
    data, subclass = torch.Tensor.data, torch.Tensor._make_subclass
    get_item, set_item = torch.Tensor.__getitem__, torch.Tensor.__setitem__
    pool = concurrent.futures.ThreadPoolExecutor
    init_pool = pool.__init__

    def set_data(self: torch.Tensor, value: torch.Tensor) -> None:
        data.__set__(self, value)  # type: ignore[attr-defined]
        numbers = held(value)
        if numbers is None:
            self.__dict__.pop("held", None)
        else:
            self.held = numbers  # type: ignore[attr-defined]

    def make_subclass(cls: Any, value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        numbers = held(value)
        if numbers is None:
            return subclass(cls, value, *args, **kwargs)
        made = subclass(cls, torch.empty_like(numbers), *args, **kwargs)
        made.data = OnGpu(numbers)
        return made

    def places(self: torch.Tensor, at: Any) -> Any:
        # Lists would become tensors on the device of what is indexed.
        if held(self) is None:
            return at
        return tuple(torch.tensor(a) if isinstance(a, list) else a for a in (at if isinstance(at, tuple) else (at,)))

    def to_list(self: torch.Tensor) -> Any:
        return to_list_of(self if held(self) is None else self.cpu())

    def to_numpy(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if held(self) is not None:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        return numpy_of(self, *args, **kwargs)

    def begin_pool(self: Any, *args: Any, initializer: Any = None, initargs: Any = (), **kwargs: Any) -> None:
        def begin() -> None:
            _enter()
            if initializer is not None:
                initializer(*initargs)

        init_pool(self, *args, initializer=begin, **kwargs)

    to_list_of, numpy_of = torch.Tensor.tolist, torch.Tensor.numpy
    tensor = {
        "data": property(lambda self: data.__get__(self), set_data),  # type: ignore[attr-defined]
        "_make_subclass": make_subclass,
        "__getitem__": lambda self, at: get_item(self, places(self, at)),
        "__setitem__": lambda self, at, value: set_item(self, places(self, at), value),
        "tolist": to_list,
        "numpy": to_numpy,
    }
    yield mock.patch.multiple(torch.Tensor, **tensor)
    yield mock.patch.multiple(torch, **{name: _made_on_gpu(getattr(torch, name)) for name in ("tensor", "as_tensor")})
    yield mock.patch.object(pool, "__init__", begin_pool)
    properties = SimpleNamespace(name="stand-in", total_memory=_BYTES, major=9, minor=0, multi_processor_count=1)
    known: dict[str, Any] = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "is_bf16_supported": True,
        "get_device_name": properties.name,
        "get_device_properties": properties,
        "get_device_capability": (9, 0),
        "mem_get_info": (_BYTES // 2, _BYTES),
        "memory_allocated": 2**20,
        "memory_reserved": 2**21,
        "max_memory_allocated": 2**22,
        "utilization": 50,
    }
    done = ("_lazy_init", "synchronize", "empty_cache", "reset_peak_memory_stats", "manual_seed", "manual_seed_all")
    cuda = {name: mock.Mock(return_value=value) for name, value in known.items()}
    cuda |= {name: mock.Mock(return_value=None) for name in done}
    # Dropout draws from the CPU's generator.
    cuda |= {"get_rng_state": lambda *_: torch.get_rng_state(), "set_rng_state": lambda state, *_: None}
    yield mock.patch.multiple(torch.cuda, set_device=_enter, **cuda)


def build(folder: Path) -> Path:
    """The library that lets torch believe in the stand-in; takes seconds.

    Raises:
        subprocess.CalledProcessError: torch's interfaces are not those that it was written for.
    """
    here, library, torch_folder = Path(__file__), folder / "libstandin_gpu.so", Path(torch.__file__).parent
    options = ["-O0", "-std=c++20", "-shared", "-fPIC", f"-I{torch_folder / 'include'}"]
    links = [f"-L{torch_folder / 'lib'}", "-lc10", "-ltorch_cpu"]
    assert COMPILER is not None
    command = [COMPILER, *options, str(here.with_suffix(".cpp")), "-o", str(library), *links]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return library


@contextlib.contextmanager
def standin_gpu(library: Path) -> Iterator[Waits]:
    """Within it, `torch.cuda` has one device, which computes on the CPU."""
    ctypes.CDLL(str(library))
    # `with torch.device(...)` remembers, when it is asked first, which functions make tensors: the originals.
    torch.utils._device._device_constructors()
    with contextlib.ExitStack() as stack:
        for patch in _patches():
            stack.enter_context(patch)
        stack.enter_context(_Mode())
        _thread.knows = True
        yield _waits
        _thread.knows = False
