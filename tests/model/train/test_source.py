"""Where pictures lie: their labels by sub-folders or beside them, and what their headers say of a net for them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from model.train.source import Outline, find, outline
from tests.model.train.worlds import random


def picture(path: Path, *shape: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(random(*shape)).save(path)


def test_sub_folders_are_labels_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("dogs/a.png", "cats/deeper/b.png", "dogs/c.png"):
        picture(tmp_path / name, 8, 8)
    found = find(tmp_path)

    assert found.names == ("cats", "dogs")
    assert found.labels is not None and found.labels.tolist() == [0, 1, 1]
    assert [file.name for file in found.files] == ["b.png", "a.png", "c.png"]


def test_folders_that_are_numbered_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in range(12):
        picture(tmp_path / str(number) / "a.png", 8, 8)

    assert find(tmp_path).names == tuple(map(str, range(12)))


@pytest.mark.parametrize(
    "names", [["a.png", "b.png"], ["one/a.png", "one/b.png"], ["a.png", "cats/b.png", "dogs/c.png"]]
)
def test_pictures_beside_folders_or_in_one_alone_have_no_labels(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        picture(tmp_path / name, 8, 8)

    found = find(tmp_path)
    assert (found.count, found.labels) == (len(names), None)
    assert found.stray == (tmp_path / "a.png" if len(names) == 3 else None)


def test_what_a_system_keeps_beside_pictures_is_none_of_them(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 8, 8)
    for name in ("._a.png", "__MACOSX/a.png", ".thumbnails/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"no picture")

    assert [file.name for file in find(tmp_path).files] == ["a.png"]


def test_a_folder_without_pictures_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match="holds no .bmp, .gif, .jpeg, .jpg, .png, .tif, .tiff, .webp"):
        find(tmp_path)


@pytest.mark.parametrize(
    ("named", "names"), [({}, ("0", "1", "2")), ({"names": np.array(["a", "b", "c", "d"])}, ("a", "b", "c", "d"))]
)
def test_an_npz_may_have_labels_and_their_names(tmp_path: Path, named: dict[str, Any], names: tuple[str, ...]) -> None:
    np.savez(tmp_path / "pictures.npz", images=random(3, 8, 8), labels=np.array([2, 0, 1], np.uint8), **named)
    found = find(tmp_path / "pictures.npz")

    assert found.labels is not None and found.labels.tolist() == [2, 0, 1]
    assert found.names == names


@pytest.mark.parametrize(
    ("arrays", "refusal"),
    [
        ({"labels": np.zeros(2, int)}, "labels must be 3 whole numbers in 0..65535, one a picture"),
        ({"labels": np.zeros(3)}, "labels must be 3 whole numbers"),
        ({"labels": np.array([0, 1, -1])}, "labels must be 3 whole numbers"),
        ({"labels": np.arange(3), "names": np.array(["a", "b"])}, "names must be one for each of the 3 labels"),
        ({"labels": np.arange(3), "names": np.array(["a", "b", "a"])}, "names must be one for each of the 3 labels"),
    ],
)
def test_labels_that_do_not_fit_the_pictures_are_refused(tmp_path: Path, arrays: dict[str, Any], refusal: str) -> None:
    np.savez(tmp_path / "pictures.npz", images=random(3, 8, 8), **arrays)
    with pytest.raises(ValueError, match=f"pictures.npz: {refusal}"):
        find(tmp_path / "pictures.npz")


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 and no more"])
def test_a_file_that_is_no_npz_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "pictures.npz").write_bytes(content)
    with pytest.raises(
        ValueError, match="pictures.npz must be a folder of pictures, or a sound .npz with an array `images`"
    ):
        find(tmp_path / "pictures.npz")


def test_headers_say_whether_all_are_grey_and_of_one_size(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 6, 8)
    assert outline(find(tmp_path)) == Outline(1, (6, 8))

    picture(tmp_path / "b.png", 6, 8, 3)
    assert outline(find(tmp_path)) == Outline(3, (6, 8))

    picture(tmp_path / "c.png", 8, 8)
    assert outline(find(tmp_path)) == Outline(3, None)


def test_a_picture_that_a_camera_held_upright_is_as_high_as_it_looks(tmp_path: Path) -> None:
    quarter = Image.Exif()
    quarter[0x0112] = 6
    Image.fromarray(random(6, 8, 3)).save(tmp_path / "photograph.jpg", exif=quarter)

    assert outline(find(tmp_path)).sides == (8, 6)


def test_no_picture_is_decoded_for_its_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(self: ImageFile.ImageFile) -> None:
        raise AssertionError

    for name in ("a.png", "b.jpg", "c.webp", "d.bmp"):
        picture(tmp_path / name, 8, 8, 3)
    monkeypatch.setattr(ImageFile.ImageFile, "load", decode)

    assert outline(find(tmp_path)) == Outline(3, (8, 8))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((5, 6, 8), Outline(1, (6, 8), fixed=True)),
        ((5, 6, 8, 1), Outline(1, (6, 8), fixed=True)),
        ((5, 6, 8, 3), Outline(3, (6, 8), fixed=True)),
        ((5, 3, 6, 8), Outline(3, (6, 8), fixed=True)),
    ],
)
def test_the_shape_of_an_array_says_where_its_channels_are(
    tmp_path: Path, shape: tuple[int, ...], expected: Outline
) -> None:
    np.savez(tmp_path / "pictures.npz", images=random(*shape))

    assert outline(find(tmp_path / "pictures.npz")) == expected


def test_an_array_of_no_pictures_is_refused_with_its_shape(tmp_path: Path) -> None:
    np.savez(tmp_path / "pictures.npz", images=random(5, 8, 8, 4))
    with pytest.raises(ValueError, match=r"pictures.npz holds uint8\[5, 8, 8, 4\], which are no pictures of 1 or 3"):
        outline(find(tmp_path / "pictures.npz"))
