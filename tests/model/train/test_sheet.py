"""The sheet of samples: the pictures that the reference makes of the same seeds and labels."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from model.sampling.reference import sample_alone
from model.train.recipe import Recipe
from model.train.sheet import COLUMNS, ROWS, label_of, plan_of, rows_in, sheet, write_png
from model.train.trainer import Trainer
from tests.model.tiny import ARCHITECTURE, PROCESS


def taught(labels: int | None) -> Trainer:
    """A trainer whose moving average is another net than its own."""
    arch = replace(ARCHITECTURE, num_class_embeds=labels)
    made = Trainer(arch, PROCESS, Recipe(batch=24, emas=(0.9, 0.99)), "cpu")
    generator = torch.Generator().manual_seed(0)
    for tensor in made.averages[0.99].values():
        tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    return made


@pytest.mark.parametrize("labels", [None, 4])
def test_each_picture_is_the_one_that_its_seed_and_label_make_alone(labels: int | None) -> None:
    made, seed = taught(labels), 13
    whole = sheet(made, PROCESS, 0.99)
    label = None if labels is None else torch.tensor([label_of(seed, labels)])

    @torch.no_grad()
    def net(x: Tensor, k: Tensor) -> Tensor:
        return made.predict(x, k + 1, label, by=made.averaged(0.99))

    *_, (alone, _) = sample_alone(net, plan_of(PROCESS), seed, ARCHITECTURE.shape)
    row, column = divmod(seed, COLUMNS)
    found = whole[row * 8 : row * 8 + 8, column * 8 : column * 8 + 8, 0].astype(int)

    assert whole.shape == (ROWS * 8, COLUMNS * 8, 1)
    assert np.abs(found - ((alone[0, 0] / 2 + 0.5).clamp(0, 1) * 255).round().numpy()).max() <= 1
    assert found.std() > 10


@pytest.mark.parametrize(
    ("known", "columns"),
    [
        (1, [0] * 8),
        (2, [0, 1] * 4),
        (3, [0, 1, 2, 0, 1, 2, 0, 1]),
        (10, [0, 1, 2, 3, 5, 6, 7, 8]),
        (80, list(range(0, 80, 10))),
    ],
)
def test_a_column_has_one_label_and_never_the_null_label(known: int, columns: list[int]) -> None:
    assert [label_of(seed, known + 1) for seed in range(2 * COLUMNS)] == 2 * columns


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_small_pictures_are_enlarged_in_the_file(tmp_path: Path, channels: int, mode: str) -> None:
    drawn = np.random.default_rng(0).integers(0, 256, (ROWS * 24, COLUMNS * 24, channels), np.uint8)
    write_png(drawn, tmp_path / "samples.png")

    with Image.open(tmp_path / "samples.png") as opened:
        assert (opened.size, opened.mode) == ((COLUMNS * 72, ROWS * 72), mode)
        assert np.array_equal(np.asarray(opened).reshape(ROWS * 72, COLUMNS * 72, channels)[1::3, 1::3], drawn)


@pytest.mark.parametrize(("forwards", "rows"), [(0, 1), (200, 2), (10**6, 4)])
def test_a_slow_net_makes_fewer_rows(forwards: int, rows: int) -> None:
    assert rows_in(forwards) == rows
    assert sheet(taught(None), PROCESS, 0.9, rows).shape == (rows * 8, COLUMNS * 8, 1)
