"""A sheet of pictures that a net in training makes, always of the same seeds, so that one sees it learn."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.nets.unet import UNet
from model.sampling.plan import plan, resolve
from model.sampling.reference import sample_together
from model.sampling.schedule import Process
from model.sampling.table import Plan
from model.train.trainer import Trainer

ROWS, COLUMNS = 4, 8
STEPS = 12  # of each picture
SHOWN = 64  # pixels that a picture has at least in the file, whatever its own size


def rows_in(forwards: float) -> int:
    """The rows of a sheet for which the net reads so many pictures; at least one, at most four."""
    return max(1, min(ROWS, int(forwards / forwards_of(1))))


def forwards_of(rows: int) -> int:
    """How many pictures the net reads for a sheet."""
    return rows * COLUMNS * STEPS


def plan_of(process: Process) -> Plan:
    """How the pictures of a sheet are made."""
    steps = min(STEPS, process.schedule.T)
    return plan(process, resolve(process, "unipc", steps, order=2, spacing="trailing", clip=True))


def label_of(seed: int, labels: int) -> int:
    """The label of a seed's picture: one for each column, spread over all but the null label. labels: with that one"""
    known = max(1, labels - 1)
    return seed % COLUMNS * known // min(COLUMNS, known) % known


@torch.no_grad()
def sheet(trainer: Trainer, process: Process, ema: float, rows: int = ROWS) -> NDArray[np.uint8]:
    """Pictures of the seeds 0 to 8 rows - 1 by a moving average, a label for each column. -> [rows H, 8 W, C]"""
    seeds, made, net = range(rows * COLUMNS), list[Tensor](), trainer.averaged(ema)
    for first in range(0, len(seeds), trainer.recipe.batch):
        made.append(_pictures(trainer, net, process, seeds[first : first + trainer.recipe.batch]))
    x = torch.cat(made)  # [8 rows, C, H, W]
    bytes_ = ((x / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    C, H, W = trainer.arch.shape
    placed = bytes_.reshape(rows, COLUMNS, C, H, W).transpose(0, 3, 1, 4, 2)
    whole: NDArray[np.uint8] = placed.reshape(rows * H, COLUMNS * W, C)
    return whole


def _pictures(trainer: Trainer, shown: UNet, process: Process, seeds: range) -> Tensor:
    """[n, C, H, W]"""
    arch, device = trainer.arch, trainer.device
    labels = torch.tensor([label_of(seed, arch.labels) for seed in seeds], device=device) if arch.labels else None

    def net(x: Tensor, k: Tensor) -> Tensor:
        return trainer.predict(x.to(device), k.to(device) + 1, labels, by=shown).cpu()

    *_, (x, _) = sample_together(net, plan_of(process), list(seeds), arch.shape)
    return x


def write_png(picture: NDArray[np.uint8], path: Path) -> None:
    """Writes a sheet [rows H, 8 W, C], enlarged if its pictures are small. Raises OSError."""
    from PIL import Image

    times = -(-SHOWN * COLUMNS // picture.shape[1])
    large = picture.repeat(times, 0).repeat(times, 1)
    part = path.with_suffix(".part")
    Image.fromarray(large[..., 0] if large.shape[2] == 1 else large).save(part, "PNG")
    part.chmod(0o644)
    part.replace(path)
