"""Runs a net on a CPU: with OpenVINO, or with torch where OpenVINO cannot be used.

The net is compiled for a few batch sizes, and a batch of any size is split into these, the largest first. A net is
usable once it is compiled for one picture; `grow` adds the next larger size, and may be called from another thread. A
size is used only if a picture has the same bits in it as alone, so the result never depends on which sizes exist.
"""

import hashlib
import logging
import math
from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from model.activations import alive
from model.architecture import Architecture
from model.lucid_architecture import LucidArchitecture
from model.nets import Net

SIZES = (1, 2, 4, 8, 16)
SIZES_BYTES = 3 << 30  # they take together no more than this, unless the first alone does: see `size_bytes`
CHECKED_SIDE = 64  # pixels: larger nets are compared with torch on a picture of this size, which takes a moment
CONVERTED = 1e-4  # OpenVINO's error beside torch, both in float32: |difference| / |largest number|
ROUNDED = 0.1  # the same in half precision: no more than a sign that the numbers are not those of another net

Shape: TypeAlias = tuple[int, int, int]  # C, H, W
Run: TypeAlias = Callable[[Tensor, Tensor], Tensor]  # (x, embedding) -> out, which is good until the next call
Program: TypeAlias = Callable[[], Run]  # a net for one size of batch; each call gives a Run that one thread may use
Compile: TypeAlias = Callable[[Shape, int, torch.dtype], Program]  # for pictures of this shape, so many in a batch
logger = logging.getLogger(__name__)


class Unusable(Exception):
    """OpenVINO cannot run a net. The message is a predicate that follows the word "OpenVINO"."""


def supports(dtype: torch.dtype) -> bool:
    """Whether this processor has native instructions for `dtype`."""
    try:
        from model import openvino_net
    except Exception:  # what is wrong with it is told when a net is to be run
        return dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return openvino_net.computes_in(dtype)


def sizes_up_to(slots: int, arch: Architecture | LucidArchitecture, parameters: int, dtype: torch.dtype) -> list[int]:
    """The batch sizes that a net has after it has grown to `slots` pictures."""
    sizes, taken = [1], size_bytes(1, arch, parameters, dtype)
    for size in SIZES[1:]:
        taken += size_bytes(size, arch, parameters, dtype)
        if size <= slots and taken <= SIZES_BYTES:
            sizes.append(size)
    return sizes


def size_bytes(size: int, arch: Architecture | LucidArchitecture, parameters: int, dtype: torch.dtype) -> int:
    """Memory of one batch size: its own copy of the weights, and the activations of each picture."""
    return int(dtype.itemsize) * (parameters + size * alive(arch))


def checked_shape(arch: Architecture | LucidArchitecture) -> Shape:
    """The picture on which OpenVINO is compared with torch: the net's own, or a smaller one with as many levels."""
    channels, *sides = arch.shape
    side = max(CHECKED_SIDE, 1 << arch.levels)
    height, width = (side if given > side and given % side == 0 else given for given in sides)
    return channels, height, width


class CpuNet:
    """A net for batches of any size. x: [B, C, H, W], embedding: [B, P], of float32 -> [B, out, H, W] float32

    table: [T, P] float32, rows of embeddings. dtype: of the numbers inside the net. unusable: if not empty, OpenVINO is
    not tried; the reason, as a predicate.
    """

    def __init__(self, net: Net, table: Tensor, dtype: torch.dtype, unusable: str = "") -> None:
        self.arch, self.dtype, self.threads = net.arch, dtype, torch.get_num_threads()
        self.embedding_width, self.reads = net.embedding_width, net.reads
        self.parameters = sum(p.numel() for p in net.parameters())
        self.note: str | None = None  # why OpenVINO does not run it
        self._table, self._alone = table, list[Tensor]()  # the results of the two test pictures, each computed alone
        self._grown = 1  # the last size that was tried
        shape = self._shape = checked_shape(net.arch)
        try:
            if unusable:
                raise Unusable(unusable)
            self.runtime, compile_net = _openvino(net, self.threads)
            checked = self._checked(net, compile_net)
            first = checked if shape == net.arch.shape else compile_net(net.arch.shape, 1, dtype)
        except Unusable as error:
            self.note = f"run by torch, since OpenVINO {error}"
            self.runtime, compile_net = f"torch {torch.__version__}", partial(_by_torch, net.to(dtype), self.threads)
            checked = first = compile_net(shape, 1, dtype)
        self._trial: Run | None = checked()
        self.bits = _hash(self._trial(*self._given(1, shape)))  # what tells two machines apart that compute otherwise
        self._first: Program = first
        self._runs: dict[int, Run] = {1: first()}
        self._compile: Compile | None = compile_net  # until no size is left to come

    @property
    def sizes(self) -> list[int]:
        """The batch sizes compiled so far."""
        return sorted(self._runs)

    def __call__(self, x: Tensor, embedding: Tensor) -> Tensor:
        parts, begin, runs = list[Tensor](), 0, self._runs
        for size in sorted(runs, reverse=True):
            while len(x) - begin >= size:
                end = begin + size
                parts.append(runs[size](x[begin:end], embedding[begin:end]).clone())
                begin = end
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @torch.inference_mode()
    def grow(self, slots: int) -> bool:
        """Compiles the next batch size, and uses it if a picture has the same bits in it as alone. Returns whether
        another size will follow. slots: the largest batch that will be asked for.
        """
        sizes = sizes_up_to(slots, self.arch, self.parameters, self.dtype)
        to_come = [size for size in sizes if size > self._grown]
        if to_come and self._compile is not None:
            self._grown = to_come[0]
            try:
                self._add(self._compile(self.arch.shape, self._grown, self.dtype))
            except Unusable as error:  # memory may have run out
                logger.warning("batches of %d are not used, since OpenVINO %s", self._grown, error)
                self._compile = None
        if len(to_come) <= 1:
            self._compile = None  # the net's layers are not needed any more
        return self._compile is not None

    def _add(self, program: Program) -> None:
        if self._agrees(program(), self._grown):
            self._runs = self._runs | {self._grown: program()}
        else:
            level = logging.WARNING if self.note is None else logging.INFO  # of torch nothing else is expected
            logger.log(level, "batches of %d are not used: a picture's bits differ in them", self._grown)

    def _agrees(self, run: Run, size: int) -> bool:
        """Whether each of two pictures has, in each place of a batch and beside other neighbours, the bits it has
        alone."""
        x, embedding = self._given(2, self.arch.shape)
        if not self._alone:
            alone = self._first()
            self._alone = [alone(x[i : i + 1], embedding[i : i + 1])[0].clone() for i in range(2)]
        first = torch.randint(2, (size,), generator=torch.Generator().manual_seed(size))
        for chosen in (first, 1 - first):
            out = run(x[chosen], embedding[chosen])
            if not all(torch.equal(picture, self._alone[i]) for picture, i in zip(out, chosen.tolist(), strict=True)):
                return False
        return True

    def _given(self, batch: int, shape: Shape) -> tuple[Tensor, Tensor]:
        """Random pictures, and embeddings of random timesteps; the same ones every time."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(batch, *shape, generator=generator)
        return x, self._table[torch.randint(len(self._table), (batch,), generator=generator)]

    def _checked(self, net: Net, compile_net: Compile) -> Program:
        """Compiles the net for one picture of the checked shape. Raises Unusable if the result is not that of torch."""
        given, dtypes = self._given(1, self._shape), dict.fromkeys((torch.float32, self.dtype))
        expected = net(*given)
        for dtype in dtypes:
            program = compile_net(self._shape, 1, dtype)
            error, most = _error(program()(*given), expected), CONVERTED if dtype == torch.float32 else ROUNDED
            if not error <= most:
                words = f"makes an error of {error:.1e} beside torch in {str(dtype).removeprefix('torch.')}"
                raise Unusable(f"{words}, where {most:.0e} is allowed")
        return program

    def rehearse(self) -> float:
        """Runs the test picture once more, for the caller to time; once only. Returns the ratio of pixels in a served
        picture to those in the test picture."""
        run, self._trial = self._trial, None
        assert run is not None, "it has been rehearsed"
        run(*self._given(1, self._shape))
        return math.prod(self.arch.shape) / math.prod(self._shape)


def _hash(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()[:8]


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def _openvino(net: Net, threads: int) -> tuple[str, Compile]:
    """The runtime's name and version, and a function that compiles the net. Both raise Unusable."""
    try:
        from model import openvino_net
    except Exception as error:  # it is missing, lacks a symbol or a library: whatever it is, torch does without
        raise Unusable(f"cannot be imported: {_reason(error)}") from error

    def compile_net(shape: Shape, batch: int, dtype: torch.dtype) -> Program:
        if not openvino_net.computes_in(dtype):
            raise Unusable(f"does not compute in {str(dtype).removeprefix('torch.')} on this processor")
        try:
            return openvino_net.compile_net(net, shape, batch, dtype, threads)
        except Exception as error:  # of its own kinds, and of pybind11's
            raise Unusable(f"refuses it: {_reason(error)}") from error

    return f"openvino {openvino_net.VERSION}", compile_net


def _reason(error: Exception) -> str:
    """The last line of OpenVINO's message; those before it name places in its source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _by_torch(net: Net, threads: int, shape: Shape, batch: int, dtype: torch.dtype) -> Program:
    """The net in torch, which takes any batch size; `shape` and `batch` are ignored."""

    def run(x: Tensor, embedding: Tensor) -> Tensor:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)  # a setting of each thread
        try:
            out: Tensor = net(x.contiguous().to(dtype), embedding.to(dtype)).float()
            return out
        finally:
            torch.set_num_threads(before)

    return lambda: run


def grow_up(net: CpuNet, slots: int) -> None:
    """Grows the net to all its batch sizes."""
    while net.grow(slots):
        pass
