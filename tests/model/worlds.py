"""Small worlds for the tests of `model/`: nets of a few thousand weights, beside the same ones in diffusers."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import Tensor

from model.checkpoint.card import read_card
from model.checkpoint.load import Model, load_layers, load_model
from model.engine.engine import Engine
from model.engine.events import Finished, Request
from model.engine.runner import prepared
from model.nets.config import architecture
from model.nets.unet import UNet
from model.sampling.plan import plan, resolve
from model.sampling.schedule import Prediction, Process, Spacing
from model.sampling.table import Plan

PREDICTIONS: list[Prediction] = ["epsilon", "v_prediction", "sample"]
THEIR_SPACINGS: list[Spacing] = ["leading", "linspace", "trailing"]  # which diffusers knows

# google/ddpm-cifar10-32, 35.7 million parameters.
CIFAR10: dict[str, Any] = {
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": [128, 256, 256, 256],
    "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 32,
    "time_embedding_type": "positional",
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}


def small(**changes: Any) -> dict[str, Any]:
    """A net's configuration of two levels and eight channels, as `config.json` would write it, but for `changes`."""
    return {
        "sample_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": [8, 16],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    } | changes


def shaken(config: dict[str, Any], seed: int = 0) -> UNet2DModel:
    """diffusers' net with random weights, of which none is left at the 0 or 1 where norms and biases start."""
    torch.manual_seed(seed)
    net = UNet2DModel(**config).eval().requires_grad_(False)
    for parameter in net.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter) if parameter.ndim == 1 else 0)
    return net


def twin(net: UNet2DModel) -> UNet:
    """Our net with the weights of diffusers' own, every one of them and no other."""
    ours = UNet(architecture(dict(net.config)))
    ours.load_state_dict(net.state_dict(), strict=True)
    return ours.eval().requires_grad_(False)


def pipeline(net: UNet2DModel, scheduler: Any = None) -> Any:
    """diffusers' pipeline, which keeps its progress to itself."""
    made: Any = DDPMPipeline(net, scheduler or DDPMScheduler())
    made.set_progress_bar_config(disable=True)
    return made


def opened(directory: Path) -> Model:
    """The model in this directory, on the CPU, in float32."""
    return load_model(read_card(directory), torch.device("cpu"), torch.float32)


def labelled(directory: Path, x: Tensor, k: Tensor, labels: Tensor) -> Tensor:
    """What the conditional net in this directory says of pictures at timesteps k + 1 with these labels."""
    model = load_layers(read_card(directory), torch.device("cpu"), torch.float32)
    T = model.card.process.schedule.T
    out: Tensor = model.net(x, model.table[k] + model.table[T + labels])
    return out


def saved(directory: Path, net: UNet2DModel, **scheduler: Any) -> Model:
    """What diffusers saves of this net and a DDPM scheduler, opened by us."""
    pipeline(net, DDPMScheduler(**scheduler)).save_pretrained(directory)
    return opened(directory)


def planned(
    process: Process,
    sampler: str = "ddpm",
    steps: int | None = None,
    guidance: float | None = None,
    guidance_interval: tuple[int, int] | None = None,
    **choices: Any,
) -> Plan:
    """The plan for these choices."""
    choice = resolve(process, sampler, steps, **choices)
    return plan(process, replace(choice, guidance=guidance, guidance_interval=guidance_interval))


def engine(model: Model, slots: int = 3) -> Engine:
    """An engine with room for a few samples at once."""
    return Engine(prepared(model, slots))


def pictures(model: Model, wanted: Sequence[tuple[int, Plan]], slots: int = 3) -> list[Finished]:
    """The pictures of these (seed, plan), made by one engine, in the order they were asked for."""
    maker = engine(model, slots)
    for i, (seed, table) in enumerate(wanted):
        maker.submit(Request(i, seed, table, wants_floats=True))
    made: dict[object, Finished] = {}
    while maker.busy:
        made |= {event.id: event for event in maker.step() if isinstance(event, Finished)}
    return [made[i] for i in range(len(wanted))]


def generator(seed: int) -> torch.Generator:
    """The generator a user of diffusers would pass for this seed."""
    return torch.Generator("cpu").manual_seed(seed)


def relative_error(given: Tensor, expected: Tensor) -> float:
    """The length of the difference, in lengths of what was expected."""
    return float((given - expected).norm() / expected.norm())
