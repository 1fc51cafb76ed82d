"""The hot loop. One step of the whole batch is one function of the slots: captured as a CUDA graph per bucket on a GPU,
run eagerly on a CPU. Here too is the check that a picture's bits do not depend on its bucket, slot or companions.
"""

import bisect
import hashlib
import logging
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from model.checkpoint.load import Model
from model.engine.slots import Slots
from model.nets.build import Net
from model.nets.cpu import CpuNet
from model.nets.exact import Chosen, choose_kernels, trust_libraries
from model.nets.gpu import prepare_gpu
from model.nets.layers import uses_triton
from model.sampling.noise import gaussian
from model.sampling.plan import COLUMNS

logger = logging.getLogger(__name__)


def denoise(net: Net | CpuNet, table: Tensor, slots: Slots, batch: int) -> None:
    """One denoising step of the first `batch` slots, in place: by the algebra, or by two kernels that compute it."""
    if uses_triton(slots.x[0]):
        denoise_by_kernels(net, table, slots, batch)
    else:
        with np.errstate(all="ignore"):  # a picture that is not finite is found out later
            algebra(net, table, slots, batch)


def denoise_by_kernels(net: Net | CpuNet, table: Tensor, slots: Slots, batch: int) -> None:
    """`algebra`, and the noise that belongs to it, with one kernel before the net and one behind it."""
    from model.kernels import step as kernels

    x, cursor = slots.x[:batch], slots.cursor[:batch]  # [b, C, H, W], [b]
    picture, embedding, now = kernels.enter(x, slots.rows, cursor, table, net.reads)
    state = {"rows": slots.rows, "cursor": cursor, "last": slots.last, "seed": slots.seed}
    kernels.update(net(picture, embedding), x, slots.x0, slots.given, now=now, **state)


def algebra(net: Net | CpuNet, table: Tensor, slots: Slots, batch: int) -> None:
    """One denoising step: in numpy on a CPU, in torch on a GPU. See `model.sampling.plan` for the letters."""
    at, library = slots.arrays, slots.library
    x, x0_before, cursor = at.x[:batch], at.x0[:batch], at.cursor[:batch]  # [b, C, H, W] twice, [b]
    row = at.rows[at.order[:batch], cursor]  # [b, 11]
    k, p, q, c, m, h, n, e, s, w, u = row.T[..., None, None, None]  # [b, 1, 1, 1] each
    picture = slots.x[:batch]
    if not isinstance(net, CpuNet):
        picture = picture.to(table.dtype, memory_format=torch.channels_last)
    out = slots.array(net(picture, table[slots.index(k)]).float())  # [b, sum of shares] of the table
    z = slots.noise(batch)
    if net.arch.learned_variance:
        out, f = out[:, : x.shape[1]], out[:, x.shape[1] :]
        z = library.exp(w * f) * z
    x0 = library.clip(p * x + q * out, -c, c)
    x[...] = m * x0 + h * x0_before + n * x + e * out + s * z + u * at.given[:batch]
    x0_before[...] = x0
    cursor[...] = library.minimum(cursor + 1, at.last[:batch])


def usual_buckets(slots: int) -> list[int]:
    """Batch sizes worth capturing: every one up to 16, then ever coarser, ending on `slots`."""
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


class Runner:
    """A model, its slots, and the batch sizes it runs at.

    On a CPU the net itself sees to it that a picture's bits are the same in every batch (`model.nets.cpu`). Elsewhere
    that is found out here. Made in pieces of about a step each, with a call of `between` after each: other models may
    go on then.
    """

    def __init__(
        self,
        model: Model,
        slots: int,
        exact: bool = True,
        buckets: Sequence[int] = (),
        between: Callable[[], None] = lambda: None,
    ) -> None:
        self.model, self.device = model, model.table.device
        if self.device.type == "cuda":
            prepare_gpu(exact, model.table.dtype)
        schedule = model.card.process.schedule
        self.slots = Slots(slots, model.card.architecture.shape, schedule.T, self.device)
        self.buckets = sorted({*buckets, slots}) if buckets else usual_buckets(slots)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.chosen: Chosen | None = None  # on a GPU that promises something
        if isinstance(model.net, CpuNet):
            self.buckets = list(range(1, slots + 1))
            self.exact_buckets, self.bits = (self.buckets, self._bits(model.net)) if exact else ([], "")
        else:
            self.exact_buckets, self.bits = self._prepare(model.net, exact, between)
        # A full batch needs a bucket, even one that promises nothing.
        self.admitted = sorted({*self.exact_buckets, slots}) if exact else self.buckets
        self.note = self._note() if exact or isinstance(model.net, CpuNet) else None  # of the promise, or of the net
        if self.note is not None:
            logger.warning("%s: %s", model.card.name, self.note)

    @torch.inference_mode()
    def _prepare(self, net: Net, exact: bool, between: Callable[[], None]) -> tuple[list[int], str]:
        """Chooses kernels, captures graphs. -> the buckets that keep bits, and a hash of what the check of them came
        to, where something is promised: 8 hexadecimal digits"""
        trust_libraries(net)
        if self.device.type == "cuda":
            self._run_in_pieces(net, between)
        if exact and uses_triton(self.slots.x[0]):
            self.chosen = choose_kernels(net, lambda: self.step(self.buckets[0]), self.buckets, between)
            self._run_in_pieces(net, between)
        if self.device.type == "cuda":
            self.capture(between)
        return self._find_exact(between) if exact else ([], "")

    def _bits(self, net: CpuNet) -> str:
        """The same hash where the net has been checked by itself: of its bits, and of the noise."""
        seeds = torch.arange(4)
        noise = gaussian(seeds, 0 * seeds, self.slots.shape)
        return hashlib.sha256(net.bits.encode() + noise.numpy().tobytes()).hexdigest()[:8]

    @property
    def next_bytes(self) -> int:
        """Memory that the next call of `grow` will take."""
        net = self.model.net
        return net.next_bytes(self.slots.capacity) if isinstance(net, CpuNet) else 0

    def grow(self) -> bool:
        """Compiles the net's next batch size, which makes steps of many pictures faster. Returns whether another will
        follow. May be called from another thread."""
        net = self.model.net
        return isinstance(net, CpuNet) and net.grow(self.slots.capacity)

    @property
    def exact(self) -> bool:
        """Whether a sample's bits are the same in whatever company it is run."""
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
            denoise(self.model.net, self.model.table, self.slots, bucket)

    def _note(self) -> str | None:
        """What is to be said of the check, in a sentence, or None."""
        if isinstance(self.model.net, CpuNet):
            return self.model.net.note
        if not self.exact:
            return "nothing is promised: a picture's bits depend on who is in the batch, or on its slot"
        smallest, others = self.admitted[0], [b for b in self.buckets if b not in self.exact_buckets]
        if smallest == 1:
            return None
        return f"a picture alone takes a batch of {smallest}, since bits are others in batches of {ranges(others)}"

    def _run_in_pieces(self, net: Net, between: Callable[[], None]) -> None:
        """One step with a call of `between` before each layer: whatever has to be compiled for it is compiled now."""

        def pause(layer: nn.Module, arguments: object) -> None:
            between()

        layers = [module for module in net.modules() if not any(True for _ in module.children())]
        hooks = [layer.register_forward_pre_hook(pause) for layer in layers]
        try:
            self.step(self.buckets[0])
        finally:
            for hook in hooks:
                hook.remove()

    def capture(self, between: Callable[[], None] = lambda: None) -> None:
        """One graph per bucket, in place of those there are: all are warmed up first, since a smaller one may need the
        larger workspace, then captured from the largest down, on one stream and in one pool of memory."""
        stream, pool = torch.cuda.Stream(self.device), torch.cuda.graph_pool_handle()
        for bucket in self.buckets:
            stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(stream):
                for _ in range(2):
                    denoise(self.model.net, self.model.table, self.slots, bucket)
            torch.cuda.current_stream(self.device).wait_stream(stream)
            between()
        for bucket in reversed(self.buckets):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                denoise(self.model.net, self.model.table, self.slots, bucket)
            self._graphs[bucket] = graph
            between()

    def _find_exact(self, between: Callable[[], None]) -> tuple[list[int], str]:
        """The buckets in which a sample's bits are those it has in the largest one, in any slot, beside anybody; and a
        hash of those bits, which another start has only if it computes alike."""
        slots, T, everybody = self.slots, self.model.card.process.schedule.T, torch.arange(self.slots.capacity)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(slots.x.shape, generator=generator).to(self.device)  # [B, C, H, W]
        row = torch.randn(slots.capacity, len(COLUMNS), generator=generator).to(self.device)  # [B, 11]
        row[:, 0] = torch.randint(T, (slots.capacity,), generator=generator).to(self.device)
        row[:, 3] = 1.0
        ahead = gaussian(everybody, 0 * everybody, slots.shape) if slots.ahead_steps else None  # [B, C, H, W]

        def results(chosen: Tensor) -> Tensor:
            """One step of these samples, sitting in slots 0, 1, ... -> [b, C, H, W]"""
            count = len(chosen)
            slots.x[:count], slots.rows[:count, 0], slots.seed[:count] = x[chosen], row[chosen], chosen
            slots.x0[:count] = slots.cursor[:count] = 0
            slots.last[:count] = 1
            if ahead is not None:
                slots.ahead[:count] = ahead[chosen, None]
            self.step(count)
            return slots.x[:count].clone()

        expected, exact = results(everybody.to(self.device)), []
        for bucket in self.buckets:
            drawn = (torch.randint(slots.capacity, (bucket,), generator=generator) for _ in range(3))
            draws = [chosen.to(self.device) for chosen in drawn]  # with repetition: other company even in a full batch
            agree = True
            for chosen in draws:
                agree = agree and torch.equal(results(chosen), expected[chosen])
                between()
            if agree:
                exact.append(bucket)
        for slot in range(slots.capacity):
            slots.rows[slot].zero_()
            slots.clear(slot)
        return exact, hashlib.sha256(expected.cpu().numpy().tobytes()).hexdigest()[:8]
