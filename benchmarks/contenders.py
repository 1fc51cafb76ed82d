"""Who takes part in `benchmarks.engine`. `benchmarks.remote` gives each a process of its own.

All take the same model directory. The diffusers ones run `UNet2DModel` and `DDPMScheduler` as `DDPMPipeline` does; ours
runs where diffusers is not.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.models import grow_up
from benchmarks.runtimes import Net, OnnxRuntime, OpenVino, by_torch
from model.checkpoint.card import read_card
from model.checkpoint.load import load_model
from model.engine.engine import Engine
from model.engine.events import Request
from model.engine.runner import prepared
from model.sampling.plan import plan, resolve
from model.sampling.table import COLUMNS
from server.worker.cpus import cores
from server.worker.device import choose_dtype

BARE = "ours, the bare net"


@dataclass(frozen=True, slots=True)
class Setup:
    """What a contender is made for."""

    directory: Path
    device: torch.device
    most: int  # pictures in a batch
    buckets: tuple[int, ...] = ()  # batch sizes that ours captures; if there are none, a server's
    threads: int = 0  # of a CPU; 0: all


class Contender(Protocol):
    """What is measured."""

    def run(self, batch: int, steps: int) -> None:
        """So many denoising steps of a batch."""

    def predict(self, x: Tensor, t: Tensor) -> Tensor:
        """What the net says, by the way a step takes. x: [B, C, H, W] float32, t: [B] int64 -> like x"""


class Ours:
    """Our engine's loop: requests of 1000 steps, replaced as they end."""

    def __init__(self, setup: Setup, exact: bool = True) -> None:
        model = load_model(read_card(setup.directory), setup.device, choose_dtype("auto", setup.device))
        self.engine, self.live = Engine(prepared(model, setup.most, exact, setup.buckets)), list[int]()
        grow_up(model, setup.most)
        process = model.card.process
        self.table, self.next = plan(process, resolve(process, "ddpm", process.schedule.T)), 0

    def run(self, batch: int, steps: int) -> None:
        if len(self.live) != batch:
            self.clear()
        for _ in range(steps):
            while len(self.live) < batch:
                self.engine.submit(Request(self.next, self.next, self.table))
                self.live.append(self.next)
                self.next += 1
            for event in self.engine.step():
                self.live.remove(event.id)  # type: ignore[arg-type]  # ours are numbers

    def clear(self) -> None:
        """Every slot is free."""
        for id in self.live:
            self.engine.cancel(id)
        self.live = []
        self.engine.step()

    @torch.inference_mode()
    def predict(self, x: Tensor, t: Tensor) -> Tensor:
        self.clear()
        runner, count = self.engine.runner, len(x)
        slots = runner.slots
        row = torch.zeros(count, len(COLUMNS))
        row[:, COLUMNS.index("k")], row[:, COLUMNS.index("c")], row[:, COLUMNS.index("e")] = t, 1.0, 1.0
        slots.x[:count], slots.rows[:count, 0] = x.to(slots.x.device), row.to(slots.x.device)
        slots.history[:count] = slots.cursor[:count] = 0
        slots.last[:count] = 1
        runner.step(runner.bucket_for(count))
        out = slots.x[:count].clone()
        for slot in range(count):
            slots.clear(slot)
        return out.cpu()


class BareNet:
    """Our net as it is loaded, with nothing around it: no slots, no noise, no arithmetic of a sampler."""

    def __init__(self, setup: Setup) -> None:
        self.model = load_model(read_card(setup.directory), setup.device, choose_dtype("auto", setup.device))
        grow_up(self.model, setup.most)

    @torch.inference_mode()
    def run(self, batch: int, steps: int) -> None:
        x = torch.randn(batch, *self.model.card.shape).to(self.model.table.dtype)
        rows = self.model.table[torch.arange(batch) % len(self.model.table)]
        for _ in range(steps):
            self.model.net(x, rows)

    @torch.inference_mode()
    def predict(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.model.net(x.to(self.model.table.dtype), self.model.table[t])
        return out.float()


class Theirs:
    """diffusers' loop around a net, in whatever precision and however compiled."""

    def __init__(self, setup: Setup, net: Net, dtype: torch.dtype) -> None:
        from diffusers import DDPMScheduler, UNet2DModel

        self.net, self.device, self.dtype = net, setup.device, dtype
        self.scheduler = DDPMScheduler.from_pretrained(setup.directory)
        self.scheduler.set_timesteps(self.scheduler.config.num_train_timesteps)
        config = UNet2DModel.load_config(setup.directory)
        self.shape = (config["in_channels"], config["sample_size"], config["sample_size"])

    @torch.no_grad()
    def run(self, batch: int, steps: int) -> None:
        x = torch.randn(batch, *self.shape, device=self.device, dtype=self.dtype)
        for t in self.scheduler.timesteps.tolist()[:steps]:
            out = self.net(x, torch.full((batch,), t, device=self.device))
            x = self.scheduler.step(out, t, x).prev_sample

    @torch.no_grad()
    def predict(self, x: Tensor, t: Tensor) -> Tensor:
        return self.net(x.to(self.device, self.dtype), t.to(self.device)).float().cpu()


class Graphed(Theirs):
    """diffusers' net and its scheduler's formula in one CUDA graph per batch size, with nothing of ours in it."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup, by_torch(setup.directory, setup.device, torch.bfloat16, True), torch.bfloat16)
        bar = self.scheduler.alphas_cumprod.double()
        before = torch.cat([torch.ones(1).double(), bar[:-1]])
        alpha, beta = bar / before, 1 - bar / before
        x0, x = before.sqrt() * beta / (1 - bar), alpha.sqrt() * (1 - before) / (1 - bar)
        noise = beta.sqrt()
        noise[0] = 0
        rows = torch.stack([bar.rsqrt(), -(1 / bar - 1).sqrt(), x0, x, noise], 1)  # [T, 5]
        self.rows = rows.float().to(self.device)
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor]] = {}  # with x, t and out, by batch

    @torch.inference_mode()
    def _graph(self, batch: int) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor]:
        if batch not in self.graphs:
            x = torch.randn(batch, *self.shape, device=self.device)
            t = torch.full((batch,), len(self.rows) - 1, device=self.device)
            out = torch.empty_like(x)

            def step() -> None:
                p, q, m, n, s = self.rows[t].view(batch, 5, 1, 1, 1).unbind(1)
                out.copy_(self.net(x.to(self.dtype, memory_format=torch.channels_last), t))
                x0 = torch.clamp(p * x + q * out, -1, 1)
                x.copy_(m * x0 + n * x + s * torch.randn_like(x))
                t.copy_(torch.clamp(t - 1, min=0))

            stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    step()
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph, stream=stream):
                step()
            self.graphs[batch] = graph, x, t, out
        return self.graphs[batch]

    def run(self, batch: int, steps: int) -> None:
        graph, *_ = self._graph(batch)
        for _ in range(steps):
            graph.replay()

    @torch.inference_mode()
    def predict(self, x: Tensor, t: Tensor) -> Tensor:
        graph, x_in, t_in, out = self._graph(len(x))
        x_in.copy_(x)
        t_in.copy_(t)
        graph.replay()
        return out.cpu()


def eager(setup: Setup, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> Theirs:
    """diffusers as it comes."""
    return Theirs(setup, by_torch(setup.directory, setup.device, dtype, channels_last), dtype)


def compiled(setup: Setup, dtype: torch.dtype, **options: Any) -> Theirs:
    """diffusers' net through torch.compile; `freezing` is inductor's, the others are torch.compile's."""
    import torch._inductor.config as inductor

    inductor.freezing = options.pop("freezing", False)
    if options.get("mode") == "max-autotune":  # as huggingface/diffusion-fast sets it
        inductor.conv_1x1_as_mm = inductor.coordinate_descent_tuning = True
        inductor.coordinate_descent_check_all_directions, inductor.epilogue_fusion = True, False
    net: Net = torch.compile(by_torch(setup.directory, setup.device, dtype, True), dynamic=False, **options)
    return Theirs(setup, lambda x, t: net(x, t).clone(), dtype)


def openvino(setup: Setup, precision: str) -> Theirs:
    """diffusers' loop around its net in OpenVINO, one compiled model for each batch size."""
    return Theirs(setup, OpenVino(setup.directory, precision, setup.threads or cores()), torch.float32)


def onnxruntime(setup: Setup) -> Theirs:
    """diffusers' loop around its net in onnxruntime, one graph for each batch size."""
    return Theirs(setup, OnnxRuntime(setup.directory, setup.threads or cores()), torch.float32)


BF16 = torch.bfloat16
Maker = Callable[[Setup], Contender]
EVERYWHERE: dict[str, Maker] = {
    "ours": Ours,
    "diffusers": eager,
    "diffusers, bfloat16": partial(eager, dtype=BF16, channels_last=True),
}
ON_GPU = EVERYWHERE | {"ours, EXACT=0": partial(Ours, exact=False), "diffusers, bare CUDA graph": Graphed}
ON_CPU = EVERYWHERE | {
    BARE: BareNet,
    "OpenVINO, float32": partial(openvino, precision="f32"),
    "OpenVINO, bfloat16": partial(openvino, precision="bf16"),
    "onnxruntime, float32": onnxruntime,
}
COMPILED_ON_CPU = ON_CPU | {
    "torch.compile with freezing, float32": partial(compiled, dtype=torch.float32, freezing=True),
    "torch.compile with freezing, bfloat16": partial(compiled, dtype=BF16, freezing=True),
}
COMPILED_ON_GPU: dict[str, Maker] = {
    "ours": Ours,
    "torch.compile, reduce-overhead": partial(compiled, dtype=BF16, mode="reduce-overhead", fullgraph=True),
    "torch.compile, max-autotune": partial(compiled, dtype=BF16, mode="max-autotune", fullgraph=True),
}
# What takes the place of the compilers where only the way to them is tried.
NOT_COMPILED: dict[str, Maker] = {"torch.compile, eager": partial(compiled, dtype=torch.float32, backend="eager")}
ALL = ON_GPU | COMPILED_ON_CPU | COMPILED_ON_GPU | NOT_COMPILED
