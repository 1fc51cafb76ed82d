"""Runs a model's steps: one captured CUDA graph per batch size on a GPU, the eager step on a CPU.

`Runner(...)` is cheap; `Runner.prepare()` is a generator that compiles, captures and checks in pieces of about one step
each, so that other models make their steps in between.
"""

import bisect
import logging
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from model.checkpoint.load import Model
from model.digests import short_digest
from model.engine.exactness import find_exact, noise_bytes, plan_bytes
from model.engine.readout import warm_up
from model.engine.slots import Slots
from model.engine.step import denoise
from model.kernels.gpu import prepare_gpu
from model.nets.build import Net
from model.nets.cpu import CpuNet
from model.nets.exact import Chosen, choose_kernels, fits_kernels, use_libraries
from model.nets.layers import uses_triton

logger = logging.getLogger(__name__)


def usual_buckets(slots: int) -> list[int]:
    """Batch sizes worth capturing: each up to 16, then in growing intervals, the last of them `slots`."""
    grid = [*range(1, 17), *range(18, 33, 2), *range(36, 65, 4), *range(72, 129, 8), *range(144, 1025, 16)]
    return [b for b in grid if b < slots] + [slots]


def ranges(numbers: Sequence[int]) -> str:
    """1-4,6 for [1, 2, 3, 4, 6], none for []."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts) or "none"


class _Reached(Exception):
    """A step has computed one more kind of layer than the step before it, and is given up."""


class Runner:
    """A model, its slots, and the batch sizes at which it runs. It can make steps once `prepare` is exhausted.

    On a CPU the net itself ensures that a picture's bits are the same in every batch (`model.nets.cpu`); elsewhere
    `prepare` finds the batch sizes in which they are.
    """

    def __init__(self, model: Model, slots: int, exact: bool = True, buckets: Sequence[int] = ()) -> None:
        """buckets: batch sizes to use on a GPU, in place of `usual_buckets`; exact: whether to promise the same bits in
        every batch, and so to use only batch sizes that keep them"""
        self.model, self.device = model, model.table.device
        schedule = model.card.process.schedule
        self.slots = Slots(slots, model.card.shape, schedule.T, self.device)
        if isinstance(model.net, CpuNet):
            self.buckets = list(range(1, slots + 1))
        else:
            self.buckets = sorted({*buckets, slots}) if buckets else usual_buckets(slots)
        self.exact_buckets: list[int] = []  # in which a picture's bits are always the same
        self.admitted: list[int] = []  # that are used
        self.bits = ""  # digest of what the check computed and of some plans, where something is promised
        self.chosen: Chosen | None = None  # on a GPU that promises something
        self.note: str | None = None  # a sentence about the promise, or about the net
        self._promises = exact
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

    @torch.inference_mode()
    def prepare(self) -> Iterator[None]:
        """Makes the runner ready for its first step, and yields after each piece of that work."""
        net = self.model.net
        if not isinstance(net, CpuNet):
            yield from self._prepare_layers(net)
        elif self._promises:
            self.exact_buckets, self.bits = self.buckets, short_digest(net.bits.encode(), noise_bytes(self.slots.shape))
        if self.bits:
            self.bits = short_digest(self.bits.encode(), plan_bytes(self.model.card.process))
        # A full batch needs a bucket, even one that promises nothing.
        self.admitted = sorted({*self.exact_buckets, self.slots.capacity}) if self._promises else self.buckets
        self.note = self._note()
        if self.note is not None:
            logger.warning("%s: %s", self.model.card.name, self.note)

    def _prepare_layers(self, net: Net) -> Iterator[None]:
        """Chooses kernels, captures graphs and finds the exact batch sizes of a net that consists of torch's layers."""
        if self.device.type == "cuda":
            prepare_gpu(self._promises, self.model.table.dtype)
        yield from warm_up(self.slots)
        use_libraries(net)
        if self.device.type == "cuda":
            yield from self._compile(net)
        if self._promises and uses_triton(self.slots.x) and fits_kernels(net):
            self.chosen = yield from choose_kernels(net, lambda: self.step(self.buckets[0]), self.buckets)
            yield from self._compile(net)
        if self.device.type == "cuda":
            yield from self.capture()
        if self._promises:
            T = self.model.card.process.schedule.T
            found = yield from find_exact(self.slots, T, self.buckets, self.step, net.labels)
            self.exact_buckets, self.bits = found

    @property
    def next_bytes(self) -> int:
        """Memory that the next call of `grow` will take."""
        net = self.model.net
        return net.next_bytes(self.slots.capacity) if isinstance(net, CpuNet) else 0

    def grow(self) -> bool:
        """Compiles the net's next batch size, which makes steps of many pictures faster. Returns whether another is
        left to compile. May be called from another thread."""
        net = self.model.net
        return isinstance(net, CpuNet) and net.grow(self.slots.capacity)

    @property
    def exact(self) -> bool:
        """Whether a sample's bits are the same in every batch."""
        return self.admitted == self.exact_buckets

    def bucket_for(self, count: int) -> int:
        """The smallest admitted batch size that holds `count` samples."""
        return self.admitted[bisect.bisect_left(self.admitted, count)]

    @torch.inference_mode()
    def step(self, bucket: int) -> None:
        """One denoising step of the first `bucket` slots."""
        if bucket in self._graphs:
            self._graphs[bucket].replay()
        else:
            self._denoise(bucket)

    def _denoise(self, bucket: int) -> None:
        """The same, as a graph captures it."""
        thresholding = self.model.card.process.thresholding
        denoise(self.model.net, self.model.table, self.slots, bucket, thresholding)

    def _note(self) -> str | None:
        """A sentence about what the check found, or about the net; None if there is nothing to say."""
        if isinstance(self.model.net, CpuNet):
            return self.model.net.note
        if not self._promises:
            return None
        if not self.exact:
            return "nothing is promised: a picture's bits depend on who is in the batch, or on its slot"
        smallest, others = self.admitted[0], [b for b in self.buckets if b not in self.exact_buckets]
        if smallest == 1:
            return None
        return f"a picture alone takes a batch of {smallest}, since bits are others in batches of {ranges(others)}"

    def _compile(self, net: Net) -> Iterator[None]:
        """Compiles what the layers call, one kind of layer after another: a kernel is compiled at its first call."""
        reached: set[Hashable] = set()
        while not self._step_to_next(net, reached):
            yield
        yield

    def _step_to_next(self, net: Net, reached: set[Hashable]) -> bool:
        """Begins a step, and gives it up behind the first kind of layer that is not in `reached`, which is added.
        Returns whether the step came to its end."""
        known = len(reached)

        def enter(layer: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            given = (*arguments, *named.values())
            kind = (type(layer), layer.extra_repr(), *(each.shape for each in given if isinstance(each, Tensor)))
            if kind not in reached and len(reached) > known:
                raise _Reached
            reached.add(kind)

        layers = [module for module in net.modules() if not any(True for _ in module.children())]
        hooks = [layer.register_forward_pre_hook(enter, with_kwargs=True) for layer in layers]
        try:
            self.step(self.buckets[0])
        except _Reached:
            return False
        finally:
            for hook in hooks:
                hook.remove()
        return True

    @torch.inference_mode()
    def capture(self) -> Iterator[None]:
        """Captures one graph per bucket, in place of those there are, and yields after each.

        All buckets are warmed up first, since a smaller one may need the larger workspace. Then they are captured from
        the largest down, on one stream and in one pool of memory.
        """
        stream, pool = torch.cuda.Stream(self.device), torch.cuda.graph_pool_handle()
        for bucket in self.buckets:
            stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(stream):
                for _ in range(2):
                    self._denoise(bucket)
            torch.cuda.current_stream(self.device).wait_stream(stream)
            yield
        for bucket in reversed(self.buckets):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                self._denoise(bucket)
            self._graphs[bucket] = graph
            yield


def prepared(model: Model, slots: int, exact: bool = True, buckets: Sequence[int] = ()) -> Runner:
    """A runner that is ready, for callers with nothing else to do meanwhile. See `Runner`."""
    runner = Runner(model, slots, exact, buckets)
    for _ in runner.prepare():
        pass
    return runner
