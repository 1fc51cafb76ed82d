"""Runs a net on a CPU: with OpenVINO, or with torch where OpenVINO cannot be used.

The net is compiled for a few batch sizes, and a batch of any size is split into these, the largest first. A net is
usable once it is compiled for one picture; `grow` adds the next larger size, and may be called from another thread. A
size is used only if a picture has the same bits in it as alone, so results never depend on the sizes there are. torch
computes one picture at a time.
"""

import logging
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from model.digests import short_digest
from model.errors import attempt
from model.nets.activations import size_bytes, sizes_up_to
from model.nets.build import Net
from model.nets.lucidrains_config import AnyArchitecture

PADDED = 8  # from this size on, a batch with one picture too few is run with any picture in its place
CHECKED_SIDE = 64  # pixels: larger nets are compared with torch on a picture of this size, to save time
CONVERTED = 1e-4  # the most that OpenVINO may differ from torch, both in float32: |difference| / |largest number|
ROUNDED = 0.1  # the same in half precision, where it shows no more than that this is the same net

Shape: TypeAlias = tuple[int, int, int]  # C, H, W
Run: TypeAlias = Callable[[Tensor, Tensor], Tensor]  # (x, embedding) -> out, valid until the next call
Program: TypeAlias = Callable[[], Run]  # a net for one batch size; each call gives a Run that one thread may use
Compile: TypeAlias = Callable[[Shape, int, torch.dtype], Program]  # (shape of a picture, batch size, dtype)
logger = logging.getLogger(__name__)


class Unusable(Exception):
    """OpenVINO cannot run a net. The message is a predicate whose subject is "OpenVINO"."""


def supports(dtype: torch.dtype) -> bool:
    """Whether this processor has native instructions for `dtype`."""

    def ask_openvino() -> bool:
        from model.nets import openvino_graph

        return openvino_graph.computes_in(dtype)

    supported = attempt(ask_openvino)
    if isinstance(supported, Exception):  # which `CpuNet` reports when a net is to be run
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return dtype == torch.bfloat16 and native
    return supported


def checked_shape(arch: AnyArchitecture) -> Shape:
    """The shape of the test picture: that of the net's own, or a smaller one with as many levels."""
    channels, *sides = arch.shape
    side = max(CHECKED_SIDE, 1 << arch.levels)
    height, width = (side if given > side and given % side == 0 else given for given in sides)
    return channels, height, width


class CpuNet:
    """A net for batches of any size. x: [B, C, H, W], embedding: [B, W], float32 -> [B, out, H, W] float32

    table: [T + L, W] float32, embeddings of timesteps and labels; dtype: in the net, which has so many parameters
    unusable: the reason not to try OpenVINO, as a predicate; or nothing
    """

    def __init__(self, net: Net, table: Tensor, dtype: torch.dtype, parameters: int, unusable: str = "") -> None:
        self.arch, self.dtype, self.parameters, self.threads = net.arch, dtype, parameters, torch.get_num_threads()
        self.embedding_width, self.reads, self.labels = net.embedding_width, net.reads, net.labels
        self.note: str | None = None  # a sentence, if OpenVINO does not run it
        self.runtime = f"torch {torch.__version__}"
        self._table, self._expected = table, list[Tensor]()  # the results of the two test pictures, each alone
        self._last_tried = 1  # batch size
        self._compile: Compile | None = None  # None when no more sizes are to be compiled
        self._runs: dict[int, Run] = {}
        try:
            if unusable:
                raise Unusable(unusable)
            self.runtime, self._compile = _openvino(net, self.threads)
            self._begin(net, self._compile)
        except torch.OutOfMemoryError:
            raise
        except (Unusable, RuntimeError) as error:  # RuntimeError comes from the first run of a compiled net
            self.note, self._compile = f"run by torch, since OpenVINO {_predicate(error)}", None
            self.runtime = f"torch {torch.__version__}"
            self._use(partial(_by_torch, net.to(dtype), self.threads))

    @property
    def sizes(self) -> list[int]:
        """The batch sizes compiled so far."""
        return sorted(self._runs)

    def __call__(self, x: Tensor, embedding: Tensor) -> Tensor:
        parts, begin, runs = list[Tensor](), 0, self._runs
        for size in sorted(runs, reverse=True):
            least = size - 1 if size >= PADDED else size
            while len(x) - begin >= least:
                end = begin + size
                parts.append(runs[size](x[begin:end], embedding[begin:end]).clone())
                begin = end
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def to_come(self, slots: int) -> list[int]:
        """The batch sizes still to be compiled. slots: the largest batch that will be run"""
        if self._compile is None:
            return []
        return [s for s in sizes_up_to(slots, self.arch, self.parameters, self.dtype) if s > self._last_tried]

    def next_bytes(self, slots: int) -> int:
        """Memory that the next call of `grow` will take."""
        return sum(size_bytes(size, self.arch, self.parameters, self.dtype) for size in self.to_come(slots)[:1])

    @torch.inference_mode()
    def grow(self, slots: int) -> bool:
        """Compiles the next batch size, and uses it if a picture has the same bits in it as alone. Returns whether
        another size is left."""
        for size in self.to_come(slots)[:1]:
            assert self._compile is not None
            self._last_tried = size
            try:
                program = self._compile(self.arch.shape, size, self.dtype)
                if self._agrees(program(), size):
                    self._runs = self._runs | {size: program()}
                else:
                    logger.warning("batches of %d are not used: a picture's bits differ in them", size)
            except (Unusable, RuntimeError, MemoryError) as error:
                logger.warning("batches of %d or more are not used, since OpenVINO %s", size, _predicate(error))
                self._compile = None
        if not self.to_come(slots):
            self._compile = None  # so that torch's weights are freed
        return self._compile is not None

    def _agrees(self, run: Run, size: int) -> bool:
        """Whether each of two pictures has the bits it has alone in every place of a batch, beside any others."""
        x, embedding = self._test_inputs(2, self.arch.shape)
        if not self._expected:
            alone = self._first()
            self._expected = [alone(x[i : i + 1], embedding[i : i + 1])[0].clone() for i in range(2)]
        first = torch.randint(2, (size,), generator=torch.Generator().manual_seed(size))
        for chosen in (first, 1 - first):
            out = run(x[chosen], embedding[chosen])
            pairs = zip(out, chosen.tolist(), strict=True)
            if not all(torch.equal(picture, self._expected[i]) for picture, i in pairs):
                return False
        return True

    def _test_inputs(self, batch: int, shape: Shape) -> tuple[Tensor, Tensor]:
        """Random pictures, and embeddings of random timesteps and labels; the same ones at each call."""
        generator = torch.Generator().manual_seed(0)
        x, T = torch.randn(batch, *shape, generator=generator), len(self._table) - self.labels
        embedding = self._table[torch.randint(T, (batch,), generator=generator)]
        if self.labels:
            embedding = embedding + self._table[T:][torch.randint(self.labels, (batch,), generator=generator)]
        return x, embedding

    def _begin(self, net: Net, compile_net: Compile) -> None:
        """Compiles the net for one picture. Raises Unusable if its result differs from torch's."""
        shape = checked_shape(self.arch)
        given = self._test_inputs(1, shape)
        expected, half = net(*given), self.dtype != torch.float32
        if half:
            _compare(compile_net(shape, 1, torch.float32)()(*given), expected, CONVERTED, torch.float32)
        self._use(compile_net)
        _compare(self._test_result, expected, ROUNDED if half else CONVERTED, self.dtype)

    def _use(self, compile_net: Compile) -> None:
        """Compiles the net for one picture by this, runs the test picture, and uses it from now on."""
        shape = checked_shape(self.arch)
        program, given = compile_net(shape, 1, self.dtype), self._test_inputs(1, shape)
        run = program()
        self._test_result = run(*given).clone()
        self.bits = short_digest(self._test_result.numpy().tobytes())  # other machines may compute others
        began = time.perf_counter()
        run(*given)
        smaller = math.prod(shape) / math.prod(self.arch.shape)
        self.picture_s = (time.perf_counter() - began) / smaller  # the estimated duration of a step of one picture
        self._first = program if smaller == 1 else compile_net(self.arch.shape, 1, self.dtype)
        self._runs = {1: self._first()}


def _compare(found: Tensor, expected: Tensor, most: float, dtype: torch.dtype) -> None:
    error = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    if not error <= most:
        words = f"makes an error of {error:.1e} beside torch in {str(dtype).removeprefix('torch.')}"
        raise Unusable(f"{words}, where {most:.0e} is allowed")


def _openvino(net: Net, threads: int) -> tuple[str, Compile]:
    """The runtime's name and version, and a function that compiles the net. Both raise Unusable."""

    def import_graph() -> Any:
        from model.nets import openvino_graph

        return openvino_graph

    graph = attempt(import_graph)  # it may be missing, or lack a symbol or a library
    if isinstance(graph, Exception):
        raise Unusable(f"cannot be imported: {_reason(graph)}") from graph

    def compile_net(shape: Shape, batch: int, dtype: torch.dtype) -> Program:
        if not graph.computes_in(dtype):
            raise Unusable(f"does not compute in {str(dtype).removeprefix('torch.')} on this processor")
        program: Program = graph.compile_net(net, shape, batch, dtype, threads)
        program()
        return program

    def compile_or_refuse(shape: Shape, batch: int, dtype: torch.dtype) -> Program:
        program = attempt(lambda: compile_net(shape, batch, dtype))
        if not isinstance(program, Exception):
            return program
        if isinstance(program, MemoryError) or "bad_alloc" in str(program):
            raise torch.OutOfMemoryError(f"has no memory for batches of {batch}") from program
        raise Unusable(_predicate(program)) from program

    return f"openvino {graph.VERSION}", compile_or_refuse


def _predicate(error: Exception) -> str:
    return str(error) if isinstance(error, Unusable | torch.OutOfMemoryError) else f"refuses it: {_reason(error)}"


def _reason(error: Exception) -> str:
    """The last line of OpenVINO's message, behind lines with places in its source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _by_torch(net: Net, threads: int, shape: Shape, batch: int, dtype: torch.dtype) -> Program:
    """The net in torch, which runs any batch size: `shape` and `batch` are ignored."""

    def run(x: Tensor, embedding: Tensor) -> Tensor:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)  # the setting is the thread's own
        try:
            out: Tensor = net(x.to(dtype), embedding.to(dtype)).float()
            return out
        finally:
            torch.set_num_threads(before)

    return lambda: run


def grow_up(net: CpuNet, slots: int) -> None:
    """Grows the net to all its batch sizes."""
    while net.grow(slots):
        pass
