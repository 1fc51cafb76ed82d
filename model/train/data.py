"""Training pictures and their labels: a folder of images, perhaps in a sub-folder for each label, or an .npz."""

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from model.errors import reason
from model.nets.config import MAX_LABELS

Uint8Array: TypeAlias = NDArray[np.uint8]
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


@dataclass(frozen=True, slots=True)
class Dataset:
    """Pictures of one size; where they have labels, the label of each picture, and the names of labels."""

    images: Uint8Array  # [N, C, H, W]
    labels: NDArray[np.int64] | None = None  # [N]
    names: tuple[str, ...] = ()


def load_dataset(source: Path, shape: tuple[int, int, int]) -> Dataset:
    """All pictures of `source` in one size, and their labels. shape: (C, H, W)

    A folder is read recursively; each picture is cropped to its centre and resized. If every picture lies in one of
    several sub-folders, these are the labels. Of an .npz the array `images` is read, [N, H, W], [N, H, W, C] or
    [N, C, H, W] uint8, and padded with zeros if it is smaller than (H, W); and if they are there `labels`, [N] whole
    numbers from 0, and `names`, one for each label. Raises ValueError if there are no pictures, one is broken or not of
    8 bits, the sizes do not fit, or the labels do not.
    """
    images, labels, names = _from_folder(source, shape) if source.is_dir() else _from_npz(source)
    given, size = images, images.shape
    if images.ndim == 3:
        images = images[:, None]
    if images.ndim == 4 and images.shape[1] != shape[0] and images.shape[-1] == shape[0]:
        images = images.transpose(0, 3, 1, 2)
    missing = [want - have for want, have in zip(shape, images.shape[1:], strict=False)]
    if images.dtype != np.uint8 or images.ndim != 4 or len(images) == 0 or missing[0] or min(missing) < 0:
        raise ValueError(f"{source.name} holds {given.dtype}{list(size)}, which does not fit into {shape}")
    above, left = missing[1] // 2, missing[2] // 2
    images = np.pad(images, ((0, 0), (0, 0), (above, missing[1] - above), (left, missing[2] - left)))
    return Dataset(images, *_checked(source, len(images), labels, names))


def load_images(source: Path, shape: tuple[int, int, int]) -> Uint8Array:
    """The pictures of `load_dataset` alone. -> [N, C, H, W]"""
    return load_dataset(source, shape).images


def _checked(
    source: Path, count: int, labels: NDArray[Any] | None, names: tuple[str, ...]
) -> tuple[NDArray[np.int64] | None, tuple[str, ...]]:
    """Labels and their names, if they fit the pictures. Raises ValueError."""
    if labels is None:
        return None, ()
    if labels.shape != (count,) or labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= MAX_LABELS:
        raise ValueError(f"{source.name}: labels must be {count} whole numbers in 0..{MAX_LABELS - 1}, one a picture")
    names = names or tuple(map(str, range(int(labels.max()) + 1)))
    if labels.max() >= len(names) or len({*names}) < len(names):
        raise ValueError(
            f"{source.name}: names must be one for each of the {int(labels.max()) + 1} labels, all different"
        )
    return labels.astype(np.int64), names


Read: TypeAlias = tuple[Uint8Array, NDArray[Any] | None, tuple[str, ...]]  # pictures, labels, names


def _from_npz(source: Path) -> Read:
    try:
        with source.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            images: Uint8Array = arrays["images"]
            labels = arrays["labels"] if "labels" in arrays else None
            names = tuple(map(str, arrays["names"])) if "names" in arrays else ()
    except (BadZipFile, EOFError, KeyError, OSError, TypeError, ValueError, zlib.error) as error:
        raise ValueError(f"{source.name} must be a sound .npz with an array `images`") from error
    return images, labels, names


def _from_folder(source: Path, shape: tuple[int, int, int]) -> Read:
    files = sorted(p for p in source.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not files:
        raise ValueError(f"{source.name} holds no {', '.join(sorted(SUFFIXES))}")
    pictures = [_picture(file, {1: "L", 3: "RGB"}[shape[0]], (shape[2], shape[1])) for file in files]
    images = np.stack(pictures).reshape(len(files), *shape[1:], shape[0])
    folders = [file.relative_to(source).parts[0] for file in files]
    names = tuple(sorted({*folders}))
    if any(file.parent == source for file in files) or len(names) < 2:
        return images, None, ()
    return images, np.array([names.index(folder) for folder in folders]), names


def _picture(file: Path, mode: str, size: tuple[int, int]) -> Uint8Array:
    """A picture of 8 bits a channel, turned the way up that its camera noted. Raises ValueError."""
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as opened:
            upright = ImageOps.exif_transpose(opened)
    except (Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{file.name} is not a sound picture: {reason(error)}") from error
    if upright.mode.startswith(("I", "F")):  # Pillow would cut larger numbers off at 255
        raise ValueError(f"{file.name} must have 8 bits a channel, not be of Pillow's mode {upright.mode}")
    return np.asarray(ImageOps.fit(upright.convert(mode), size))


def held_out(count: int, share: float = 0.1) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """A fixed split of `count` pictures: (indices to train on, indices never trained on)."""
    order = np.random.default_rng(0).permutation(count)
    kept_back = max(1, round(count * share))
    return order[kept_back:], order[:kept_back]
