"""The U-Net of lucidrains' `denoising_diffusion_pytorch`, version 2, as its trainer saves it in `model-N.pt`.

Such a file holds the net twice, as it is trained and averaged; the average is taken. Beside the weights are the tables
of its diffusion process, which give the schedule and what the net predicts. The picture's size is in no file.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from model.checkpoint.weighing import averaged
from model.convert.nets import Net
from model.convert.protocol import OF_THE_SCHEDULER, Converted, Options, required, scheduler_config, with_scaled_betas
from model.errors import ModelRefused
from model.nets.lucidrains_config import LUCIDRAINS
from model.options import CHANNELS
from model.sampling.schedule import Prediction

READS = OF_THE_SCHEDULER - {"scheduler"} | {"image_size"}
FIRST = "init_conv.weight"
NAMES = frozenset(
    {FIRST, "time_mlp.1.weight", "mid_attn.to_qkv.weight", "downs.0.0.block1.proj.weight", "final_conv.weight"}
)


@dataclass(frozen=True, slots=True)
class Usual:
    """The defaults of a `GaussianDiffusion`, which a net without its tables was trained with unless options say so."""

    schedule: str
    prediction: Prediction


USUAL = Usual("sigmoid", "v_prediction")
CLEAR = 1.0  # a signal-to-noise ratio below which no usual weighting of the loss is clamped


def refuse_fourier(net: Mapping[str, Tensor]) -> None:
    """Refuses nets with another embedding of the timestep. Raises ModelRefused."""
    if "time_mlp.0.weights" in net:
        raise ModelRefused("random or learned Fourier features of the timestep (time_mlp.0.weights) are not supported")


def _refuse_variants(net: Mapping[str, Tensor]) -> None:
    """Refuses nets of other versions, and nets with more inputs than x_t and t. Raises ModelRefused."""
    refuse_fourier(net)
    if "downs.0.0.block1.norm.g" not in net or "mid_attn.mem_kv" not in net:
        raise ModelRefused("a net of version 1 (group norms, or attention without memories) cannot be converted")
    channels = net[FIRST].shape[1]
    if channels in (2 * each for each in CHANNELS):
        raise ModelRefused(f"a self-conditioned net, which reads {channels} channels, cannot be converted")


def shared_config(net: Mapping[str, Tensor], options: Options, widths: Sequence[int]) -> dict[str, Any]:
    """The options that all kinds of lucidrains' nets have, but for those of attention. widths: behind each level"""
    dim = net["time_mlp.1.weight"].shape[1]
    if not widths or any(width % dim or not width for width in widths):
        raise ModelRefused(f"every level's channels must be a multiple of dim ({dim}), got {list(widths)}")
    return {
        "_class_name": LUCIDRAINS,
        "sample_size": required(options.image_size, "--image-size", "the file does not tell the size of a picture"),
        "in_channels": net[FIRST].shape[1],
        "out_channels": net["final_conv.weight"].shape[0],
        "dim": dim,
        "init_dim": net[FIRST].shape[0],
        "dim_mults": [width // dim for width in widths],
        "sinusoidal_pos_emb_theta": 10_000,
    }


def _config(net: Mapping[str, Tensor], options: Options) -> dict[str, Any]:
    full, heads, head_dims, widths = list[bool](), list[int](), list[int](), list[int]()
    while (place := f"downs.{len(widths)}") + ".2.mem_kv" in net:
        full.append(f"{place}.2.to_out.weight" in net)
        _, among, *sizes = net[f"{place}.2.mem_kv"].shape  # [2, heads, M, d], or [2, heads, d, M] if it is linear
        heads.append(among)
        head_dims.append(sizes[1] if full[-1] else sizes[0])
        resize = net.get(f"{place}.3.1.weight", net.get(f"{place}.3.weight"))
        widths.append(0 if resize is None else resize.shape[0])
    attention = {"full_attn": full, "attn_heads": heads, "attn_dim_head": head_dims}
    return shared_config(net, options, widths) | attention | {"num_mem_kv": net["mid_attn.mem_kv"].shape[2]}


def without_resizing(key: str) -> str:
    """The name of a tensor whose layer follows one that only changes the picture's size, as if it were alone."""
    return re.sub(r"^((?:downs|ups)\.\d+\.3)\.1\.", r"\1.", key)


def _tensors(net: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights by their names in `model.nets.lucidrains`: the original's except for three kinds of layers."""
    tensors = {}
    for key, tensor in net.items():
        if re.fullmatch(r"downs\.\d+\.3\.1\.weight", key):  # of one pixel over four stacked ones: [out, 4 C, 1, 1]
            tensor = tensor.reshape(len(tensor), -1, 2, 2)
        name = without_resizing(key)
        if key.endswith(".mem_kv") and key.replace("mem_kv", "to_out.weight") in net:
            name = key.replace("mem_kv", "attend.memory")
        tensors[name] = tensor
    return tensors


def sigmoid(T: int) -> Tensor:
    """The step variances of the package's default schedule (Jabri et al. 2022, figure 8). [T] float64"""
    left = torch.sigmoid(-6 * torch.arange(T + 1, dtype=torch.float64) / T + 3)
    left = (left - left[-1]) / (left[0] - left[-1])  # alpha_bar, from 1 to 0
    return (1 - left[1:] / left[:-1]).clamp(0, 0.999)


def _predicted(tables: Mapping[str, Tensor]) -> Prediction:
    """What the net predicts, from the weights of the loss: ones, the signal-to-noise ratio, or in between."""
    left, weight = tables["alphas_cumprod"].double(), tables["loss_weight"].double()
    snr = left / (1 - left)
    usual: dict[Prediction, Tensor] = {"epsilon": torch.ones_like(snr), "sample": snr, "v_prediction": left}
    noisy = snr < CLEAR
    apart = {name: float((weight - expected)[noisy].abs().max()) for name, expected in usual.items()}
    best = min(usual, key=lambda name: apart[name])
    if apart[best] > 1e-3:
        raise ModelRefused("loss_weight is of no known objective: --prediction must be given")
    return best


def process(tables: Mapping[str, Tensor], options: Options, learned: bool, usual: Usual) -> dict[str, Any]:
    """scheduler_config.json, from the tables beside the net, or, if there are none, from the options, or as usual."""
    variance, needed = "learned_range" if learned else "fixed_small", {"betas", "alphas_cumprod", "loss_weight"}
    if needed.isdisjoint(tables):
        options = replace(options, prediction=options.prediction or usual.prediction)
        return _default_process(replace(options, schedule=options.schedule or usual.schedule), variance)
    if missing := needed - tables.keys():
        raise ModelRefused(f"the file lacks {min(missing)}, a table of its diffusion process")
    return _scheduler(replace(options, prediction=options.prediction or _predicted(tables)), variance, None)


def _default_process(options: Options, variance: str) -> dict[str, Any]:
    """scheduler_config.json for a net without tables."""
    T = options.timesteps or 1000
    if options.schedule == "sigmoid":  # which is not diffusers' sigmoid
        return _scheduler(replace(options, schedule=None), variance, sigmoid(T).tolist())
    return _scheduler(with_scaled_betas(options, T), variance, None)


def _scheduler(options: Options, variance: str, betas: list[float] | None) -> dict[str, Any]:
    return scheduler_config(options, variance) | {"trained_betas": betas, "timestep_spacing": "trailing"}


def convert(net: Net, options: Options, tables: Mapping[str, Tensor]) -> Converted:
    """The same net with a `config.json` for `model.nets.lucidrains`."""
    _refuse_variants(net.tensors)
    config = _config(net.tensors, options)
    scheduler = process(tables, options, config["out_channels"] == 2 * config["in_channels"], USUAL)
    which = "averaged" if averaged(net.prefix) else "not averaged"
    T, size = scheduler["num_train_timesteps"], config["sample_size"]
    origin = f"lucidrains' U-Net ({which}, {scheduler['prediction_type']}), {size} x {size}, T = {T}"
    return Converted(config, scheduler, _tensors(net.tensors), origin)
