"""Model directories on disk, small and sound; the tests break them one way at a time."""

import json
import struct
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from model.checkpoint.card import WEIGHTS
from model.checkpoint.plans import FOLDER
from model.nets.unet import UNet
from tests.model.tiny import ARCHITECTURE, PROCESS, T

CONFIG: dict[str, Any] = {
    "_class_name": "UNet2DModel",
    "_diffusers_version": "0.35.0",
    "sample_size": 8,
    "act_fn": "silu",
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "class_embed_type": None,
    "num_class_embeds": None,
    **{name: value for name, value in asdict(ARCHITECTURE).items() if name not in ("height", "width")},
}
SCHEDULER: dict[str, Any] = {
    "_class_name": "DDPMScheduler",
    "_diffusers_version": "0.35.0",
    "num_train_timesteps": T,
    "beta_start": 1e-3,
    "beta_end": 0.3,
    "beta_schedule": "linear",
    "trained_betas": None,
    "variance_type": "fixed_small",
    "clip_sample": True,
    "prediction_type": "epsilon",
}
LEVELS = [30, 17, 4]
AMPLITUDES: list[float] = PROCESS.schedule.alpha_bar[LEVELS].tolist()
PLAN: dict[str, Any] = {
    "sampler": "ddim",
    "timesteps": LEVELS,
    "process": {"T": T, "prediction": "epsilon", "alpha_bar": AMPLITUDES},
}


@cache
def _drawn() -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {name: tensor.detach() for name, tensor in UNet(ARCHITECTURE).state_dict().items()}


def weights(labels: int = 0) -> dict[str, Tensor]:
    """The tiny net's weights, the same ones every time, perhaps for so many labels. They may be written to."""
    drawn = {name: tensor.clone() for name, tensor in _drawn().items()}
    if labels:
        generator = torch.Generator().manual_seed(1)
        drawn["class_embedding.weight"] = torch.randn(labels, ARCHITECTURE.embedding_dim, generator=generator)
    return drawn


def write_model(
    directory: Path,
    config: dict[str, Any] | None = None,
    scheduler: dict[str, Any] | None = None,
    tensors: dict[str, Tensor] | None = None,
    folders: bool = False,
    labels: int = 0,
    index: dict[str, Any] | None = None,
) -> Path:
    """A model directory, flat or in folders; `config` and `scheduler` hold what differs from the sound one.

    labels: how many the net knows; index: the model_index.json, if there is one
    """
    net, schedule = (directory / "unet", directory / "scheduler") if folders else (directory, directory)
    net.mkdir(parents=True, exist_ok=True)
    schedule.mkdir(parents=True, exist_ok=True)
    (net / "config.json").write_text(
        json.dumps(CONFIG | ({"num_class_embeds": labels} if labels else {}) | (config or {}))
    )
    (schedule / "scheduler_config.json").write_text(json.dumps(SCHEDULER | (scheduler or {})))
    if index is not None:
        (directory / "model_index.json").write_text(json.dumps(index))
    save_file(weights(labels) if tensors is None else tensors, net / WEIGHTS)
    return directory


def write_plan(directory: Path, plan: object = PLAN, name: str = "fast") -> Path:
    """A plan of a model directory: bytes, or what JSON writes of it."""
    (directory / FOLDER).mkdir(parents=True, exist_ok=True)
    path = directory / FOLDER / f"{name}.json"
    path.write_bytes(plan if isinstance(plan, bytes) else json.dumps(plan).encode())
    return path


def entry(shape: list[Any], start: Any, stop: Any, dtype: Any = "F32") -> dict[str, Any]:
    """One tensor of a safetensors header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def safetensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file of this header (an object, or JSON as text or bytes), which may claim another length."""
    if not isinstance(header, bytes):
        header = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data
