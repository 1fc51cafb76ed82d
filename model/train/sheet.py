"""A sheet of pictures that a net in training makes, always of the same seeds, so that one sees it learn."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from model.sampling.plan import plan, resolve
from model.sampling.reference import sample_together
from model.sampling.schedule import Process
from model.train.trainer import Trainer

SIDE = 8  # pictures in a row, and rows
STEPS = 20  # of each picture


@torch.no_grad()
def sheet(trainer: Trainer, process: Process, ema: float) -> NDArray[np.uint8]:
    """Pictures of the seeds 0 to 63 by a moving average, a label for each column. -> [8 H, 8 W, C]"""
    choice = resolve(process, "unipc", min(STEPS, process.schedule.T), order=2, spacing="trailing", clip=True)
    seeds, known = range(SIDE * SIDE), max(1, trainer.arch.labels - 1)
    labels = torch.tensor([seed % SIDE * known // min(SIDE, known) % known for seed in seeds]).to(trainer.device)

    def net(x: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        given = labels if trainer.arch.labels else None
        return trainer.predict(x.to(trainer.device), k.to(trainer.device) + 1, given).cpu()

    with trainer.averaged(ema):
        *_, (x, _) = sample_together(net, plan(process, choice), list(seeds), trainer.arch.shape)
    grey = ((x / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).numpy()  # [64, C, H, W]
    C, H, W = trainer.arch.shape
    placed: NDArray[np.uint8] = (
        grey.reshape(SIDE, SIDE, C, H, W).transpose(0, 3, 1, 4, 2).reshape(SIDE * H, SIDE * W, C)
    )
    return placed


def write_png(picture: NDArray[np.uint8], path: Path) -> None:
    """Writes a picture [H, W, C]. Raises OSError."""
    from PIL import Image

    part = path.with_suffix(".part")
    Image.fromarray(picture[..., 0] if picture.shape[2] == 1 else picture).save(part, "PNG")
    part.replace(path)
