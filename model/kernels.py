"""The operations the U-Net is made of, each beside its meaning in plain torch.

Two things make them differ from `torch.nn` on a CPU, both only in inference: convolutions keep their weights in the
layout oneDNN computes in, instead of reordering them at every call; and no reduction is shared between the pictures of
a batch, so that a picture's bits do not depend on its company. On a GPU, in inference, Triton kernels compute the norms
with what stands around them, what is added to a convolution, and the convolutions that were marked `invariant` because
cuDNN's bits depend on the batch (`model.exact_kernels`). Where they cannot run, torch computes the same.
"""

import logging
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from model.gpu import raise_if_fatal

SHARED_REDUCTION = 1024  # from so many pixels on, torch's channels-last GroupNorm sums over batch and threads at once
NARROW_GROUP = 16  # below so many channels to a group, and fewer pixels than that, it is slower than two reorderings

# oneDNN's convolution of a weight kept in its own layout, alone and with a tensor added to the result.
CAN_PACK = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_convolution_weight")
if CAN_PACK:
    _PACKED = torch.ops.mkldnn._convolution_pointwise.default
    _PACKED_ADD = torch.ops.mkldnn._convolution_pointwise.binary
READ = 16  # channels that a net's first convolution reads on a GPU: of fewer, a matrix product is not made
TRITON_ON = frozenset({"cuda"})  # the types of device that Triton's kernels are tried on; if empty, torch does it all
TRITON_STORES = (torch.float32, torch.bfloat16, torch.float16)
logger = logging.getLogger(__name__)


@cache
def _triton_works(device: torch.device) -> bool:
    """Whether Triton's kernels run on this device: found out once, by running the smallest."""
    try:
        from model import triton_net

        triton_net.add_bias(torch.zeros(1, 1, 1, 1, device=device), torch.zeros(1, device=device), None)
    except Exception as error:  # a package, a compiler, a cache or a driver: each lacks in its own way, none is needed
        raise_if_fatal(error, device)
        reason = f"{type(error).__name__}: {error}"
        logger.warning("no Triton on %s, so steps are slower there (it needs gcc and Python.h): %s", device, reason)
        return False
    return True


def uses_triton(*tensors: Tensor | None) -> bool:
    """Whether Triton computes with these tensors: in inference, on the current GPU, channels-last, all of one dtype."""
    given = [tensor for tensor in tensors if tensor is not None]
    device, pictures = given[0].device, [tensor for tensor in given if tensor.ndim == 4]
    if device.type not in TRITON_ON or torch.is_grad_enabled():
        return False
    if device.type == "cuda" and device.index != torch.cuda.current_device():  # Triton would launch on the other
        return False
    return (
        given[0].dtype in TRITON_STORES
        and all(tensor.dtype == given[0].dtype for tensor in given)
        and all(picture.is_contiguous(memory_format=torch.channels_last) for picture in pictures)
        and all(picture[0].numel() < 2**31 for picture in pictures)  # offsets within one are int32
        and _triton_works(device)
    )


def add_bias(x: Tensor, bias: Tensor | None, other: Tensor | None = None) -> Tensor:
    """x + bias + other, in one pass; x may be overwritten. x, other: [B, C, H, W], bias: [C]"""
    if bias is None and other is None:
        return x
    if uses_triton(x, bias, other):
        from model import triton_net

        return triton_net.add_bias(x, bias, other)
    x = x if bias is None else x + bias[:, None, None]
    return x if other is None else x + other


class Conv(nn.Conv2d):
    """A convolution that can add a tensor to its result. [B, C, H, W] -> [B, out, H', W']"""

    doubled = False  # whether it reads the picture twice as large
    below = False  # whether it reads one more pixel of zeros, below and to the right
    invariant = False  # whether, on a GPU, the kernel is used whose bits do not depend on the batch,
    pinned = False  # and whether that computes tiles of one size in every batch
    packed: Tensor | None = None  # the weight in oneDNN's own layout

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor) -> "Conv":
        """A convolution without stride or padding. weight: [out, C, h, w], bias: [out]"""
        out, channels, *kernel = weight.shape
        conv = cls(channels, out, (kernel[0], kernel[1]), device="meta")
        conv.weight, conv.bias = nn.Parameter(weight, requires_grad=False), nn.Parameter(bias, requires_grad=False)
        return conv

    def extra_repr(self) -> str:
        shape: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{shape}, doubled={self.doubled}, below={self.below}"

    def read(self, x: Tensor) -> Tensor:
        """What is convolved, in full. [B, C, H, W] -> [B, C, H, W], [B, C, 2H, 2W] or [B, C, H + 1, W + 1]"""
        x = upsample(x) if self.doubled else x
        return F.pad(x, (0, 1, 0, 1)) if self.below else x

    def forward(self, x: Tensor, add: "Tensor | Projection | None" = None, *, whole: bool = True) -> Tensor:
        """whole: else it may give terms for the norm behind to add up, if it has no bias -> [S, B, out, H', W']"""
        if x.shape[1] < self.in_channels:  # it was widened, and who calls brings the colours alone
            x = F.pad(x, (0, 0, 0, 0, 0, self.in_channels - x.shape[1])).contiguous(memory_format=torch.channels_last)
        if self.invariant and uses_triton(x, self.weight, self.bias, *terms(add)):
            return self._by_triton(x, add, whole or self.bias is not None)
        add = add.compute() if isinstance(add, Projection) else add
        x = self.read(x)
        out: Tensor
        if self.packed is None and uses_triton(x, self.bias):  # torch would add the bias in a kernel of its own as well
            out = F.conv2d(x, self.weight, None, self.stride, self.padding)
            return add_bias(out.contiguous(memory_format=torch.channels_last), self.bias, add)
        if self.packed is None:
            out = super().forward(x)
            return out if add is None else out + add
        geometry = (self.bias, self.padding, self.stride, self.dilation, self.groups)
        if add is None:
            out = _PACKED(x, self.packed, *geometry, "none", [], "")
        else:
            out = _PACKED_ADD(x, add, self.packed, *geometry, "add", 1.0, None, [], None)
        return out

    def _by_triton(self, x: Tensor, add: "Tensor | Projection | None", whole: bool) -> Tensor:
        from model import triton_conv

        if isinstance(add, Projection) and not add.plain:
            add = add.compute()
        return triton_conv.convolve(
            x,
            self.weight,
            self.bias,
            add if isinstance(add, Tensor) else None,
            stride=self.stride[0],
            padding=int(self.padding[0]),
            below=int(self.below),
            times=1 + self.doubled,
            projection=add.conv.weight if isinstance(add, Projection) else None,
            sources=add.sources if isinstance(add, Projection) else (),
            whole=whole,
            pinned=self.pinned,
        )

    def widen(self, channels: int) -> None:
        """From now on it reads so many channels, zeros beyond its own. A GPU reads 32 bytes as fast as six."""
        self.weight = nn.Parameter(F.pad(self.weight, (0, 0, 0, 0, 0, channels - self.in_channels)), False)
        self.in_channels = channels

    def take_bias(self, other: "Conv") -> None:
        """From now on this convolution adds the bias of the other, whose result is added to its own."""
        assert self.bias is not None and other.bias is not None
        self.bias, other.bias = nn.Parameter(self.bias + other.bias, requires_grad=False), None

    def pack(self, input_shape: list[int]) -> None:
        """Keeps the weight as oneDNN wants it for inputs of this shape; other shapes stay right, if slower."""
        self.packed = torch.ops.mkldnn._reorder_convolution_weight(
            self.weight, list(self.padding), list(self.stride), list(self.dilation), self.groups, input_shape
        )


@dataclass(frozen=True, slots=True, eq=False)
class Projection:
    """A convolution of 1 x 1 that is to be added: whoever adds it may compute it along with its own.

    sources: one or two pictures, whose channels stand one behind the other
    """

    conv: Conv
    sources: tuple[Tensor, ...]

    @property
    def plain(self) -> bool:
        """Whether it is a matrix product and nothing else."""
        return self.conv.kernel_size == (1, 1) and self.conv.bias is None

    def compute(self) -> Tensor:
        """Its result. -> [B, out, H, W]"""
        out: Tensor = self.conv(self.sources[0] if len(self.sources) == 1 else torch.cat(self.sources, dim=1))
        return out


def terms(add: Tensor | Projection | None) -> tuple[Tensor | None, ...]:
    """The tensors that somebody reads who adds this."""
    return (*add.sources, add.conv.weight) if isinstance(add, Projection) else (add,)


def _computes_in(dtype: torch.dtype) -> bool:
    """Whether oneDNN convolves in this half precision on this processor."""
    half = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return bool(half[dtype]())


def pack_convolutions(net: nn.Module, *inputs: Tensor) -> None:
    """Packs every convolution of a net on the CPU for the shapes that it meets with these inputs."""
    if not CAN_PACK or (inputs[0].dtype != torch.float32 and not _computes_in(inputs[0].dtype)):
        return
    shapes: dict[Conv, list[int]] = {}

    def note(conv: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        assert isinstance(conv, Conv)
        shapes[conv] = list(conv.read(arguments[0]).shape)

    hooks = [module.register_forward_pre_hook(note) for module in net.modules() if isinstance(module, Conv)]
    net(*inputs)
    for hook in hooks:
        hook.remove()
    for conv, shape in shapes.items():
        conv.pack(shape)


class GroupNorm(nn.GroupNorm):
    """Group normalisation, with what may stand around it: an addition before, a modulation and SiLU behind."""

    before: nn.Parameter | None  # [C] joins x: the bias of the convolution that x comes from, once it has been taken

    def __init__(self, groups: int, channels: int, eps: float) -> None:
        super().__init__(groups, channels, eps)
        self.register_parameter("before", None)

    def take_bias(self, conv: Conv) -> None:
        """From now on this norm adds the bias of the convolution it follows."""
        assert isinstance(conv.bias, nn.Parameter)
        self.before, conv.bias = conv.bias, None

    def forward(
        self, x: Tensor, time: Tensor | None = None, silu: bool = False, *, beside: Tensor | None = None
    ) -> Tensor:
        """x: [B, C, H, W], or [S, B, C, H, W] to be added up first; beside: [B, D, H, W], whose channels stand behind
        those of x; time: [B, C], which joins x, or [B, 2C], which scales and shifts what is normed"""
        if uses_triton(self.weight, time, beside, x if x.ndim == 4 else None):
            from model import triton_net

            affine = (self.num_groups, self.weight, self.bias, self.eps)
            return triton_net.group_norm(x, *affine, beside=beside, before=self.before, time=time, silu=silu)
        x = x if x.ndim == 4 else x.sum(0).to(self.weight.dtype)
        x = x if beside is None else torch.cat([x, beside], dim=1)
        x = x if self.before is None else x + self.before[:, None, None]
        if time is None:
            return self._norm(x, silu)
        time = time[:, :, None, None]
        if time.shape[1] == x.shape[1]:
            return self._norm(x + time, silu)
        scale, shift = time.chunk(2, dim=1)
        out = self._norm(x, silu=False) * (1 + scale) + shift
        return F.silu(out) if silu else out

    def _norm(self, x: Tensor, silu: bool) -> Tensor:
        B, C, H, W = x.shape
        small, plain = H * W < SHARED_REDUCTION, x.device.type != "cpu" or torch.is_grad_enabled()
        if plain or small or B == 1:
            narrow = small and not plain and C // self.num_groups < NARROW_GROUP
            out = torch.group_norm(x.contiguous() if narrow else x, self.num_groups, self.weight, self.bias, self.eps)
            out = F.silu(out) if silu else out
            return out.contiguous(memory_format=torch.channels_last) if narrow else out
        out = torch.empty_like(x)
        for one, result in zip(x.split(1), out.split(1), strict=True):
            normed = torch.group_norm(one, self.num_groups, self.weight, self.bias, self.eps)
            torch.ops.aten.silu.out(normed, out=result) if silu else result.copy_(normed)
        return out


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √d) v. q, k, v: [B, heads, L, d] -> [B, heads, L, d]"""
    if q.requires_grad:  # the fused kernel's backward pass is slow on a CPU
        return torch.softmax((q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5, dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class SelfAttention(nn.Module):
    """Each pixel's query to all pixels of its picture. [B, 3C, H, W], queries, keys, values -> [B, C, H, W]

    memory: [2, heads, M, d], keys and values that are the same for every picture and stand before its own
    """

    # Whether, on a GPU, torch may use no kernel but one that gives each block of queries to one program, for any batch.
    # The others may share a query's keys among several when the batch is too small to fill the GPU.
    invariant = False

    def __init__(self, heads: int, memory: Tensor | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.memory = None if memory is None else nn.Parameter(memory)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, memories={0 if self.memory is None else self.memory.shape[2]}"

    def forward(self, h: Tensor) -> Tensor:
        B, C, H, W = h.shape
        parts = h.permute(0, 2, 3, 1).reshape(B, H * W, 3, self.heads, C // (3 * self.heads))
        q, k, v = parts.permute(2, 0, 3, 1, 4)  # [B, heads, H W, d] each
        if self.memory is not None:
            before = self.memory[:, None].expand(2, B, -1, -1, -1)  # [2, B, heads, M, d]
            k, v = (torch.cat(pair, dim=2) for pair in zip(before, (k, v), strict=True))
        if self.invariant:
            with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
                out = attention(q, k, v)
        else:
            out = attention(q, k, v)
        return out.transpose(1, 2).reshape(B, H, W, C // 3).permute(0, 3, 1, 2)


def upsample(x: Tensor) -> Tensor:
    """Each pixel four times. [B, C, H, W] -> [B, C, 2H, 2W]"""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")
