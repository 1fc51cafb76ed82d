"""The configurations of a new directory: a net that fits the pictures, and is served."""

import pytest

from model.checkpoint.labels import read_labels
from model.checkpoint.pipeline import require_served
from model.checkpoint.presets import read_presets
from model.checkpoint.scheduler import read_process
from model.nets.config import ATTENTION, DOWN_BLOCKS, architecture
from model.sampling.labels import Labels
from model.train.fresh import fits, index, net_config, scheduler_config, sides_for
from model.train.source import Outline


@pytest.mark.parametrize(
    ("pictures", "sides"),
    [
        (Outline(3, None), (32, 32)),  # of several sizes
        (Outline(3, (48, 48)), (48, 48)),
        (Outline(3, (64, 32)), (64, 32)),
        (Outline(3, (512, 512)), (32, 32)),  # too large for a first try
        (Outline(3, (50, 50)), (32, 32)),  # 50 cannot be halved three times
        (Outline(1, (28, 28), fixed=True), (28, 28)),
        (Outline(1, (30, 30), fixed=True), (32, 32)),  # padded
        (Outline(1, (90, 70), fixed=True), (96, 96)),
    ],
)
def test_a_new_net_has_the_size_of_its_pictures_if_that_can_be_halved(
    pictures: Outline, sides: tuple[int, int]
) -> None:
    assert sides_for(pictures, None) == sides


@pytest.mark.parametrize(("size", "step"), [(0, 2), (30, 4), (36, 8), (1000, 128)])
def test_a_size_that_cannot_be_halved_is_refused(size: int, step: int) -> None:
    with pytest.raises(ValueError, match=rf"--size must be a multiple of {step} in 8..512, got {size}"):
        sides_for(Outline(3, None), size)


@pytest.mark.parametrize("width", [0, 12, 1024])
def test_a_width_that_norms_cannot_divide_is_refused(width: int) -> None:
    with pytest.raises(ValueError, match=rf"--width must be a multiple of 8 in 8..512, got {width}"):
        net_config(3, (32, 32), width, 0)


@pytest.mark.parametrize("side", [side for side in range(8, 513) if fits(side, side)])
def test_every_net_has_attention_at_its_two_lowest_levels_of_few_pixels(side: int) -> None:
    arch = architecture(net_config(3, (side, side), None, 2))
    kinds = [DOWN_BLOCKS[each] == ATTENTION for each in arch.down_block_types]

    assert 4 <= side >> (arch.levels - 1) < 8
    assert kinds == [False] * (arch.levels - 2) + [True, True]
    assert (arch.shape, arch.labels) == ((3, side, side), 3)  # the third is the null label


def test_the_index_names_the_labels_and_is_that_of_a_served_pipeline() -> None:
    made = index(("cats", "dogs"))
    process = read_process(scheduler_config(), made, learned=False)

    require_served(made)
    assert read_labels(made, architecture(net_config(3, (32, 32), None, 2))) == Labels(
        count=3, null=2, names={0: "cats", 1: "dogs"}, guidance=2.0
    )
    assert (process.default_steps, process.schedule.T, process.prediction) == (50, 1000, "v_prediction")
    assert read_presets(made, process)["fast"]["steps"] == 10
    assert index(("cats", "dogs"), guided=False) == {key: said for key, said in made.items() if key != "guidance"}
    assert index(()).keys() == made.keys() - {"id2label", "null_label", "guidance"}


def test_a_folder_whose_name_no_request_could_say_is_a_label_without_a_name() -> None:
    made = index(("a" * 101, "cats", "tab\t", "random"))
    labels = read_labels(made, architecture(net_config(3, (32, 32), None, 4)))

    assert labels is not None and labels.names == {1: "cats"}
