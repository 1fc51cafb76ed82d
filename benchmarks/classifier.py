"""A judge of digits: a small net trained on real ones, whose confidence says how readable a made picture is.

It learns from the pictures that the model under test was trained on too, and is itself measured on those that neither
has seen. A fixed seed makes it; kept in a file, the same judge is asked again. `judge.safetensors` is kept here: the
tests ask it whether the documents' own examples give readable pictures. One thread (OMP_NUM_THREADS=1) trained it, as
`python -m benchmarks.quality benchmarks/digits.npz weights/digits --classifier FILE` trains one where there is no FILE.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from model.train.data import Uint8Array, held_out, load_images

FloatArray: TypeAlias = NDArray[np.float32]
SHAPE = (1, 32, 32)  # the padded digits, which is also what the model makes


@dataclass(frozen=True, slots=True)
class Digits:
    """Pictures [N, 1, 32, 32] uint8, and what is written on them [N] int64."""

    pictures: Tensor
    labels: Tensor


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to train the judge: half a minute on one core, and about 95 % of held-out digits are told with confidence."""

    epochs: int = 4
    batch: int = 64
    rate: float = 3e-3  # peak learning rate of AdamW: one epoch of warm-up, then half a cosine down to 0
    shift: int = 2  # each picture is moved by up to so many pixels, anew in each epoch
    seed: int = 0

    def rate_at(self, epoch: float) -> float:
        """Learning rate after that many epochs."""
        return self.rate * min(1.0, epoch) * 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))


class Classifier(nn.Module):
    """Three convolutions, each halving the picture, and one dense layer. [B, 1, 32, 32] in [0, 1] -> [B, 10]"""

    def __init__(self, widths: tuple[int, ...] = (16, 32, 64)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inside, outside in zip((1, *widths), widths, strict=False):
            layers += [nn.Conv2d(inside, outside, 3, padding=1, bias=False), nn.MaxPool2d(2)]
            layers += [nn.BatchNorm2d(outside), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.out = nn.Linear(widths[-1] * 4 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.features(x)  # [B, 64, 4, 4]
        logits: Tensor = self.out(features.flatten(1))
        return logits


def load_digits(source: Path) -> tuple[Digits, Digits]:
    """The labelled .npz of `model.train.packages`, split as for training the model: (trained on, held out)."""
    pictures = torch.from_numpy(load_images(source, SHAPE))
    with np.load(source, allow_pickle=False) as arrays:
        labels = torch.from_numpy(arrays["labels"].astype(np.int64))
    train, test = (torch.from_numpy(part) for part in held_out(len(pictures)))
    return Digits(pictures[train], labels[train]), Digits(pictures[test], labels[test])


def shifted(x: Tensor, by: int) -> Tensor:
    """Each picture moved by -by..by pixels, down and across; black moves in. [B, 1, H, W] -> [B, 1, H, W]"""
    batch, _, height, width = x.shape
    padded = F.pad(x, (by, by, by, by))
    rows = torch.randint(2 * by + 1, (batch, 1)) + torch.arange(height)  # [B, H]
    columns = torch.randint(2 * by + 1, (batch, 1)) + torch.arange(width)  # [B, W]
    return padded[torch.arange(batch)[:, None, None], 0, rows[:, :, None], columns[:, None, :]][:, None]


def train(digits: Digits, recipe: Recipe) -> Classifier:
    """A classifier of real digits, ready to judge. Tells its progress on stderr."""
    torch.manual_seed(recipe.seed)
    net, pictures = Classifier(), digits.pictures.float() / 255  # [N, 1, 32, 32]
    optimizer = torch.optim.AdamW(net.parameters(), recipe.rate, weight_decay=0.01)
    batches = len(pictures) // recipe.batch
    for epoch in range(recipe.epochs):
        order, total = torch.randperm(len(pictures)), 0.0
        for step in range(batches):
            chosen = order[step * recipe.batch : (step + 1) * recipe.batch]
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate_at(epoch + step / batches)
            loss = F.cross_entropy(net(shifted(pictures[chosen], recipe.shift)), digits.labels[chosen])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            total += loss.item()
        print(f"classifier: epoch {epoch + 1} of {recipe.epochs}, loss {total / batches:.4f}", file=sys.stderr)
    return net.eval()


def load_or_train(file: Path | None, digits: Digits) -> Classifier:
    """The classifier kept in `file`; if there is none, a new one, which is then kept there."""
    if file is not None and file.is_file():
        net = Classifier()
        net.load_state_dict(load_file(file))
        return net.eval()
    net = train(digits, Recipe())
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in net.state_dict().items()}, file)
    return net


@torch.inference_mode()
def judge(net: Classifier, pictures: Tensor | Uint8Array) -> FloatArray:
    """How likely each picture is each digit. [N, 1, 32, 32] uint8 -> [N, 10], rows summing to 1"""
    pixels, at_once = torch.as_tensor(pictures), 250
    parts = [net(pixels[at : at + at_once].float() / 255).softmax(1) for at in range(0, len(pixels), at_once)]
    probabilities: FloatArray = torch.cat(parts).numpy()
    return probabilities


@torch.inference_mode()
def features(net: Classifier, pictures: Tensor | Uint8Array) -> NDArray[np.float64]:
    """The last layer before the decision, averaged over its 4 x 4 places. [N, 1, 32, 32] uint8 -> [N, 64]"""
    pixels, at_once = torch.as_tensor(pictures), 250
    parts = [net.features(pixels[at : at + at_once].float() / 255) for at in range(0, len(pixels), at_once)]
    means: NDArray[np.float64] = torch.cat(parts).double().mean((2, 3)).numpy()
    return means
