"""A net in training: its moving average, its optimiser, one update after another. `model.train.train` drives it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed

from model.checkpoint.header import read_header
from model.checkpoint.load import read_tensors
from model.digests import file_digest
from model.errors import ModelRefused
from model.nets.config import Architecture
from model.nets.unet import UNet
from model.sampling.schedule import NoiseSchedule

AVERAGE = "average."  # the prefix of its tensors' names in a state
PROBE_T = (10, 100, 300, 600, 900)  # the held-out loss is taken at these levels of noise (thousandths of T)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How to train. Lengths are counted in pictures seen."""

    images: int = 640_000
    batch: int = 64
    rate: float = 1e-3  # peak learning rate of AdamW: linear warm-up, then half a cosine down to 0
    warm_up: int = 20_000
    max_ema: float = 0.9995
    max_norm: float = 1.0
    autocast: bool = True  # bfloat16 in the net; parameters, loss and state stay float32
    minutes: float = math.inf  # after which it stops, even before all pictures have been seen
    log_every: int = 6_400
    save_every: int = 19_200

    def __post_init__(self) -> None:
        for name in ("images", "batch", "warm_up", "log_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.rate < math.inf:
            raise ValueError(f"rate must be a positive number, got {self.rate}")
        if not self.minutes > 0:
            raise ValueError(f"minutes must be a positive number, got {self.minutes}")

    def rate_at(self, seen: int) -> float:
        """The learning rate after `seen` pictures."""
        progress = min(1.0, seen / self.images)
        return self.rate * min(1.0, seen / self.warm_up) * 0.5 * (1 + math.cos(math.pi * progress))

    def ema_at(self, step: int) -> float:
        """The decay of the moving average at an update: a short memory at first, while everything changes."""
        return float(min(self.max_ema, 1 - (1 + step) ** -0.75))


class Trainer:
    """A net, its moving average and its optimiser, as they stand after `seen` pictures."""

    def __init__(self, arch: Architecture, schedule: NoiseSchedule, recipe: Recipe, device: str) -> None:
        self.arch, self.recipe, self.device = arch, recipe, device
        self.alpha_bar = torch.tensor(schedule.alpha_bar, dtype=torch.float32, device=device)  # [T + 1]
        self.beta_bar = torch.tensor(schedule.beta_bar, dtype=torch.float32, device=device)  # [T + 1]
        self.T, self.seen, self.step = schedule.T, 0, 0
        self.rank, self.world = (
            (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
        )
        torch.manual_seed(0)
        self.net = UNet(arch).to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for layer in self._starting_at_zero():
            torch.nn.init.zeros_(layer)
        self.average = {name: p.detach().clone() for name, p in self.net.named_parameters()}
        self.optimizer = torch.optim.AdamW(self.net.parameters(), recipe.rate, fused=True)

    def _starting_at_zero(self) -> list[Tensor]:
        """The last layer of every branch: the net starts as the identity on its residual path (Ho et al. 2020)."""
        ends = ("conv2.weight", "conv2.bias", "to_out.0.weight", "to_out.0.bias", "conv_out.weight", "conv_out.bias")
        return [p for name, p in self.net.named_parameters() if name.endswith(ends)]

    def loss(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """|| eps - eps_theta(alpha_bar_t x_0 + beta_bar_t eps, t) ||², per picture. x0, eps: [B, C, H, W] -> [B]"""
        x = self.alpha_bar[t].view(-1, 1, 1, 1) * x0 + self.beta_bar[t].view(-1, 1, 1, 1) * eps
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.recipe.autocast):
            out: Tensor = self.net(x.contiguous(memory_format=torch.channels_last), self.net.embed(t - 1))
        return (eps - out.float()).square().mean(dim=(1, 2, 3))

    def update(self, x0: Tensor) -> float:
        """One update with a batch of clean pictures in [-1, 1]. Returns the mean loss of this process's share of it."""
        batch, share = len(x0), slice(self.rank, None, self.world)
        # One t from each of `batch` equal ranges: uniform, with less variance (Kingma et al. 2021, appendix I.1).
        t = ((torch.arange(batch) + torch.rand(1)) / batch % 1 * self.T).long()[torch.randperm(batch)] + 1
        eps = torch.randn(x0.shape)
        loss = self.loss(*(part[share].to(self.device) for part in (x0, t, eps))).mean()
        self.optimizer.zero_grad()
        loss.backward()
        if self.world > 1:
            gradients = [p.grad for p in self.net.parameters() if p.grad is not None]
            flat = torch.cat([g.flatten() for g in gradients])
            distributed.all_reduce(flat)
            for g, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                g.copy_(total.view(g.shape) / self.world)  # in place: the layout must stay the parameter's
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.recipe.max_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate_at(self.seen)
        self.optimizer.step()
        with torch.no_grad():
            decay = self.recipe.ema_at(self.step)
            torch._foreach_lerp_(list(self.average.values()), list(self.net.parameters()), 1 - decay)
        self.seen, self.step = self.seen + batch, self.step + 1
        return loss.item()

    @torch.no_grad()
    def held_out_loss(self, pictures: Tensor) -> dict[int, float]:
        """The moving average's loss on pictures that are held out, by noise level. The noise is always the same."""
        kept = {name: p.detach().clone() for name, p in self.net.named_parameters()}
        self._assign(self.average)
        generator, losses = torch.Generator().manual_seed(1), {}
        for level in PROBE_T:
            eps = torch.randn(pictures.shape, generator=generator).to(self.device)
            t = torch.full((len(pictures),), max(1, level * self.T // 1000), device=self.device)
            shares = zip(*(part.split(self.recipe.batch) for part in (pictures, t, eps)), strict=True)
            losses[level] = round(torch.cat([self.loss(*share) for share in shares]).mean().item(), 5)
        self._assign(kept)
        return losses

    @torch.no_grad()
    def _assign(self, values: dict[str, Tensor]) -> None:
        for name, p in self.net.named_parameters():
            p.copy_(values[name])

    @torch.no_grad()
    def start_from(self, path: Path) -> None:
        """Begins with these weights instead of random ones. Raises ModelRefused if they are not this net's."""
        shapes = {name: tuple(p.shape) for name, p in self.net.named_parameters()}
        if {name: shape for name, (_, shape) in read_header(path).items()} != shapes:
            raise ModelRefused(f"{path.name} does not hold the weights of this net, by their names of today")
        for name, tensor in read_tensors(path, shapes)[0].items():
            self.average[name].copy_(tensor)  # in place: the layout must stay the parameter's
        self._assign(self.average)

    def time_is_up(self, seconds: float) -> bool:
        """Whether any process that shares the batch has trained for the minutes of the recipe."""
        up = seconds > 60 * self.recipe.minutes
        if self.world == 1 or self.recipe.minutes == math.inf:
            return up
        any_up = torch.tensor(float(up), device=self.device)
        distributed.all_reduce(any_up, distributed.ReduceOp.MAX)
        return bool(any_up)

    def save(self, path: Path) -> None:
        """Writes the whole state of the training to one safetensors file, which is replaced atomically."""
        tensors = {AVERAGE + name: tensor for name, tensor in self.average.items()}
        for name, p in self.net.named_parameters():
            tensors[f"net.{name}"] = p.detach()
            for key, value in self.optimizer.state.get(p, {}).items():
                tensors[f"{key}.{name}"] = value
        write(tensors, path, {"seen": str(self.seen), "step": str(self.step)})

    @torch.no_grad()
    def resume(self, path: Path, weights: Path) -> None:
        """Resumes from a state that `save` wrote, or from the two files into which `split` divided it.

        Raises ModelRefused if it is damaged or of another net, and if the average is not in the state and `weights` is
        not the file that belongs to it.
        """
        try:
            self._resume(path, weights)
        except torch.OutOfMemoryError:
            raise
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ModelRefused(
                f"{path.name} is damaged, or of another net; without it, training begins anew"
            ) from error

    def _resume(self, path: Path, weights: Path) -> None:
        with safe_open(path, "pt", device=self.device) as file:
            metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}
        if "weights" in metadata:
            if not weights.is_file() or file_digest(weights) != metadata["weights"]:
                raise ModelRefused(f"{path.name} needs the {weights.name} that it came with beside it")
            tensors |= {AVERAGE + name: tensor for name, tensor in load_file(weights, self.device).items()}
        self.seen, self.step = int(metadata["seen"]), int(metadata["step"])
        for name, p in self.net.named_parameters():
            p.copy_(tensors[f"net.{name}"])
            self.average[name].copy_(tensors[AVERAGE + name])
            kept = {key: tensors[f"{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
            self.optimizer.state[p] = {k: v if k == "step" else torch.empty_like(p).copy_(v) for k, v in kept.items()}


def write(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Writes a safetensors file that all users may read. It is replaced atomically. Raises OSError."""
    part = path.with_suffix(".part")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part, metadata)
    except SafetensorError as error:
        part.unlink(missing_ok=True)
        raise OSError(f"{path.name} could not be written: {error}") from None
    part.chmod(0o644)  # the server may be run by another user
    part.replace(path)


def write_weights(average: Mapping[str, Tensor], path: Path) -> None:
    """Writes the moving average as a model's weights."""
    write(average, path, {"format": "pt"})


def split(state: Path, weights: Path, rest: Path) -> None:
    """Divides a state that `Trainer.save` wrote into two smaller files: the average, as weights, and the rest.

    `Trainer.resume` goes on from the two to the same bits.
    """
    with safe_open(state, "pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}
    average = {key.removeprefix(AVERAGE): tensor for key, tensor in tensors.items() if key.startswith(AVERAGE)}
    write_weights(average, weights)
    left = {key: tensor for key, tensor in tensors.items() if not key.startswith(AVERAGE)}
    write(left, rest, metadata | {"weights": file_digest(weights)})
