"""Train a model directory by the seed's loop: noise a picture to a random t in closed form, learn to name the noise.

    python -m model.train PICTURES weights/digits --images 640000

The directory holds the configurations; this fills in the weights (their moving average, which is what one serves) and
`training.jsonl`. Stopped at any point, the same command goes on from the last checkpoint, `training.safetensors`.
Under `torchrun --nproc-per-node N -m model.train ...` the batch is shared by N processes, one per GPU or CPU core.
"""

import argparse
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, distributed

from model.architecture import Architecture, architecture
from model.card import WEIGHTS, read_process
from model.data import held_out, load_images
from model.lucid_architecture import LUCID
from model.options import Options, read_json
from model.schedule import NoiseSchedule
from model.unet import UNet

PROBE_T = (10, 100, 300, 600, 900)  # the held-out loss is taken at these levels of noise (thousandths of T)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to train. Lengths are counted in pictures seen."""

    images: int = 640_000
    batch: int = 64
    rate: float = 1e-3  # peak learning rate of AdamW: linear warm-up, then half a cosine down to 0
    warm_up: int = 20_000
    max_ema: float = 0.9995
    max_norm: float = 1.0
    autocast: bool = True  # bfloat16 in the net; parameters, loss and state stay float32
    log_every: int = 6_400
    save_every: int = 19_200

    def __post_init__(self) -> None:
        for name in ("images", "batch", "warm_up", "log_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.rate < math.inf:
            raise ValueError(f"rate must be a positive number, got {self.rate}")

    def rate_at(self, seen: int) -> float:
        """Learning rate after `seen` pictures."""
        progress = min(1.0, seen / self.images)
        return self.rate * min(1.0, seen / self.warm_up) * 0.5 * (1 + math.cos(math.pi * progress))

    def ema_at(self, step: int) -> float:
        """Decay of the moving average at an update: short while everything still changes."""
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
        """One step of the loop on a batch of clean pictures in [-1, 1]. Returns the mean loss of our share of it."""
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
        """Loss of the moving average on pictures never trained on, with the same noise every time, by level."""
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

    def save(self, path: Path) -> None:
        """Everything needed to go on, in one safetensors file, replaced atomically."""
        tensors = {f"average.{k}": v.contiguous() for k, v in self.average.items()}
        for name, p in self.net.named_parameters():
            tensors[f"net.{name}"] = p.detach().contiguous()
            for key, value in self.optimizer.state.get(p, {}).items():
                tensors[f"{key}.{name}"] = value.contiguous()
        metadata = {"seen": str(self.seen), "step": str(self.step)}
        save_file(tensors, path.with_suffix(".part"), metadata)
        path.with_suffix(".part").replace(path)

    @torch.no_grad()
    def resume(self, path: Path) -> None:
        """Go on from what `save` wrote."""
        with safe_open(path, "pt", device=self.device) as file:
            metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}
        self.seen, self.step = int(metadata["seen"]), int(metadata["step"])
        for name, p in self.net.named_parameters():
            p.copy_(tensors[f"net.{name}"])
            self.average[name].copy_(tensors[f"average.{name}"])
            kept = {key: tensors[f"{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
            self.optimizer.state[p] = {k: v if k == "step" else torch.empty_like(p).copy_(v) for k, v in kept.items()}


def _trainable(directory: Path) -> Architecture:
    """The net to train. Raises ModelRefused if what this loop teaches is not what would be asked of it."""
    config = Options("config.json", read_json(directory / "config.json"))
    if config.values.get("_class_name") == LUCID:
        raise config.refuse("_class_name", "UNet2DModel or OpenAIUNet to be trained")
    arch = architecture(config.values)
    if arch.learned_variance:
        raise config.refuse("out_channels", f"in_channels ({arch.in_channels}) to be trained: no variance is learned")
    scheduler = Options("scheduler_config.json", read_json(directory / "scheduler_config.json"))
    scheduler.word("prediction_type", ("epsilon",), "epsilon")
    return arch


def train(source: Path, directory: Path, recipe: Recipe, device: str) -> None:
    """Fill `directory` with weights trained on `source`. Resumes; prints and logs progress."""
    arch = _trainable(directory)
    schedule = read_process(read_json(directory / "scheduler_config.json"), {}, arch.learned_variance).schedule
    pictures = torch.from_numpy(load_images(source, arch.shape))
    if len(pictures) < 2:
        raise ValueError(f"{source.name} must hold at least two pictures: of each ten, one is held out")
    train_on, test_on = (torch.from_numpy(part) for part in held_out(len(pictures)))
    probe = pictures[test_on[:256]].to(device).float() / 127.5 - 1
    trainer, state, log = Trainer(arch, schedule, recipe, device), directory / "training.safetensors", []
    if state.is_file():
        trainer.resume(state)
    started, first, since_log = time.monotonic(), trainer.seen, []
    while trainer.seen < recipe.images:
        torch.manual_seed(trainer.step + 1)  # a resumed run sees the same pictures and noise as one in one piece
        drawn = np.random.default_rng(trainer.step).integers(len(train_on), size=recipe.batch)
        chosen = pictures[train_on[torch.from_numpy(drawn)]]
        since_log.append(trainer.update(chosen.float() / 127.5 - 1))
        ended = trainer.seen >= recipe.images
        if trainer.rank:
            continue
        if trainer.step % max(1, recipe.log_every // recipe.batch) == 0 or ended:
            rate = (trainer.seen - first) / (time.monotonic() - started)
            line = {
                "images": trainer.seen,
                "loss": round(sum(since_log) / len(since_log), 5),
                "held_out": trainer.held_out_loss(probe),
                "images_per_s": round(rate, 1),
            }
            since_log = []
            log.append(json.dumps(line))
            print(log[-1], f"{(recipe.images - trainer.seen) / rate / 60:.0f} min left", flush=True)
        if trainer.step % max(1, recipe.save_every // recipe.batch) == 0 or ended:
            trainer.save(state)
            part = directory / f"{WEIGHTS}.part"
            save_file({k: v.contiguous() for k, v in trainer.average.items()}, part, {"format": "pt"})
            part.chmod(0o644)  # else it is its owner's alone, and a server may be somebody else
            part.replace(directory / WEIGHTS)
            with (directory / "training.jsonl").open("a") as file:
                file.writelines(line + "\n" for line in log)
            log = []


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How to train, as flags."""
    usual = Recipe()
    parser.add_argument(
        "--images", dest="pictures", type=int, default=usual.images, help="pictures to see (%(default)s)"
    )
    parser.add_argument("--batch", type=int, default=usual.batch, help="pictures per update (%(default)s)")
    parser.add_argument("--rate", type=float, default=usual.rate, help="peak learning rate (%(default)s)")
    parser.add_argument("--float32", action="store_true", help="no bfloat16 autocast")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")


def run(source: Path, directory: Path, args: argparse.Namespace) -> None:
    """Trains as those flags say, alone or as one of the processes that torchrun has started."""
    device = args.device
    if "RANK" in os.environ:
        distributed.init_process_group()
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
    train(source, directory, Recipe(args.pictures, args.batch, args.rate, autocast=not args.float32), device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a folder of images, or an .npz with an array `images`")
    parser.add_argument("directory", type=Path, help="a model directory: config.json and scheduler_config.json")
    add_arguments(parser)
    args = parser.parse_args()
    run(args.source, args.directory, args)


if __name__ == "__main__":
    main()
