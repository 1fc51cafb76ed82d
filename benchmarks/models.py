"""What is measured: an engine as the server builds it; nets that people serve, with random weights, and a tiny one."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file

from model.checkpoint.card import WEIGHTS, read_card
from model.checkpoint.load import Model, load_model
from model.engine.engine import Engine
from model.engine.events import Request
from model.engine.runner import prepared
from model.nets import cpu
from model.nets.build import build
from model.nets.config import architecture
from model.nets.cpu import CpuNet
from model.sampling.plan import plan, resolve
from server.worker.cpus import cores
from server.worker.device import choose_dtype

# The configurations of google/ddpm-cifar10-32 and of google/ddpm-celebahq-256 and its sisters.
BOTH = {
    "_class_name": "UNet2DModel",
    "in_channels": 3,
    "out_channels": 3,
    "norm_eps": 1e-6,
    "attention_head_dim": None,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
}
CIFAR10: dict[str, object] = BOTH | {
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "downsample_padding": 0,
}
LARGE = CIFAR10 | {
    "sample_size": 256,
    "block_out_channels": (128, 128, 256, 256, 512, 512),
    "down_block_types": (*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4),
}
LARGEST = "256 x 256 configuration"
MODELS: dict[str, dict[str, object] | None] = {  # by the names they are measured under; None: the digits, as they are
    "digits": None,
    "CIFAR-10 configuration": CIFAR10,
    LARGEST: LARGE,
}
TINY = CIFAR10 | {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}


def random_model(directory: Path, config: dict[str, object]) -> Path:
    """A model directory with this configuration and random weights, the same ones every time."""
    torch.manual_seed(0)
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    scheduler = {"_class_name": "DDPMScheduler", "num_train_timesteps": 1000, "variance_type": "fixed_large"}
    (directory / "scheduler_config.json").write_text(json.dumps(scheduler))
    net = build(architecture(config))
    save_file(dict(net.state_dict()), directory / WEIGHTS, {"format": "pt"})
    return directory


@contextmanager
def model_directory(name: str, digits: Path) -> Iterator[Path]:
    """The directory of one of MODELS; one of random weights is gone afterwards."""
    config = MODELS[name]
    if config is None:
        yield digits
        return
    with tempfile.TemporaryDirectory() as folder:
        yield random_model(Path(folder) / "model", config)


def grow_up(model: Model, slots: int) -> None:
    """Makes every batch size that a net will have for so many slots, which a server does while it already serves."""
    if isinstance(model.net, CpuNet):
        cpu.grow_up(model.net, slots)
        torch.set_num_threads(1)  # as in an engine process: the net has threads of its own


def our_engine(directory: Path, device: torch.device, slots: int) -> Engine:
    """The engine as the server builds it: numbers as the device computes best, exact buckets only."""
    torch.set_num_threads(cores())  # the net takes as many; an engine that was made before may have left fewer
    model = load_model(read_card(directory), device, choose_dtype("auto", device))
    engine = Engine(prepared(model, slots))
    grow_up(model, slots)
    return engine


def run_engine(engine: Engine, batch: int, steps: int) -> None:
    """Makes `batch` pictures of `steps` steps of ddpm."""
    process = engine.runner.model.card.process
    table = plan(process, resolve(process, "ddpm", steps))
    for i in range(batch):
        engine.submit(Request(i, i, table))
    while engine.busy:
        engine.step()
