"""Contact sheets, PNGs and npy files."""

import subprocess
import sys

import numpy as np

from server.jobs.encode import contact_sheet, npy, png
from tests.server.fakes import read_texts


def test_one_picture_is_its_own_contact_sheet() -> None:
    picture = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)

    assert np.array_equal(contact_sheet([picture]), picture)


def test_a_png_has_its_text_chunks_and_no_others() -> None:
    data = png(np.zeros((4, 4, 3), np.uint8), {"seed": "42", "model": "digits"})

    assert read_texts(data) == {"seed": "42", "model": "digits"}
    assert data == png(np.zeros((4, 4, 3), np.uint8), {"seed": "42", "model": "digits"})


def test_npy_is_little_endian_float32() -> None:
    assert npy([np.zeros((1, 2, 2), np.float32)])[:40].startswith(b"\x93NUMPY\x01\x00v\x00{'descr': '<f4'")


def test_whatever_a_picture_is_encoded_with_was_imported_at_the_start() -> None:
    code = """
import sys
import numpy as np
from server.jobs import encode
before, picture = set(sys.modules), np.zeros((8, 8, 1), np.uint8)
png = encode.png(picture, {"seed": "1"})
encode.pixels(png), encode.npy([np.zeros((1, 8, 8), np.float32)]), encode.archive({"a.png": png})
for media in ("image/gif", "image/apng", "image/webp"):
    encode.animation([picture, picture], media)
for media in ("image/webp", "image/jpeg"):
    encode.still(png, media, 90)
sys.exit(", ".join(set(sys.modules) - before) or 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert (done.returncode, done.stderr) == (0, "")
