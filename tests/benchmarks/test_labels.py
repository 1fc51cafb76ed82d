"""What is measured of conditional models is what it is said to be."""

from pathlib import Path

import numpy as np
import torch

from benchmarks.distance import alike
from benchmarks.emoji import nearest, sheet
from benchmarks.gpu.training import Pupil, line_before
from benchmarks.guidance import measures, without_labels
from benchmarks.quality import of_asked, told
from model.checkpoint.card import read_card
from model.sampling.plan import resolve
from model.train.train import train
from tests.model.convert.directories import write_model
from tests.model.train.worlds import RECIPE, Told, log_of, untrained

INDEX = {"null_label": 3, "guidance": 2.0}


def test_the_net_without_labels_is_the_same_but_for_them(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", labels=4, index=INDEX)
    (tmp_path / "plain").mkdir()
    plain = read_card(without_labels(model, tmp_path / "plain"))

    assert (plain.labels, plain.shape, plain.process.schedule.T) == (None, (1, 8, 8), 30)


def test_labels_and_guidance_are_measured_against_their_absence(tmp_path: Path) -> None:
    model = write_model(tmp_path, labels=4, index=INDEX)
    found = list(measures(model, torch.device("cpu"), steps=2, rounds=1))

    assert [measure.unit for measure in found] == ["x"] * 4
    assert all(measure.value > 0 for measure in found)


def test_labels_are_asked_for_in_turns_with_the_models_guidance(tmp_path: Path) -> None:
    card = read_card(write_model(tmp_path, labels=4, index=INDEX))
    choice = resolve(card.process, "ddpm", 5)

    guided, pairs = told(card, choice, None)
    plain, singles = told(card, choice, 1.0)
    assert (guided.guidance, pairs) == (2.0, [(0, 3), (1, 3), (2, 3)])
    assert (plain.guided, singles) == (False, [(0,), (1,), (2,)])


def test_a_picture_that_is_readable_and_another_digit_counts_against() -> None:
    seen = np.eye(10, dtype=np.float32)[[0, 1, 3, 3]]
    seen[1] = 0.1  # not readable

    assert of_asked(seen, [(label, 10) for label in range(10)], "").value == 2 / 3
    assert of_asked(seen, [(0,), (3,)], "").value == 2 / 3  # asked for 0, 3, 0, 3


def test_a_copy_is_at_no_distance_and_groups_count_alike() -> None:
    pictures = torch.randint(256, (5, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    apart = nearest(pictures, pictures[:3])

    assert apart[:3].max() < 1e-5 < apart[3:].min()
    assert alike(np.array([0] * 4 + [1])).tolist() == [0.25] * 4 + [1.0]
    assert sheet(np.zeros((18, 3, 32, 32), np.uint8), groups=9).size == (2 * 2 * 32, 2 * 9 * 32)


def test_a_training_on_a_gpu_goes_on_with_the_labels_it_learned(tmp_path: Path) -> None:
    directory = untrained(tmp_path, {"num_class_embeds": 3})
    train(directory / "pictures.npz", directory, RECIPE, "cpu", report=Told())
    before = line_before(Pupil("mine", directory, directory / "pictures.npz"), RECIPE, "cpu")

    assert {str(level): loss for level, loss in before["held_out"].items()} == log_of(directory)[-1]["held_out"]
