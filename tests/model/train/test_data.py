"""Training pictures: whatever they lie in, what is trained on is what a viewer of them sees."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model.train.data import Uint8Array, load_images


def random(*shape: int) -> Uint8Array:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def from_npz(directory: Path, images: object, shape: tuple[int, int, int]) -> Uint8Array:
    """What is loaded, for pictures of this shape, of an .npz with this array."""
    np.savez(directory / "pictures.npz", images=np.asarray(images))
    return load_images(directory / "pictures.npz", shape)


def test_channels_may_be_first_last_or_one_alone(tmp_path: Path) -> None:
    colour, grey = random(5, 3, 6, 8), random(5, 6, 8)

    assert np.array_equal(from_npz(tmp_path, colour, (3, 6, 8)), colour)
    assert np.array_equal(from_npz(tmp_path, colour.transpose(0, 2, 3, 1), (3, 6, 8)), colour)
    assert np.array_equal(from_npz(tmp_path, grey, (1, 6, 8))[:, 0], grey)
    assert np.array_equal(from_npz(tmp_path, grey[..., None], (1, 6, 8))[:, 0], grey)


def test_a_smaller_picture_is_surrounded_by_black(tmp_path: Path) -> None:
    given = random(2, 5, 6) | 1
    loaded = from_npz(tmp_path, given, (1, 8, 8))[:, 0]

    assert np.array_equal(loaded[:, 1:6, 1:7], given)
    assert np.count_nonzero(loaded) == given.size


@pytest.mark.parametrize("shape", [(5, 9, 8), (5, 3, 8, 8), (5,), (0, 8, 8), (2, 2, 2, 2, 2)])
def test_images_that_do_not_fit_are_refused_with_their_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError) as refused:
        from_npz(tmp_path, np.zeros(shape, np.uint8), (1, 8, 8))

    assert str(refused.value) == f"pictures.npz holds uint8{list(shape)}, which does not fit into (1, 8, 8)"


def test_numbers_that_are_no_bytes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds float64"):
        from_npz(tmp_path, np.zeros((5, 8, 8)), (1, 8, 8))


def test_a_picture_is_taken_the_way_up_that_its_camera_noted(tmp_path: Path) -> None:
    lying = random(8, 8, 3)
    quarter = Image.Exif()
    quarter[0x0112] = 6  # to be seen, turn it clockwise
    Image.fromarray(lying).save(tmp_path / "photograph.png", exif=quarter)
    (loaded,) = load_images(tmp_path, (3, 8, 8))

    assert np.array_equal(loaded.transpose(1, 2, 0), np.rot90(lying, -1))


def test_a_picture_of_more_than_bytes_is_refused_and_not_cut_off(tmp_path: Path) -> None:
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match="deep.png must have 8 bits a channel"):
        load_images(tmp_path, (1, 8, 8))


@pytest.mark.parametrize("kept", [4, 100])
def test_a_broken_picture_is_named(tmp_path: Path, kept: int) -> None:
    Image.fromarray(random(64, 64)).save(tmp_path / "broken.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "broken.png").read_bytes()[:kept])
    with pytest.raises(ValueError, match="broken.png is not a sound picture"):
        load_images(tmp_path, (1, 8, 8))


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 and no more"])
def test_a_file_that_is_no_npz_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "pictures.npz").write_bytes(content)
    with pytest.raises(ValueError, match="pictures.npz must be a sound .npz with an array `images`"):
        load_images(tmp_path / "pictures.npz", (1, 8, 8))
