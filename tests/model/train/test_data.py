"""Training pictures: whatever they lie in, what is trained on is what a viewer of them sees."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model.nets.config import Architecture
from model.train.data import Pictures, Uint8Array, held_out, load_images
from model.train.source import Source, find
from tests.model.tiny import ARCHITECTURE
from tests.model.train.worlds import random


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


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_what_is_transparent_is_white(tmp_path: Path, mode: str) -> None:
    opaque = Image.fromarray(random(8, 8, 3)).convert("P", palette=Image.Palette.ADAPTIVE, colors=8)
    hidden = np.zeros((8, 8), bool)
    hidden[:4] = True
    if mode == "P":
        pixels = np.where(hidden, 3, np.asarray(opaque) % 3).astype(np.uint8)
        made = Image.frombytes("P", (8, 8), pixels.tobytes())
        made.putpalette(opaque.getpalette() or [])
        made.save(tmp_path / "a.png", transparency=3)
    elif mode == "RGB":  # one colour stands for transparent
        made = Image.fromarray(np.where(hidden[..., None], [1, 2, 3], [200, 100, 50]).astype(np.uint8))
        made.save(tmp_path / "a.png", transparency=(1, 2, 3))
    else:
        made = opaque.convert(mode)
        made.putalpha(Image.fromarray(np.where(hidden, 0, 255).astype(np.uint8)))
        made.save(tmp_path / "a.png")
    found = load_images(tmp_path, (3, 8, 8))

    assert (found[0, :, :4] == 255).all()
    assert not (found[0, :, 4:] == 255).all()


@pytest.mark.parametrize("kept", [4, 100])
def test_a_broken_picture_is_named(tmp_path: Path, kept: int) -> None:
    Image.fromarray(random(64, 64)).save(tmp_path / "broken.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "broken.png").read_bytes()[:kept])
    with pytest.raises(ValueError, match="broken.png is not a sound picture"):
        load_images(tmp_path, (1, 8, 8))


def labelled(directory: Path, counts: tuple[int, ...]) -> Source:
    """Pictures of several labels, so many of each; all pixels of a picture are its label."""
    labels = np.repeat(np.arange(len(counts)), counts)
    images = labels.astype(np.uint8)[:, None, None].repeat(8, 1).repeat(8, 2)
    np.savez(directory / "pictures.npz", images=images, labels=labels)
    return find(directory / "pictures.npz")


def conditional(labels: int) -> Architecture:
    """The tiny net with so many labels, the null label among them."""
    return Architecture(height=8, width=8, in_channels=1, out_channels=1, num_class_embeds=labels)


def test_a_picture_is_drawn_with_its_own_label(tmp_path: Path) -> None:
    pictures, labels = Pictures(labelled(tmp_path, (20, 20, 20)), conditional(4)).draw(step=0, batch=64)

    assert labels is not None and {*labels.tolist()} == {0, 1, 2}
    assert ((pictures[:, 0, 0, 0] + 1) * 127.5).round().long().tolist() == labels.tolist()


def test_an_update_always_draws_the_same_pictures_and_never_those_that_are_held_out(tmp_path: Path) -> None:
    np.savez(tmp_path / "pictures.npz", images=np.arange(40, dtype=np.uint8)[:, None, None].repeat(8, 1).repeat(8, 2))
    made = Pictures(find(tmp_path / "pictures.npz"), ARCHITECTURE)
    first, again = (made.draw(step=3, batch=16)[0] for _ in range(2))
    drawn = {round((float(p[0, 0, 0]) + 1) * 127.5) for step in range(40) for p in made.draw(step, 16)[0]}

    assert first.equal(again)
    assert drawn == {*range(40)} - {*held_out(40)[1].tolist()}


@pytest.mark.parametrize(("balance", "share"), [(0.0, 0.1), (1.0, 0.5)])
def test_with_balance_a_rare_label_is_drawn_as_often_as_any_other(tmp_path: Path, balance: float, share: float) -> None:
    made = Pictures(labelled(tmp_path, (360, 40)), conditional(3), balance)
    labels = made.draw(step=0, batch=4000)[1]

    assert labels is not None
    assert float(labels.float().mean()) == pytest.approx(share, abs=0.03)


def test_labels_must_be_those_that_the_net_is_to_learn(tmp_path: Path) -> None:
    source = labelled(tmp_path, (20, 20))
    with pytest.raises(ValueError, match=r"has 2 labels: config.json must have num_class_embeds 3 \(.*\), not 11"):
        Pictures(source, conditional(11))

    np.savez(tmp_path / "pictures.npz", images=random(40, 8, 8))
    with pytest.raises(ValueError, match="pictures.npz has no labels"):
        Pictures(find(tmp_path / "pictures.npz"), conditional(3))


def test_a_net_without_labels_learns_from_labelled_pictures_as_from_any(tmp_path: Path) -> None:
    assert Pictures(labelled(tmp_path, (20, 20)), ARCHITECTURE).draw(step=0, batch=8)[1] is None
