"""Training: it teaches what the directory will be asked for, or refuses to begin."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.architecture import OPENAI
from model.card import WEIGHTS
from model.errors import ModelRefused
from model.lucid_architecture import LUCID
from model.train import Recipe, train
from tests.model.directories import write_model

RECIPE = Recipe(images=96, batch=8, warm_up=16, log_every=32, save_every=32, autocast=False)


def untrained(directory: Path, config: dict[str, Any] | None = None, scheduler: dict[str, Any] | None = None) -> Path:
    """A directory with configurations and no weights, and pictures to fit it in `pictures.npz`."""
    (write_model(directory, config, scheduler) / WEIGHTS).unlink()
    pictures = np.random.default_rng(0).integers(0, 256, (40, 8, 8), np.uint8)
    np.savez(directory / "pictures.npz", images=pictures)
    return directory


@pytest.mark.parametrize(
    ("config", "scheduler", "refusal"),
    [
        ({}, {"prediction_type": "v_prediction"}, 'prediction_type must be one of "epsilon", got "v_prediction"'),
        ({}, {"prediction_type": "sample"}, 'prediction_type must be one of "epsilon"'),
        ({"out_channels": 2}, {"variance_type": "learned_range"}, "out_channels must be in_channels (1) to be trained"),
        ({}, {"variance_type": "learned_range"}, "variance_type must be learned_range if and only if"),
        ({"_class_name": LUCID}, {}, f"_class_name must be UNet2DModel or {OPENAI} to be trained"),
    ],
)
def test_what_would_be_served_otherwise_than_it_is_trained_is_refused(
    tmp_path: Path, config: dict[str, Any], scheduler: dict[str, Any], refusal: str
) -> None:
    directory = untrained(tmp_path, config, scheduler)
    with pytest.raises(ModelRefused) as refused:
        train(directory / "pictures.npz", directory, RECIPE, "cpu")

    assert refusal in str(refused.value)
    assert not (directory / WEIGHTS).exists()
