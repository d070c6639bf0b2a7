"""Tensor parallelism: deployed layers divided among processes.

The two styles replace torch's styles of the same names for deployed BitLinear layers::

    from bitlinear.tensor_parallel import ColwiseParallel, RowwiseParallel

    mesh = torch.distributed.device_mesh.init_device_mesh("cuda", (2,))
    model = bitlinear.deploy(model)
    plan = {"mlp.up": ColwiseParallel(), "mlp.down": RowwiseParallel()}
    model = torch.distributed.tensor.parallel.parallelize_module(model, mesh, plan)

Every process gets the bits that one process would compute with the whole layers. Output features
are independent of each other. If input features are divided, the processes exchange the absmax of
each token, and add products that are integers, whose sum does not depend on the order. All of this
works under ``torch.compile(fullgraph=True)`` too.

A normalisation between two layers needs whole tokens: give the first ``output_layouts=Replicate()``
and the second ``input_layouts=Replicate()``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import check_activations
from .autograd import output_dtype
from .deployed import input_gradient
from .groups import split_scales
from .linear import BitLinear
from .quantize import EXACT_K, epilogue, join_products, quantize_with_absmax, split_activations
from .ternary_layer import TernaryLayer

try:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import (
        DTensor,
        Partial,
        Placement,
        Replicate,
        Shard,
        distribute_tensor,
        parallel,
    )

    if not hasattr(parallel.ParallelStyle, "src_data_rank"):
        raise ImportError("torch.distributed.tensor is older than its src_data_rank")
except ImportError as error:
    raise ImportError(
        f"bitlinear.tensor_parallel needs torch 2.7 or newer, built with torch.distributed, but "
        f"this is torch {torch.__version__}"
    ) from error

__all__ = ["ColwiseParallel", "RowwiseParallel"]

_linear = torch.ops.bitlinear.linear.default


class ColwiseParallel(parallel.ColwiseParallel):
    """Divide a deployed BitLinear by its output features, of any number.

    Args:
        input_layouts: Placement of the input; by default replicated.
        output_layouts: Placement of the output; by default sharded along its last dimension.
        use_local_output: Whether the output is the local tensor instead of a DTensor.

    Applying it raises TypeError for any module but a deployed BitLinear.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        _check_deployed(module, "ColwiseParallel")
        return super()._apply(module, device_mesh)

    def _partition_linear_fn(self, name: str, module: Any, device_mesh: DeviceMesh) -> None:
        per_row = module.w_scale.dim() == 2
        placements = {
            "w_packed": Shard(0),
            "w_scale": Shard(0) if per_row else Replicate(),
            "bias": Shard(0),
        }
        _distribute(module, device_mesh, placements, self.src_data_rank)
        module.forward = partial(_forward, _colwise_linear, module)


class RowwiseParallel(parallel.RowwiseParallel):
    """Divide a deployed BitLinear by its input features.

    Their number must be a multiple of four times the number of processes: four weights share a
    byte. With scales of groups each process must have whole groups.

    Args:
        input_layouts: Placement of the input; by default sharded along its last dimension.
        output_layouts: Placement of the output; by default replicated.
        use_local_output: Whether the output is the local tensor instead of a DTensor.

    Applying it raises TypeError for any module but a deployed BitLinear, and ValueError for other
    numbers of input features.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        layer = _check_deployed(module, "RowwiseParallel")
        group_size, processes = layer._group_size, device_mesh.size()
        unit, what = (group_size, "weights to a group") if group_size > 0 else (4, "to a byte")
        if layer.in_features % (unit * processes):
            raise ValueError(
                f"RowwiseParallel needs in_features that are a multiple of {unit * processes}, "
                f"{unit} {what} and {processes} processes, but they are {layer.in_features}: use "
                f"ColwiseParallel for this layer, or fewer processes"
            )
        return super()._apply(module, device_mesh)

    def _partition_linear_fn(self, name: str, module: Any, device_mesh: DeviceMesh) -> None:
        placements = {"w_packed": Shard(1), "w_scale": Replicate(), "bias": Replicate()}
        _distribute(module, device_mesh, placements, self.src_data_rank)
        linear = partial(_rowwise_linear, *self.output_layouts)
        module.forward = partial(_forward, linear, module)


def _check_deployed(module: nn.Module, style: str) -> BitLinear:
    """Return ``module``; raise TypeError unless it is a deployed BitLinear with its own forward."""
    if not isinstance(module, BitLinear):
        remedy = f"use torch.distributed.tensor.parallel.{style} for it"
        if isinstance(module, TernaryLayer):
            remedy = "leave it out of the plan, so that every process has the whole table"
        raise TypeError(
            f"bitlinear.tensor_parallel.{style} is for deployed BitLinear layers, but got "
            f"{type(module).__name__}: {remedy}"
        )
    if not module.is_deployed:
        raise TypeError(
            f"bitlinear.tensor_parallel.{style} is for deployed BitLinear layers, but this one is "
            f"not: call deploy() first, or train with FSDP2 (fully_shard) or DDP"
        )
    if getattr(module.forward, "__func__", None) is not BitLinear.forward:
        raise TypeError(
            f"bitlinear.tensor_parallel.{style} would replace the forward pass of this "
            f"{type(module).__name__}, which is not BitLinear's"
        )
    return module


def _distribute(
    layer: BitLinear, mesh: DeviceMesh, placements: Mapping[str, Placement], source: int | None
) -> None:
    for name, buffer in layer.named_buffers(recurse=False):
        layer._buffers[name] = distribute_tensor(
            buffer, mesh, [placements[name]], src_data_rank=source
        )


def _forward(
    linear: Callable[[BitLinear, DTensor], DTensor], layer: BitLinear, x: DTensor
) -> DTensor:
    """The forward pass of a divided layer; hooks of torch's styles make DTensors of its inputs."""
    check_activations(x, layer.in_features)
    if x.requires_grad and torch.is_grad_enabled():
        y: DTensor = _DividedLinear.apply(x, layer, linear)  # type: ignore[no-untyped-call]
        return y
    with torch.no_grad():
        return linear(layer, x)


class _DividedLinear(torch.autograd.Function):
    """The output of a divided layer, with the gradient that one process would compute."""

    @staticmethod
    def forward(ctx: Any, x: DTensor, layer: BitLinear, linear: Any) -> DTensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        ctx.save_for_backward(layer.w_packed, layer.w_scale)
        output: DTensor = linear(layer, x)
        return output

    @staticmethod
    def backward(ctx: Any, grad: DTensor) -> tuple[DTensor, None, None]:
        w_packed, w_scale = ctx.saved_tensors
        colwise = w_packed.placements == (Shard(0),)
        scale_placement = Shard(0) if colwise and w_scale.dim() == 2 else Replicate()
        # A process has some output features of all inputs, or all output features of some inputs.
        local_grad = _local(grad, Shard(grad.dim() - 1) if colwise else Replicate())
        local_packed = w_packed.to_local()
        in_features = ctx.layer.in_features if colwise else 4 * local_packed.shape[1]
        local_scale = _local(w_scale, scale_placement)
        group_size = ctx.layer._group_size
        if group_size > 0 and not colwise:
            local_scale = _groups_of_process(local_scale, grad.device_mesh)
        product = input_gradient(local_grad, local_packed, local_scale, in_features, group_size)
        placement = Partial() if colwise else Shard(grad.dim() - 1)
        grad_x: Any = _dtensor(product, grad.device_mesh, placement)
        if colwise:
            grad_x = grad_x.redistribute(placements=[Replicate()])
        return grad_x.to(ctx.dtype), None, None


def _colwise_linear(layer: BitLinear, x: DTensor) -> DTensor:
    w_packed = _local(layer.w_packed, Shard(0))
    w_scale, bias = _scale_and_bias(layer, Shard(0))
    y = _linear(
        *(_local(x, Replicate()), w_packed, w_scale, bias, layer.in_features, layer.eps),
        *(layer._group_size, layer._act_bits),
    )
    # DTensor cannot infer the shape from parts that are not equal.
    shape = torch.Size((*x.shape[:-1], layer.out_features))
    stride = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
    return _dtensor(y, x.device_mesh, Shard(y.dim() - 1), shape=shape, stride=stride)


def _rowwise_linear(layout: Placement, layer: BitLinear, x: DTensor) -> DTensor:
    mesh = x.device_mesh
    part = _local(x, Shard(x.dim() - 1)).to(torch.float32)
    absmax = part.abs().amax(dim=-1, keepdim=True)
    # The maximum over the parts can lose the NaN of one part. An infinity stays, and makes the row
    # NaN too.
    absmax = absmax.nan_to_num(nan=math.inf, posinf=math.inf)
    absmax = _dtensor(absmax, mesh, Partial("max")).full_tensor()
    q, s_x = quantize_with_absmax(part, absmax.clamp_min(layer.eps), layer._act_bits)
    w_packed = _local(layer.w_packed, Shard(1))
    if layer._group_size > 0:
        multipliers, _ = split_scales(_local(layer.w_scale, Replicate()))
        multipliers = _groups_of_process(multipliers, mesh)
        partial_sums = _group_sums(q, w_packed, multipliers, layer._group_size)
    else:
        partial_sums = _integer_sums(q, w_packed, layer.in_features)
    sums = _dtensor(partial_sums, mesh, Partial()).redistribute(
        placements=[layout if layout.is_shard() else Replicate()]
    )
    (placement,) = sums.placements
    splits_features = placement.is_shard(sums.dim() - 1)
    scale, bias = _scale_and_bias(layer, Shard(0) if splits_features else Replicate())
    y = epilogue(
        sums.to_local().to(torch.float32),
        _local(_dtensor(s_x, mesh, Replicate()), Replicate() if splits_features else placement),
        split_scales(scale)[1] if layer._group_size > 0 else scale,
        bias,
    )
    y = y.to(output_dtype(x))
    return _dtensor(y, mesh, placement, shape=sums.shape, stride=sums.stride())


def _integer_sums(q: Tensor, w_packed: Tensor, in_features: int) -> Tensor:
    """The exact product of a part, ``(..., k)`` and uint8 ``(N, k/4)``, as ``(..., N)``.

    In fp32, or in float64 if fp32 might not hold the sum over all ``in_features``.
    """
    if q.dtype == torch.int16:
        parts = [part.to(torch.int8) for part in split_activations(q)]
        high, low = (_integer_sums(part, w_packed, in_features) for part in parts)
        return join_products(high, low).to(torch.float64)
    ones = torch.ones(1, dtype=torch.float32, device=q.device)
    step = EXACT_K // 4  # bytes
    dtype = torch.float32 if in_features <= EXACT_K else torch.float64
    pieces = zip(q.to(torch.float32).split(4 * step, dim=-1), w_packed.split(step, dim=1))
    # With an eps of 127 the operator quantises these integers to themselves, with a scale of 1.
    sums = [
        _linear(piece, weights, ones, None, piece.shape[-1], 127.0, 0, 8, torch.float32).to(dtype)
        for piece, weights in pieces
    ]
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum(dim=0)


def _group_sums(q: Tensor, w_packed: Tensor, multipliers: Tensor, group_size: int) -> Tensor:
    """The exact product of a part with groups, ``(..., k)`` and uint8 ``(N, k/4)``, as int64.

    ``multipliers`` are int32, of shape ``(N, k/group_size)``; see :mod:`bitlinear.groups`.
    """
    sums = torch.zeros((*q.shape[:-1], len(w_packed)), dtype=torch.int64, device=q.device)
    pieces = zip(q.split(group_size, dim=-1), w_packed.split(group_size // 4, dim=1))
    for group, (piece, weights) in enumerate(pieces):
        product = _integer_sums(piece, weights, group_size).to(torch.int64)
        sums = sums + product * multipliers[:, group]
    return sums


def _groups_of_process(values: Tensor, mesh: DeviceMesh) -> Tensor:
    """The columns of ``(N, groups)`` that belong to this process's input features."""
    return values.chunk(mesh.size(), dim=1)[mesh.get_local_rank()]


def _scale_and_bias(layer: BitLinear, placement: Placement) -> tuple[Tensor, Tensor | None]:
    """The local parts of both if the output features have this placement."""
    w_scale, bias = layer.w_scale, layer.bias
    return (
        _local(w_scale, placement if w_scale.dim() == 2 else Replicate()),
        None if bias is None else _local(bias, placement),
    )


def _dtensor(part: Tensor, mesh: DeviceMesh, placement: Placement, **shape: Any) -> DTensor:
    return DTensor.from_local(part, mesh, [placement], run_check=False, **shape)


def _local(tensor: Any, placement: Placement) -> Tensor:
    """The local part of a DTensor, which is redistributed to ``placement`` first if needed."""
    if tensor.placements != (placement,):
        tensor = tensor.redistribute(placements=[placement])
    part: Tensor = tensor.to_local()
    return part
