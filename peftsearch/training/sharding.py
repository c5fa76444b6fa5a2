"""A base in parts: each worker of a group holds some rows of every matrix in the transformer's layers (FSDP2).

What stands outside of the layers (embeddings, the head of a language model), vectors (biases, norms) and a trial's
adapter are whole on every worker. Full fine-tuning trains the matrices outside of the layers as well, and those are
then in parts too, as are their gradients and the optimiser's moments.

The parts of the frozen base are there once and serve trial after trial, as whole tensors do: `fully_shard` is applied
to the modules of a trial, which are its own, and is handed the base's parts. What reads a weight outside of a layer's
forward pass (a method that starts from the base's weights, a probe) meets a `ShardedWeight`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.utils._pytree import tree_map_only


class ShardedWeight(torch.Tensor):
    """A matrix of which this worker holds some rows. An operation that reads it is given all of it, gathered for that
    operation alone; so every worker of the group must do the same operations.

    Args:
        local: This worker's rows: row ``rank * ceil(rows / workers)`` and so on, as `torch.chunk` cuts.
        whole: Shape and strides of the matrix; on any device.
        mesh: The workers.
    """

    local: torch.Tensor
    mesh: DeviceMesh

    @staticmethod
    def __new__(cls, local: torch.Tensor, whole: torch.Tensor, mesh: DeviceMesh) -> ShardedWeight:
        return torch.Tensor._make_wrapper_subclass(cls, whole.shape, dtype=local.dtype, device=local.device)

    def __init__(self, local: torch.Tensor, whole: torch.Tensor, mesh: DeviceMesh) -> None:
        self.local = local
        self.mesh = mesh

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # torch's is untyped
        return f"ShardedWeight({tuple(self.shape)}, {self.dtype})"

    def placed(self, *, copy: bool = False) -> DTensor:
        """The same rows (or a copy of them) as a tensor of `torch.distributed`."""
        local = self.local.clone() if copy else self.local
        stride = torch.empty(self.shape, device="meta").stride()
        placed: DTensor = DTensor.from_local(
            local, self.mesh, [Shard(0)], run_check=False, shape=self.shape, stride=stride
        )
        return placed

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # which is no class method to mypy
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].local, args[0], args[0].mesh)
        args, kwargs = tree_map_only(cls, lambda weight: weight.placed().full_tensor(), (args, kwargs or {}))
        return func(*args, **kwargs)


def split(whole: torch.Tensor, mesh: DeviceMesh) -> ShardedWeight:
    """This worker's part of a matrix that it holds."""
    chunks = whole.detach().chunk(mesh.size())
    rank = mesh.get_local_rank()
    return ShardedWeight((chunks[rank] if rank < len(chunks) else whole[:0]).clone(), whole, mesh)


def layers_of(model: nn.Module) -> list[str]:
    """Paths of a transformer's layers, found from its modules; with adapters attached or without."""
    # First of all PEFT: its import registers our methods, which import the module below.
    import peft.tuners.tuners_utils  # noqa: F401

    from peftsearch.methods.sublayers import find_sublayers

    return list(dict.fromkeys(find_sublayers(model).blocks.values()))


def matrices_in_layers(model: nn.Module) -> frozenset[str]:
    """Names of the parameters that are to be in parts."""
    layers = tuple(f"{path}." for path in layers_of(model))
    return frozenset(
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.ndim > 1 and name.startswith(layers)
    )


def shard_trial(model: nn.Module, mesh: DeviceMesh, half: bool) -> None:
    """Apply `fully_shard` to a trial's model: to each layer, and to the model around them.

    Args:
        model: A transformer, with trainable parameters attached. Its `ShardedWeight` parameters are handed over as they
            are where they are frozen, and as copies where they are trained; other matrices that are trained in full
            fine-tuning are put in parts. All others stay as they are.
        mesh: The workers.
        half: Whether it will be trained under bf16 autocast, see `gather_in_half`.
    """
    from peft import PeftModel

    inner: nn.Module = model.get_base_model() if isinstance(model, PeftModel) else model
    places: list[tuple[nn.Module, str, Any]] = [
        (module, name, parameter)
        for module in inner.modules()
        for name, parameter in module._parameters.items()
        if isinstance(parameter, ShardedWeight)
    ]
    # By id: what is tied stays tied.
    weights = {id(parameter): parameter for _, _, parameter in places}
    # fully_shard wants whole weights, on the meta device too; parts may take their place before the first forward pass.
    empty = {
        key: nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype, device="meta"), weight.requires_grad)
        for key, weight in weights.items()
    }
    for module, name, parameter in places:
        module._parameters[name] = empty[id(parameter)]
    managed = set(empty.values())
    if any(weight.requires_grad for weight in managed):
        managed |= {parameter for parameter in inner.parameters() if parameter.ndim > 1 and parameter.requires_grad}
    options: dict[str, Any] = {
        "mesh": mesh,
        "ignored_params": {parameter for parameter in inner.parameters() if parameter not in managed},
        "mp_policy": _policy(half),
    }
    for path in layers_of(inner):
        fully_shard(inner.get_submodule(path), **options)
    fully_shard(inner, **options)
    parts = {
        key: nn.Parameter(weight.placed(copy=weight.requires_grad), weight.requires_grad)
        for key, weight in weights.items()
    }
    for module, name, parameter in places:
        module._parameters[name] = parts[id(parameter)]


def gather_in_half(model: nn.Module, half: bool) -> None:
    """Choose whether layers gather their matrices as bf16 from the next forward pass on, or as they are stored.

    Under autocast the former gives the same numbers (matrices are cast for every product) for half the traffic; and
    autograd then keeps no bf16 copies of whole matrices from the forward pass to the backward pass, which would undo
    what sharding saves. The final evaluation runs in the weights' own format.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            group = module._get_fsdp_state()._fsdp_param_group
            if group is None or group.mp_policy == _policy(half):
                continue
            # There is no public way: what FSDP keeps for the next gathering has the type of the last one.
            module.reshard()
            group.mp_policy = _policy(half)
            for weight in group.fsdp_params:
                weight.all_gather_outputs = []
                vars(weight).pop("_unsharded_param", None)
            group._init_mp_dtypes()


def _policy(half: bool) -> MixedPrecisionPolicy:
    # Gradients are added up over workers in full precision, as a single worker adds up those of its examples.
    return MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if half else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )


def is_part(tensor: torch.Tensor) -> bool:
    """Whether a trained parameter (or what belongs to it) is in parts."""
    return isinstance(tensor, DTensor)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with all of its rows; every worker must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Of a whole tensor the part that this worker holds of another one of that shape; all of it where that is whole."""
    if isinstance(tensor, DTensor):
        return tensor
    tensor = tensor.to(like.device)
    return split(tensor, like.device_mesh).placed() if isinstance(like, DTensor) else tensor


def clip_gradients(parameters: Collection[nn.Parameter], max_norm: float) -> None:
    """`torch.nn.utils.clip_grad_norm_` where some parameters are in parts and others are whole on every worker."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return
    in_parts = [gradient.to_local() for gradient in gradients if isinstance(gradient, DTensor)]
    # In double precision: squares of what is about to diverge would overflow, and a norm of inf clips everything to 0.
    total = torch.zeros((), dtype=torch.float64, device=gradients[0].device)
    for local in in_parts:
        total += torch.linalg.vector_norm(local, dtype=torch.float64).square()
    distributed.all_reduce(total)
    for gradient in gradients:
        if not isinstance(gradient, DTensor):
            total += torch.linalg.vector_norm(gradient, dtype=torch.float64).square()
    factor = (max_norm / (total.sqrt() + 1e-6)).clamp(max=1.0).float()
    for gradient in gradients:
        (gradient.to_local() if isinstance(gradient, DTensor) else gradient).mul_(factor)
