"""Training pictures as numbers, and which of them a training sees."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.errors import printable
from model.nets.config import Architecture
from model.train.source import IntArray, Source, WrongPicture, find, named, sound

Uint8Array: TypeAlias = NDArray[np.uint8]
Told: TypeAlias = Callable[[int, int], None]  # how many pictures have been read, of how many
PROBES = 256  # held-out pictures whose loss is taken


@dataclass(frozen=True, slots=True)
class Dataset:
    """Pictures of one size; where they have labels, the label of each picture, and the names of labels."""

    images: Uint8Array  # [N, C, H, W]
    labels: IntArray | None = None  # [N]
    names: tuple[str, ...] = ()


def load_dataset(path: Path, shape: tuple[int, int, int]) -> Dataset:
    """All pictures of a folder or of an .npz in one size, and their labels. Raises ValueError as `find` and `read`."""
    return read(find(path), shape)


def read(source: Source, shape: tuple[int, int, int], told: Told | None = None) -> Dataset:
    """All pictures in one size, and their labels. shape: (C, H, W)

    The files of a folder are laid on white where they are transparent, cropped to their centre and resized. Of an .npz
    the array `images` is read, [N, H, W], [N, H, W, C] or [N, C, H, W] uint8, and padded with zeros if it is smaller
    than (H, W). Raises ValueError if a picture is broken or not of 8 bits, or the sizes do not fit.
    """
    images = _from_files(source, shape, told) if source.files else _from_npz(source.path)
    given, size = images, images.shape
    if images.ndim == 3:
        images = images[:, None]
    if images.ndim == 4 and images.shape[1] != shape[0] and images.shape[-1] == shape[0]:
        images = images.transpose(0, 3, 1, 2)
    missing = [want - have for want, have in zip(shape, images.shape[1:], strict=False)]
    if images.dtype != np.uint8 or images.ndim != 4 or len(images) == 0 or missing[0] or min(missing) < 0:
        raise ValueError(f"{source.path.name} holds {given.dtype}{list(size)}, which does not fit into {shape}")
    above, left = missing[1] // 2, missing[2] // 2
    images = np.pad(images, ((0, 0), (0, 0), (above, missing[1] - above), (left, missing[2] - left)))
    return Dataset(images, source.labels, source.names)


def load_images(path: Path, shape: tuple[int, int, int]) -> Uint8Array:
    """The pictures of `load_dataset` alone. -> [N, C, H, W]"""
    return load_dataset(path, shape).images


def _from_npz(path: Path) -> Uint8Array:
    def images() -> Uint8Array:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            found: Uint8Array = arrays["images"]
            return found

    return sound(path, images)


def _from_files(source: Source, shape: tuple[int, int, int], told: Told | None) -> Uint8Array:
    channels, height, width = shape
    images = np.empty((source.count, height, width, channels), np.uint8)
    for number, file in enumerate(source.files):
        with named(source, file):
            picture = _picture(file, {1: "L", 3: "RGB"}[channels], (width, height))
        images[number] = picture.reshape(height, width, channels)
        if told is not None:
            told(number + 1, source.count)
    return images.transpose(0, 3, 1, 2)


def _picture(file: Path, mode: str, size: tuple[int, int]) -> Uint8Array:
    """A picture of 8 bits a channel, turned the way up that its camera noted, on white. Raises as Pillow does, and
    WrongPicture."""
    from PIL import Image, ImageOps

    with Image.open(file) as opened:
        opened.draft(mode, (4 * max(size),) * 2)  # a JPEG of many megapixels is decoded at a part of its size
        upright = ImageOps.exif_transpose(opened)
    if upright.mode.startswith(("I", "F")):  # Pillow would cut larger numbers off at 255
        raise WrongPicture(f"must have 8 bits a channel, not be of Pillow's mode {upright.mode}")
    if upright.has_transparency_data:  # what lies under it is anything
        white = Image.new("RGBA", upright.size, "white")
        upright = Image.alpha_composite(white, upright.convert("RGBA"))
    return np.asarray(ImageOps.fit(upright.convert(mode), size))


def held_out(count: int, share: float = 0.1) -> tuple[IntArray, IntArray]:
    """A fixed split of `count` pictures: (indices to train on, indices never trained on)."""
    order = np.random.default_rng(0).permutation(count)
    kept_back = max(1, round(count * share))
    return order[kept_back:], order[:kept_back]


def require_fit(source: Source, arch: Architecture) -> None:
    """Raises ValueError unless there are pictures to learn from, with the labels that the net is to learn."""
    name, labels = source.path.name, len(source.names)
    if source.count < 2:
        raise ValueError(f"{name} must hold at least two pictures: of each ten, one is held out")
    if arch.labels and source.labels is None:
        stray = f": {printable(source.stray.name)} lies in no sub-folder" if source.stray is not None else ""
        raise ValueError(f"{name} has no labels (sub-folders, or an array `labels`), which this net is to learn{stray}")
    if arch.labels and labels + 1 != arch.labels:
        wanted = f"num_class_embeds {labels + 1} (these and the null label), not {arch.labels}"
        raise ValueError(f"{name} has {labels} labels: config.json must have {wanted}")


class Pictures:
    """The pictures of a training, split into those it sees and those it never sees."""

    def __init__(self, source: Source, arch: Architecture, balance: float = 0.0, told: Told | None = None) -> None:
        require_fit(source, arch)
        dataset = read(source, arch.shape, told)
        self.images = torch.from_numpy(dataset.images)  # [N, C, H, W] uint8
        self.labels = torch.from_numpy(dataset.labels) if dataset.labels is not None and arch.labels else None
        self.seen, self.unseen = held_out(len(self.images))
        self._weights: NDArray[np.float64] | None = None  # of the pictures that are seen; None: all alike
        if self.labels is not None and balance:
            own = self.labels[self.seen].numpy()
            weights = np.bincount(own)[own] ** -float(balance)
            self._weights = weights / weights.sum()

    def draw(self, step: int, batch: int) -> tuple[Tensor, Tensor | None]:
        """The batch of an update, always the same. -> [B, C, H, W] in [-1, 1], and its labels"""
        drawn = np.random.default_rng(step).choice(len(self.seen), batch, p=self._weights)
        return self._take(self.seen[drawn])

    def probes(self) -> tuple[Tensor, Tensor | None]:
        """Some of those never seen."""
        return self._take(self.unseen[:PROBES])

    def _take(self, chosen: IntArray) -> tuple[Tensor, Tensor | None]:
        pictures = self.images[chosen].float() / 127.5 - 1
        return pictures, None if self.labels is None else self.labels[chosen]
