"""Symbols that stand for tensors while a net's `forward` adds its operations to an OpenVINO graph.

Each operation on a Symbol adds one to the graph (`__torch_function__`, as in torch.fx, but with known shapes), so each
net is written once, in torch. MEANINGS has the graph of each torch function that the nets call; with `openvino_graph`
this is the only module that imports `openvino`.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

# `import openvino` sends a report of its use unless its telemetry package cannot be imported.
sys.modules["openvino_telemetry"] = cast(Any, None)
from openvino import opset13 as op  # noqa: E402

__all__ = ["MEANINGS", "Symbol", "attend", "op"]


def _constant(value: Any) -> Any:
    if isinstance(value, Tensor):
        return op.constant(value.detach().contiguous().numpy(), shared_memory=True)
    return op.constant(np.asarray(value))


def _node(value: Any) -> Any:
    """The graph's node for a symbol, a tensor or a number."""
    if isinstance(value, Symbol):
        return value.node
    return _constant(value if isinstance(value, Tensor) else np.float32(value))


class Symbol:
    """Stands for a float32 tensor while a graph is built: it has a shape, no values, and the operations of our nets."""

    device, dtype, requires_grad = torch.device("cpu"), torch.float32, False

    def __init__(self, node: Any) -> None:
        self._of = node.output(0) if hasattr(node, "output") else node

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> "Symbol":
        if function not in MEANINGS:
            raise NotImplementedError(f"Symbol does not support {function}")
        return MEANINGS[function](*args, **(kwargs or {}))

    @property
    def node(self) -> Any:
        """Its node in the graph."""
        return self._of

    @property
    def shape(self) -> torch.Size:
        """See torch.Tensor."""
        return torch.Size(list(self.node.get_shape()))

    @property
    def ndim(self) -> int:
        """See torch.Tensor."""
        return len(self.shape)

    def is_contiguous(self, memory_format: Any = None) -> bool:
        """OpenVINO chooses its own layouts."""
        return False

    def __add__(self, other: Any) -> "Symbol":
        return Symbol(op.add(self.node, _node(other)))

    def __mul__(self, other: Any) -> "Symbol":
        return Symbol(op.multiply(self.node, _node(other)))

    __radd__, __rmul__ = __add__, __mul__

    def __truediv__(self, other: Any) -> "Symbol":
        return Symbol(op.divide(self.node, _node(other)))

    def __matmul__(self, other: Any) -> "Symbol":
        return Symbol(op.matmul(self.node, _node(other), False, False))

    def __getitem__(self, key: Any) -> "Symbol":
        x = self.node
        for axis, part in enumerate(key):
            if part is None:
                x = op.unsqueeze(x, _constant(axis))
            elif part != slice(None):
                _require(isinstance(part, slice) and part.step is None, "indices that are not plain slices")
                ends = (_constant([end]) for end in (part.start, part.stop, 1, axis))
                x = op.slice(x, *ends)
        return Symbol(x)

    def __iter__(self) -> Iterator["Symbol"]:
        parts = op.split(self.node, _constant(0), self.shape[0])
        return iter([Symbol(op.squeeze(part, _constant(0))) for part in parts.outputs()])

    def contiguous(self, memory_format: Any = None) -> "Symbol":
        """Itself."""
        return self

    def to(self, dtype: Any) -> "Symbol":
        """Itself: OpenVINO chooses its own precision."""
        return self

    def float(self) -> "Symbol":
        """Itself."""
        return self

    def chunk(self, count: int, dim: int) -> list["Symbol"]:
        """See torch.Tensor; the parts are equal."""
        return [Symbol(part) for part in op.split(self.node, _constant(dim), count).outputs()]

    def permute(self, *order: int) -> "Symbol":
        """See torch.Tensor."""
        return Symbol(op.transpose(self.node, _constant(order)))

    def transpose(self, a: int, b: int) -> "Symbol":
        """See torch.Tensor."""
        order = list(range(self.ndim))
        order[a], order[b] = order[b], order[a]
        return self.permute(*order)

    def reshape(self, *shape: int) -> "Symbol":
        """See torch.Tensor."""
        return Symbol(op.reshape(self.node, _constant(shape), False))

    def softmax(self, dim: int) -> "Symbol":
        """See torch.Tensor."""
        return Symbol(op.softmax(self.node, dim))

    def clamp_min(self, least: Any) -> "Symbol":
        """See torch.Tensor."""
        return Symbol(op.maximum(self.node, _node(least)))


class Doubled(Symbol):
    """A picture with its pixels repeated to twice its size. A 3 x 3 convolution reads the original instead, see
    `_convolve_doubled`."""

    def __init__(self, half: Symbol) -> None:
        self.half = half

    @property
    def node(self) -> Any:
        height, width = self.half.shape[2:]
        size, axes = _constant([2 * height, 2 * width]), _constant([2, 3])
        how = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        return op.interpolate(self.half.node, size, "nearest", "sizes", axes=axes, **how).output(0)


def _require(supported: bool, what: str) -> None:
    if not supported:
        raise NotImplementedError(f"Symbol does not support {what}")


def _channels(values: Tensor) -> Any:
    """[C] as [1, C, 1, 1]."""
    return _constant(values.detach()[None, :, None, None])


def _pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def _convolve(
    x: Symbol,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Symbol:
    pads, strides = _pair(padding), _pair(stride)
    _require(_pair(dilation) == [1, 1] and groups == 1, "convolutions with dilation or groups")
    if isinstance(x, Doubled) and weight.shape[2:] == (3, 3) and pads == strides == [1, 1]:
        out = _convolve_doubled(x.half, weight)
    else:
        out = op.convolution(x.node, _constant(weight), strides, pads, pads, [1, 1])
    return Symbol(out if bias is None else op.add(out, _channels(bias)))


def _convolve_doubled(x: Symbol, weight: Tensor) -> Any:
    """A 3 x 3 convolution of the doubled picture, as four 2 x 2 convolutions of the picture itself, one for each parity
    of the output's row and column: 16 products for four pixels instead of 36. -> [B, out, 2H, 2W]"""
    quarters = []
    for down in (0, 1):
        for right in (0, 1):
            kernel, begin, end = _halved(_halved(weight, 2, down), 3, right), [1 - down, 1 - right], [down, right]
            quarters.append(op.convolution(x.node, _constant(kernel), [1, 1], begin, end, [1, 1]))
    return op.depth_to_space(op.concat(quarters, 1), "blocks_first", 2)


def _halved(weight: Tensor, axis: int, second: int) -> Tensor:
    """Three weights along an axis, merged into the two that act on the original pixels, for output pixels of even (0)
    or odd (1) position."""
    a, b, c = weight.unbind(axis)
    return torch.stack((a + b, c) if second else (a, b + c), axis)


def _group_norm(x: Symbol, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Symbol:
    shape = list(x.shape)
    grouped = op.reshape(x.node, _constant([shape[0], groups, -1]), False)
    normed = op.reshape(op.mvn(grouped, _constant([2]), True, eps, "inside_sqrt"), _constant(shape), False)
    return Symbol(op.add(op.multiply(normed, _channels(weight)), _channels(bias)))


def attend(q: Symbol, k: Symbol, v: Symbol) -> Symbol:
    scores = op.matmul((q * q.shape[-1] ** -0.5).node, k.node, False, True)
    return Symbol(op.softmax(scores, -1)) @ v


def _length(x: Symbol, dim: int, keepdim: bool, dtype: Any) -> Symbol:
    return Symbol(op.reduce_l2(x.node, _constant([dim]), keepdim))


def _pad(x: Symbol, widths: Sequence[int], mode: str = "constant", value: Any = None) -> Symbol:
    _require(mode == "constant" and not value, "padding with anything but zeros")
    pairs = list(zip(widths[::2], widths[1::2], strict=True))[::-1]  # torch lists the last axis first
    pairs = [(0, 0)] * (x.ndim - len(pairs)) + pairs
    before, after = (_constant(side) for side in zip(*pairs, strict=True))
    return Symbol(op.pad(x.node, before, after, "constant", _node(0.0)))


def _double(x: Symbol, scale_factor: float, mode: str, **_: Any) -> Symbol:
    _require((scale_factor, mode) == (2.0, "nearest"), "other ways to resize than to double")
    return Doubled(x)


# The graph of each torch function that our nets call.
MEANINGS: dict[Any, Callable[..., Symbol]] = {
    torch.conv2d: _convolve,
    F.group_norm: _group_norm,
    F.silu: lambda x, inplace: Symbol(op.swish(x.node)),
    F.scaled_dot_product_attention: attend,
    F.interpolate: _double,
    F.avg_pool2d: lambda x, size: Symbol(op.avg_pool(x.node, [size] * 2, [0, 0], [0, 0], [size] * 2, True)),
    F.pad: _pad,
    torch.cat: lambda tensors, dim: Symbol(op.concat([_node(tensor) for tensor in tensors], dim)),
    torch.linalg.vector_norm: _length,
    torch.addcmul: lambda start, a, b: a * b + start,
    Tensor.add: lambda a, b: b + a,
    Tensor.mul: lambda a, b: b * a,
}
