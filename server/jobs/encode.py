"""Pictures as files: PNG with what made them, contact sheets, npy, zip. All pure, all slow: use a thread."""

import io
import math
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, WebPImagePlugin
from PIL.PngImagePlugin import PngInfo

from model.engine.events import Floats, Picture

Image.preinit()  # Pillow would import its formats when the first is used, for which descriptors may then be lacking
assert WebPImagePlugin.SUPPORTED  # it is not among those
FRAME_MS, HOLD_MS = 60, 2000  # of an animation: each frame, and the picture at its end


def _image(picture: Picture) -> Image.Image:
    return Image.fromarray(picture[:, :, 0] if picture.shape[2] == 1 else picture)


def _file(image: Image.Image, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, **options)
    return out.getvalue()


def png(picture: Picture, texts: Mapping[str, str]) -> bytes:
    """A PNG with text chunks. picture: [H, W, C] uint8, C = 1 or 3"""
    info = PngInfo()
    for key, text in texts.items():
        info.add_text(key, text)
    return _file(_image(picture), format="PNG", pnginfo=info, compress_level=6)


def pixels(data: bytes) -> Picture:
    """What is on a PNG of ours. -> [H, W, C] uint8"""
    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        found = np.asarray(image)
    return found[:, :, None] if found.ndim == 2 else found


def still(data: bytes, media: str, quality: int) -> bytes:
    """A PNG of ours in another format, without its texts. media: image/webp, lossless at quality 100, or image/jpeg"""
    options: dict[str, Any] = {
        "image/webp": {"format": "WEBP", "lossless": quality == 100, "quality": quality},
        "image/jpeg": {"format": "JPEG", "quality": quality, "subsampling": 0},
    }[media]
    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        return _file(image, **options)


def contact_sheet(pictures: Sequence[Picture]) -> Picture:
    """All pictures in one: ceil(sqrt(n)) columns, row by row, no gaps, black filler. -> [H', W', C]"""
    columns = math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    height, width, channels = pictures[0].shape
    sheet = np.zeros((rows * height, columns * width, channels), np.uint8)
    for i, picture in enumerate(pictures):
        top, left = i // columns * height, i % columns * width
        sheet[top : top + height, left : left + width] = picture
    return sheet


def side_by_side(pictures: Sequence[Picture | None]) -> Picture:
    """Pictures of one size in a row, black where there is none. [H, W, C] each -> [H, W', C]"""
    black = np.zeros_like(next(picture for picture in pictures if picture is not None))
    return np.concatenate([black if picture is None else picture for picture in pictures], axis=1)


def animation(pictures: Sequence[Picture], media: str) -> bytes:
    """Pictures one after the other, the last one held, again and again. media: image/gif, image/apng or image/webp"""
    first, *others = map(_image, pictures)
    times = [FRAME_MS] * len(others) + [HOLD_MS]
    options: dict[str, Any] = {
        "image/gif": {"format": "GIF", "optimize": False},
        "image/apng": {"format": "PNG", "default_image": False},
        "image/webp": {"format": "WEBP", "lossless": True},
    }[media]
    return _file(first, save_all=True, append_images=others, duration=times, loop=0, **options)


def npy(arrays: Sequence[Floats]) -> bytes:
    """One numpy file. n arrays [C, H, W] -> [n, C, H, W] float32"""
    out = io.BytesIO()
    np.save(out, np.stack(arrays).astype("<f4"), allow_pickle=False)
    return out.getvalue()


def archive(files: Mapping[str, bytes]) -> bytes:
    """A zip of files that are compressed already; the same bytes for the same files."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as zipped:
        for name, data in files.items():
            zipped.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), data)
    return out.getvalue()
