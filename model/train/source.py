"""Where training pictures lie, and their labels: a folder of images, perhaps a sub-folder for each label, or an .npz.

Nothing is decoded here. Of a folder's pictures the names are read and, for a new model directory, the headers.
"""

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar
from zipfile import BadZipFile, ZipFile

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from model.errors import printable, reason
from model.nets.config import MAX_LABELS
from model.train.recipe import SHEETS

IntArray: TypeAlias = NDArray[np.int64]
SUFFIXES = {*".png .jpg .jpeg .webp .bmp .gif .tif .tiff".split()}  # of an animation the first frame is read
CHANNELS = (1, 3)  # of a picture: grey, or red, green and blue
GREY_MODES = {"1", "L", "LA", "La", "I;16"}  # of Pillow
BROKEN = (BadZipFile, EOFError, KeyError, OSError, TypeError, ValueError, zlib.error)  # what reading an .npz raises
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Source:
    """Training pictures before they are read. If they have labels: that of each picture, and the labels' names."""

    path: Path
    count: int
    labels: IntArray | None = None  # [count]
    names: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()  # of a folder, one for each picture
    stray: Path | None = None  # a picture beside sub-folders, which therefore are no labels


@dataclass(frozen=True, slots=True)
class Outline:
    """What the headers of pictures say."""

    channels: int  # 1 if all are grey, else 3
    sides: tuple[int, int] | None  # (height, width), if all have the same
    fixed: bool = False  # whether they can be padded, but not resized


def find(path: Path) -> Source:
    """The pictures of a folder, read recursively, or of an .npz. Raises ValueError if there are none.

    If every picture of a folder lies in one of several sub-folders, these are the labels. An .npz has an array
    `images`; and it may have `labels`, [N] whole numbers from 0, and `names`, one for each label.
    """
    return _in_folder(path) if path.is_dir() else _in_npz(path)


def _in_folder(path: Path) -> Source:
    inside = (file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
    files = sorted(file for file in inside if not _is_hidden(file.relative_to(path)))
    if not files:
        raise ValueError(f"{path.name} holds no {', '.join(sorted(SUFFIXES))}")
    folders = [file.relative_to(path).parts[0] for file in files if file.parent != path]
    numbered = all(folder.isdecimal() for folder in folders)
    names = tuple(sorted({*folders}, key=(lambda name: (int(name), name)) if numbered else None))
    if len(names) < 2 or len(folders) < len(files):
        stray = next((file for file in files if file.parent == path), None) if len(names) > 1 else None
        return Source(path, len(files), files=tuple(files), stray=stray)
    number = {name: label for label, name in enumerate(names)}
    return Source(path, len(files), np.array([number[folder] for folder in folders]), names, tuple(files))


def _is_hidden(file: Path) -> bool:
    """Whether this is no picture of the user's, but what a system keeps beside one (macOS: ._NAME, __MACOSX/)."""
    return any(part.startswith(".") or part == "__MACOSX" for part in file.parts)


def _in_npz(path: Path) -> Source:
    def read() -> tuple[int, NDArray[Any] | None, tuple[str, ...]]:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            labels = arrays["labels"] if "labels" in arrays else None
            names = tuple(map(str, arrays["names"])) if "names" in arrays else ()
            shape, _ = header(path)
            return shape[0] if shape else 0, labels, names

    count, labels, names = sound(path, read)
    if labels is None:
        return Source(path, count)
    whole = labels.shape == (count,) and count > 0 and labels.dtype.kind in "iu"
    if not whole or labels.min() < 0 or labels.max() >= MAX_LABELS:
        raise ValueError(f"{path.name}: labels must be {count} whole numbers in 0..{MAX_LABELS - 1}, one a picture")
    known = int(labels.max()) + 1
    names = names or tuple(map(str, range(known)))
    if known > len(names) or len({*names}) < len(names):
        raise ValueError(f"{path.name}: names must be one for each of the {known} labels, all different")
    return Source(path, count, labels.astype(np.int64), names)


def sound(path: Path, read: Callable[[], T]) -> T:
    """What is read of an .npz. Raises ValueError, naming it, if it is no .npz with an array `images`."""
    try:
        return read()
    except BROKEN as error:
        raise ValueError(f"{path.name} must be a folder of pictures, or a sound .npz with an array `images`") from error


def header(path: Path) -> tuple[tuple[int, ...], str]:
    """The shape of the array `images` of an .npz, and the name of its dtype."""
    with ZipFile(path) as archive, archive.open("images.npy") as file:
        old = npy.read_magic(file) == (1, 0)
        shape, _, dtype = npy.read_array_header_1_0(file) if old else npy.read_array_header_2_0(file)
    return shape, str(dtype)


def outline(source: Source) -> Outline:
    """What the headers of the pictures say. Raises ValueError if one is broken."""
    return _outline_of_files(source) if source.files else _outline_of_npz(source.path)


def _outline_of_npz(path: Path) -> Outline:
    shape, dtype = sound(path, lambda: header(path))
    inside = shape[1:] if len(shape) == 4 else (*shape[1:], 1)
    if len(inside) == 3 and inside[-1] in CHANNELS:
        return Outline(inside[-1], (inside[0], inside[1]), fixed=True)
    if len(inside) == 3 and inside[0] in CHANNELS:
        return Outline(inside[0], (inside[1], inside[2]), fixed=True)
    raise ValueError(f"{path.name} holds {dtype}{list(shape)}, which are no pictures of 1 or 3 channels")


def _outline_of_files(source: Source) -> Outline:
    from PIL import Image

    sizes, grey = set[tuple[int, int]](), True
    for file in source.files:
        with named(source, file), Image.open(file) as opened:
            exif = opened.getexif() if "exif" in opened.info else {}  # else a PNG would be decoded for it
            turned = exif.get(0x0112, 1) >= 5  # by the way a camera was held
            sizes.add(opened.size if turned else opened.size[::-1])
            grey = grey and opened.mode in GREY_MODES
    return Outline(1 if grey else 3, sizes.pop() if len(sizes) == 1 else None)


class WrongPicture(ValueError):
    """A sound picture, but none to train on. The message says what it must be."""


@contextmanager
def named(source: Source, file: Path) -> Iterator[None]:
    """Within it a picture of a folder is read. Raises ValueError, naming it, if it is broken or a `WrongPicture`."""
    from PIL import Image

    name = printable(str(file.relative_to(source.path)))
    try:
        yield
    except WrongPicture as error:
        raise ValueError(f"{name} {error}") from error
    except (Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{name} is not a sound picture: {reason(error)}") from error


def require_outside(directory: Path, source: Path) -> None:
    """Raises ValueError if a training in this directory would see its own samples."""
    out, pictures = directory.resolve(), source.resolve()
    within = pictures.is_relative_to(out / SHEETS)
    if out.is_relative_to(pictures):
        within = not _is_hidden(out.relative_to(pictures))
    if source.is_dir() and within:
        raise ValueError(f"{directory} must lie outside {source}, or the next run would be trained on its samples")
