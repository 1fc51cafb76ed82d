"""A net on a CPU: run by OpenVINO, or by torch where OpenVINO cannot be used, for a few sizes of batch.

A batch of any size is run as batches of these sizes, the largest first. A net can be used as soon as it runs one
picture at a time; `grow` adds a larger size, from another thread if need be. A size is used only if a picture's bits
are in it what they are alone, so no picture shows which sizes there are.
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
    """OpenVINO does not run a net. The message says why, behind "OpenVINO"."""


def supports(dtype: torch.dtype) -> bool:
    """Whether this processor computes in such numbers, and does not only imitate them."""
    try:
        from model import openvino_net
    except Exception:  # what is wrong with it is told when a net is to be run
        return dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return openvino_net.computes_in(dtype)


def sizes_up_to(slots: int, arch: Architecture | LucidArchitecture, parameters: int, dtype: torch.dtype) -> list[int]:
    """The sizes of batch that a net has, once it has grown to so many pictures."""
    sizes, taken = [1], size_bytes(1, arch, parameters, dtype)
    for size in SIZES[1:]:
        taken += size_bytes(size, arch, parameters, dtype)
        if size <= slots and taken <= SIZES_BYTES:
            sizes.append(size)
    return sizes


def size_bytes(size: int, arch: Architecture | LucidArchitecture, parameters: int, dtype: torch.dtype) -> int:
    """What a size of batch takes: weights of its own, and what is alive in a step for each picture."""
    return int(dtype.itemsize) * (parameters + size * alive(arch))


def checked_shape(arch: Architecture | LucidArchitecture) -> Shape:
    """What a net is compared with torch on: its own pictures, or smaller ones that can be halved as often."""
    channels, *sides = arch.shape
    side = max(CHECKED_SIDE, 1 << arch.levels)
    height, width = (side if given > side and given % side == 0 else given for given in sides)
    return channels, height, width


class CpuNet:
    """A net for batches of any size. x: [B, C, H, W], embedding: [B, P], of float32 -> [B, out, H, W] float32

    table: [T, P] float32, rows of embeddings. dtype: of the numbers inside the net. unusable: why OpenVINO is not
    tried, if it is not, in words that go on behind its name.
    """

    def __init__(self, net: Net, table: Tensor, dtype: torch.dtype, unusable: str = "") -> None:
        self.arch, self.dtype, self.threads = net.arch, dtype, torch.get_num_threads()
        self.embedding_width, self.reads = net.embedding_width, net.reads
        self.parameters = sum(p.numel() for p in net.parameters())
        self.note: str | None = None  # why OpenVINO does not run it
        self._table, self._alone = table, list[Tensor]()  # what each of the pictures that sizes are checked by is alone
        self._grown = 1  # the last size that was tried
        shape = self._shape = checked_shape(net.arch)
        try:
            if unusable:
                raise Unusable(unusable)
            self.runtime, compile_net = _openvino(net, self.threads)
            checked = self._checked(net, compile_net)
        except Unusable as error:
            self.note = f"run by torch, since OpenVINO {error}"
            self.runtime, compile_net = f"torch {torch.__version__}", partial(_by_torch, net.to(dtype), self.threads)
            checked = compile_net(shape, 1, dtype)
        self._trial: Run | None = checked()
        self.bits = _hash(self._trial(*self._given(1, shape)))  # what tells two machines apart that compute otherwise
        self._first = checked if shape == self.arch.shape else compile_net(self.arch.shape, 1, dtype)
        self._runs: dict[int, Run] = {1: self._first()}
        self._compile: Compile | None = compile_net  # until no size is left to come

    @property
    def sizes(self) -> list[int]:
        """The sizes of batch there are."""
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
        """Adds the next size of batch, if a picture's bits are in it what they are alone. -> whether more will come

        slots: the most pictures there will be. May be called from another thread than the one that uses the net.
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
            self._compile = None  # and with it torch's weights
        return self._compile is not None

    def _add(self, program: Program) -> None:
        if self._agrees(program(), self._grown):
            self._runs = self._runs | {self._grown: program()}
        else:
            logger.warning("batches of %d are not used, since a picture's bits are others in them", self._grown)

    def _agrees(self, run: Run, size: int) -> bool:
        """Whether two pictures have in each place of a batch, and in changed company, the bits they have alone."""
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
        """The net by OpenVINO for one picture of the shape that is checked. Raises Unusable unless torch agrees."""
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
        """Runs the picture that was checked once more, to be timed. -> how many pixels of its own a picture has"""
        run, self._trial = self._trial, None
        assert run is not None, "it has been rehearsed"
        run(*self._given(1, self._shape))
        return math.prod(self.arch.shape) / math.prod(self._shape)


def _hash(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()[:8]


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def _openvino(net: Net, threads: int) -> tuple[str, Compile]:
    """What a net is run by, and how it is compiled. Raises Unusable, as does what is returned."""
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
    """In one line: the last, before which OpenVINO tells where in its sources that was."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _by_torch(net: Net, threads: int, shape: Shape, batch: int, dtype: torch.dtype) -> Program:
    """torch takes batches of any size."""

    def run(x: Tensor, embedding: Tensor) -> Tensor:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)  # each thread has a number of its own
        try:
            out: Tensor = net(x.contiguous().to(dtype), embedding.to(dtype)).float()
            return out
        finally:
            torch.set_num_threads(before)

    return lambda: run


def grow_up(net: CpuNet, slots: int) -> None:
    """Adds every size of batch there will be."""
    while net.grow(slots):
        pass
