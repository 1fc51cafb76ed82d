"""The smallest worlds the engine runs in: a net of a few thousand weights, or of one multiplication; requests."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from model.checkpoint.card import ModelCard
from model.checkpoint.load import Model
from model.engine.engine import Engine
from model.engine.events import Cancelled, Event, Failed, Finished, Request
from model.engine.runner import prepared
from model.nets.config import Architecture
from model.nets.lucidrains_config import LucidrainsArchitecture
from model.nets.unet import UNet
from model.sampling.plan import plan, resolve
from model.sampling.schedule import Process, linear
from model.sampling.table import Plan

T = 30
PROCESS = Process(linear(T, 1e-3, 0.3), default_steps=T)
ARCHITECTURE = Architecture(
    height=8,
    width=8,
    in_channels=1,
    out_channels=1,
    block_out_channels=(8, 16),
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    norm_num_groups=4,
)
LUCIDRAINS = LucidrainsArchitecture(
    height=16,
    width=24,
    in_channels=3,
    out_channels=3,
    dim=16,
    init_dim=16,
    dim_mults=(1, 2, 4),
    full_attn=(False, False, True),
    attn_heads=(4, 4, 4),
    attn_dim_head=(8, 8, 8),
)
CPU = torch.device("cpu")


def card(architecture: Architecture = ARCHITECTURE, process: Process = PROCESS) -> ModelCard:
    """A card with no directory behind it."""
    return ModelCard(
        name="tiny",
        directory=Path("tiny"),
        weights=Path("tiny"),
        architecture=architecture,
        process=process,
        presets={},
    )


def tiny_model(dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> Model:
    """A real U-Net with random weights, the same ones every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net: Any = UNet(ARCHITECTURE).eval().requires_grad_(False).to(device)
    with torch.inference_mode():
        table = net.embed(torch.arange(T, device=device)).to(dtype)
    count = sum(p.numel() for p in net.parameters())
    return Model(card(), net.to(dtype=dtype, memory_format=torch.channels_last), table, count)


class FunctionNet(nn.Module):
    """A function of (x, k) that passes for a net: row k of its embedding table is k itself."""

    def __init__(
        self, function: Callable[[Tensor, Tensor], Tensor], architecture: Architecture, labels: int = 0
    ) -> None:
        super().__init__()
        self.function, self.arch, self.reads = function, architecture, architecture.in_channels
        self.labels = labels

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.function(x, embedding[:, 0])


def halve(x: Tensor, k: Tensor) -> Tensor:
    """Half of the picture is noise, and a little more of it at higher levels."""
    return x * (0.5 + 0.01 * k[:, None, None, None])


def function_model(function: Callable[[Tensor, Tensor], Tensor] = halve, labels: int = 0) -> Model:
    """A model whose net is this function of (x [b, C, H, W], k [b]); steps take microseconds. Label l, of so many,
    adds l to k."""
    table = torch.cat([torch.arange(T, dtype=torch.float32), torch.arange(labels, dtype=torch.float32)])[:, None]
    return Model(card(), cast(UNet, FunctionNet(function, ARCHITECTURE, labels)), table)


def quick_engine(slots: int = 3, function: Callable[[Tensor, Tensor], Tensor] = halve, labels: int = 0) -> Engine:
    """An engine of so many slots around a function of (x, k)."""
    return Engine(prepared(function_model(function, labels), slots))


def a_plan(
    steps: int = 4,
    sampler: str = "ddpm",
    guidance: float | None = None,
    guidance_interval: tuple[int, int] | None = None,
    **choices: Any,
) -> Plan:
    """A plan for the tiny process."""
    choice = resolve(PROCESS, sampler, steps, **choices)
    return plan(PROCESS, replace(choice, guidance=guidance, guidance_interval=guidance_interval))


def a_request(id: Hashable, steps: int = 4, *, seed: int = 0, **options: Any) -> Request:
    """A request for one picture in so many steps of ddpm; `options` as in Request."""
    return Request(id, seed, options.pop("plan", None) or a_plan(steps), **options)


def run(engine: Engine, *requests: Request) -> list[Event]:
    """Submits these, and steps until the engine has nothing more to tell."""
    for request in requests:
        engine.submit(request)
    events: list[Event] = []
    while engine.busy:
        events += engine.step()
    return events


def pictures(events: Sequence[Event]) -> dict[Hashable, bytes]:
    """The bytes of every finished picture."""
    return {event.id: event.picture.tobytes() for event in events if isinstance(event, Finished)}


def endings(events: Sequence[Event]) -> list[tuple[str, Hashable]]:
    """(kind, id) of every terminal event, in order."""
    return [(type(e).__name__, e.id) for e in events if isinstance(e, Finished | Cancelled | Failed)]
