"""A schedule that lies in a checkpoint is taken, wherever it lies and by whichever table; else it is told of."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from model.checkpoint.card import read_card
from model.convert.nets import OUTER, find, tables
from tests.model.convert.directories import CONFIG, weights
from tests.model.convert.test_convert import converted, refused, written

pytestmark = pytest.mark.usefixtures("in_this_process")

BETAS = torch.linspace(0.001, 0.2, 40)
LEFT = (1 - BETAS).cumprod(0)
TABLES = {"betas": BETAS, "alphas_cumprod": LEFT, "alpha_hat": LEFT.double(), "sqrt_alphas_cumprod": LEFT.sqrt()}


def state(**beside: Tensor) -> dict[str, Tensor]:
    """A net in what wraps it, with these tables beside it."""
    return {f"model.{name}": tensor for name, tensor in weights().items()} | beside


@pytest.fixture
def config(tmp_path: Path) -> str:
    """The net's configuration."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return str(tmp_path / "config.json")


@pytest.mark.parametrize("name", TABLES)
def test_each_table_tells_the_whole_schedule(tmp_path: Path, config: str, name: str) -> None:
    directory = converted(written(tmp_path / "net.safetensors", state(**{name: TABLES[name]})), "--config", config)

    np.testing.assert_allclose(read_card(directory).process.schedule.alpha_bar[1:], LEFT.sqrt(), rtol=1e-6)


@pytest.mark.parametrize("place", ["beside the net", "in a part of its own"])
def test_a_table_outside_the_state_dict_is_taken(tmp_path: Path, config: str, place: str) -> None:
    table = {"alphas_cumprod": LEFT, "losses": torch.rand(7)}
    torch.save(
        {"model": weights(), **(table if place == "beside the net" else {"diffusion": table})}, tmp_path / "a.pt"
    )

    assert read_card(converted(tmp_path / "a.pt", "--config", config)).process.schedule.T == 40


def test_a_table_that_is_not_understood_is_told_of(
    tmp_path: Path, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = written(tmp_path / "net.safetensors", state(alphas=1 - BETAS, loss=torch.rand(40)))

    said = refused(capsys, source, "--config", config)
    assert said == "the file holds a schedule as 'alphas', which is not read: give --schedule and --timesteps"
    assert read_card(converted(source, "--config", config, "--timesteps", "40")).process.schedule.T == 40


def test_what_lies_outside_is_no_part_of_a_net() -> None:
    (net,) = find(weights() | {f"{OUTER}betas": BETAS}, {"diffusers": frozenset({"conv_in.weight"})})

    assert net.tensors.keys() == weights().keys()
    assert list(tables({**net.tensors, f"{OUTER}betas": BETAS}, net)) == ["betas"]
