"""Who takes part in `benchmarks.engine`: each in a process of its own, asked through a pipe.

All take the same model directory. The diffusers ones run `UNet2DModel` and `DDPMScheduler` as `DDPMPipeline` does.
"""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor

from model.card import read_card
from model.checkpoint import load_model
from model.engine import Engine
from model.events import Request
from model.plan import COLUMNS, plan, resolve
from model.runner import Runner
from server.devices import cores
from server.machine import choose_dtype, prepare_cpu

Net = Callable[[Tensor, Tensor], Tensor]  # (x [B, C, H, W], t [B]) -> [B, C, H, W]


class Contender(Protocol):
    """What is measured."""

    def run(self, batch: int, steps: int) -> None:
        """So many denoising steps of a batch."""

    def predict(self, x: Tensor, t: Tensor) -> Tensor:
        """What the net says, by the way a step takes. x: [B, C, H, W] float32, t: [B] int64 -> like x"""


class Ours:
    """Our engine's loop: requests of 1000 steps, replaced as they end."""

    def __init__(self, directory: Path, device: torch.device, most: int, exact: bool = True) -> None:
        model = load_model(read_card(directory), device, choose_dtype("auto", device))
        self.engine, self.live = Engine(Runner(model, most, exact)), list[int]()
        process = model.card.process
        self.table, self.next = plan(process, resolve(process, "ddpm", process.schedule.T)), 0

    def run(self, batch: int, steps: int) -> None:
        if len(self.live) != batch:
            self._clear()
        for _ in range(steps):
            while len(self.live) < batch:
                self.engine.submit(Request(self.next, self.next, self.table))
                self.live.append(self.next)
                self.next += 1
            for event in self.engine.step():
                self.live.remove(event.id)  # type: ignore[arg-type]  # ours are numbers

    def _clear(self) -> None:
        for id in self.live:
            self.engine.cancel(id)
        self.live = []
        self.engine.step()

    @torch.inference_mode()
    def predict(self, x: Tensor, t: Tensor) -> Tensor:
        self._clear()
        runner, count = self.engine.runner, len(x)
        slots = runner.slots
        row = torch.zeros(count, len(COLUMNS))
        row[:, COLUMNS.index("k")], row[:, COLUMNS.index("c")], row[:, COLUMNS.index("e")] = t, 1.0, 1.0
        slots.x[:count], slots.rows[:count, 0] = x.to(slots.x.device), row.to(slots.x.device)
        slots.x0[:count] = slots.cursor[:count] = 0
        slots.last[:count] = 1
        runner.step(runner.bucket_for(count))
        out = slots.x[:count].clone()
        for slot in range(count):
            slots.clear(slot)
        return out.cpu()


class Theirs:
    """diffusers' loop around a net, in whatever precision and however compiled."""

    def __init__(self, directory: Path, device: torch.device, net: Net, dtype: torch.dtype) -> None:
        self.net, self.device, self.dtype = net, device, dtype
        self.scheduler = DDPMScheduler.from_pretrained(directory)
        self.scheduler.set_timesteps(self.scheduler.config.num_train_timesteps)
        config = UNet2DModel.load_config(directory)
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

    def __init__(self, directory: Path, device: torch.device, most: int) -> None:
        super().__init__(directory, device, load(directory, device, torch.bfloat16, True), torch.bfloat16)
        bar = self.scheduler.alphas_cumprod.double()
        before = torch.cat([torch.ones(1).double(), bar[:-1]])
        alpha, beta = bar / before, 1 - bar / before
        x0, x = before.sqrt() * beta / (1 - bar), alpha.sqrt() * (1 - before) / (1 - bar)
        noise = beta.sqrt()
        noise[0] = 0
        rows = torch.stack([bar.rsqrt(), -(1 / bar - 1).sqrt(), x0, x, noise], 1)  # [T, 5]
        self.rows = rows.float().to(device)
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


def load(directory: Path, device: torch.device, dtype: torch.dtype, channels_last: bool) -> Any:
    """diffusers' net as a function of (x, t)."""
    net = UNet2DModel.from_pretrained(directory, low_cpu_mem_usage=False).eval().to(device, dtype)
    if channels_last:
        net = net.to(memory_format=torch.channels_last)

    def run(x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = net(x, t, return_dict=False)[0]
        return out

    return run


def eager(
    directory: Path, device: torch.device, most: int, dtype: torch.dtype = torch.float32, channels_last: bool = False
) -> Theirs:
    """diffusers as it comes."""
    return Theirs(directory, device, load(directory, device, dtype, channels_last), dtype)


def compiled(directory: Path, device: torch.device, most: int, dtype: torch.dtype, **options: Any) -> Theirs:
    """diffusers' net through torch.compile; `freezing` is inductor's, the others are torch.compile's."""
    import torch._inductor.config as inductor

    inductor.freezing = options.pop("freezing", False)
    if options.get("mode") == "max-autotune":  # as huggingface/diffusion-fast sets it
        inductor.conv_1x1_as_mm = inductor.coordinate_descent_tuning = True
        inductor.coordinate_descent_check_all_directions, inductor.epilogue_fusion = True, False
    net: Net = torch.compile(load(directory, device, dtype, True), dynamic=False, **options)
    return Theirs(directory, device, lambda x, t: net(x, t).clone(), dtype)


def openvino(directory: Path, device: torch.device, most: int, precision: str) -> Theirs:
    """diffusers' net through OpenVINO, compiled anew for each batch size."""
    import openvino as ov

    core, made = ov.Core(), dict[int, Any]()

    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = UNet2DModel.from_pretrained(directory, low_cpu_mem_usage=False).eval()

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            out: Tensor = self.net(x, t, return_dict=False)[0]
            return out

    def run(x: Tensor, t: Tensor) -> Tensor:
        if len(x) not in made:
            graph = ov.convert_model(Module(), example_input=(x, t), input=[x.shape, t.shape])
            hints = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": cores()}
            made[len(x)] = core.compile_model(graph, "CPU", hints | {"PERFORMANCE_HINT": "LATENCY"})
        return torch.from_numpy(made[len(x)]([x.numpy(), t.numpy()])[0])

    return Theirs(directory, device, run, torch.float32)


BF16 = torch.bfloat16
EVERYWHERE: dict[str, Callable[[Path, torch.device, int], Contender]] = {
    "ours": Ours,
    "diffusers": eager,
    "diffusers, bfloat16": partial(eager, dtype=BF16, channels_last=True),
}
ON_GPU = EVERYWHERE | {"ours, EXACT=0": partial(Ours, exact=False), "diffusers, bare CUDA graph": Graphed}
COMPILED_ON_CPU = EVERYWHERE | {
    "torch.compile with freezing, float32": partial(compiled, dtype=torch.float32, freezing=True),
    "torch.compile with freezing, bfloat16": partial(compiled, dtype=BF16, freezing=True),
    "OpenVINO, float32": partial(openvino, precision="f32"),
    "OpenVINO, bfloat16": partial(openvino, precision="bf16"),
}
COMPILED_ON_GPU: dict[str, Callable[[Path, torch.device, int], Contender]] = {
    "ours": Ours,
    "torch.compile, reduce-overhead": partial(compiled, dtype=BF16, mode="reduce-overhead", fullgraph=True),
    "torch.compile, max-autotune": partial(compiled, dtype=BF16, mode="max-autotune", fullgraph=True),
}
ALL = ON_GPU | COMPILED_ON_CPU | COMPILED_ON_GPU


@dataclass(slots=True)
class Remote:
    """A contender in its own process. Every question may raise RuntimeError, with what went wrong over there."""

    name: str
    pipe: Connection
    process: Any

    @classmethod
    def start(cls, name: str, directory: Path, device: torch.device, most: int) -> "Remote":
        """Begins to load it."""
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, name, directory, device, most), daemon=True)
        process.start()
        theirs.close()
        return cls(name, ours, process)

    def answer(self) -> Any:
        """The next answer."""
        try:
            kind, value = self.pipe.recv()
        except EOFError as error:
            raise RuntimeError(f"{self.name} ended without a word") from error
        if kind == "failed":
            raise RuntimeError(f"{self.name}: {value}")
        return value

    def ask(self, verb: str, *arguments: Any) -> Any:
        """One question, one answer."""
        self.pipe.send((verb, *arguments))
        return self.answer()

    def end(self) -> None:
        """Its process ends."""
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _serve(pipe: Connection, name: str, directory: Path, device: torch.device, most: int) -> None:
    torch.set_num_threads(cores())
    if name.startswith("ours") and device.type == "cpu":
        prepare_cpu(cores())
    try:
        began = time.perf_counter()
        contender = ALL[name](directory, device, most)
        pipe.send(("ready", time.perf_counter() - began))
        while True:
            verb, *arguments = pipe.recv()
            pipe.send((verb, VERBS[verb](contender, *arguments)))
    except EOFError:
        return
    except Exception as error:  # whatever keeps one of them from taking part is told, and the others go on
        lines = str(error).splitlines() or [""]
        pipe.send(("failed", f"{type(error).__name__}: {lines[0]}"))


def _run(contender: Contender, batch: int, steps: int) -> float:
    """Seconds of so many steps."""
    gc.collect()
    began = time.perf_counter()
    contender.run(batch, steps)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _memory(contender: Contender) -> int:
    """The most memory that was held so far, in bytes: of the GPU, else of the process."""
    if torch.cuda.is_available():
        most: int = torch.cuda.max_memory_reserved()
        return most
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def _nodes(contender: Contender, batch: int) -> int:
    """Kernels and copies on the GPU in one step."""
    contender.run(batch, 3)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        contender.run(batch, 10)
        torch.cuda.synchronize()
    on_gpu = [event for event in seen.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return round(len(on_gpu) / 10)


def _replay(contender: Ours, batch: int) -> float:
    """Milliseconds that the GPU takes for a step when the next one always waits already."""
    runner, (began, ended) = contender.engine.runner, (torch.cuda.Event(enable_timing=True) for _ in range(2))
    bucket = runner.bucket_for(batch)
    runner.step(bucket)
    began.record()
    for _ in range(20):
        runner.step(bucket)
    ended.record()
    ended.synchronize()
    return float(began.elapsed_time(ended)) / 20


VERBS: dict[str, Callable[..., Any]] = {
    "run": _run,
    "memory": _memory,
    "nodes": _nodes,
    "replay": _replay,
    "predict": lambda contender, x, t: contender.predict(torch.from_numpy(x), torch.from_numpy(t)).numpy(),
}
