"""Training: it teaches what the directory will be asked for, or refuses to begin."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model.checkpoint.card import WEIGHTS
from model.errors import ModelRefused
from model.nets.config import OPENAI, architecture
from model.nets.lucidrains_config import LUCIDRAINS
from model.train.train import STATE, train
from model.train.trainer import Recipe, Trainer, split, write_weights
from tests.model.convert.directories import write_model
from tests.model.tiny import ARCHITECTURE, PROCESS, T

DIGITS = Path(__file__).parents[3] / "weights" / "digits"
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
        ({"_class_name": LUCIDRAINS}, {}, f"_class_name must be UNet2DModel or {OPENAI} to be trained"),
    ],
)
def test_a_net_that_would_be_served_otherwise_than_trained_is_refused(
    tmp_path: Path, config: dict[str, Any], scheduler: dict[str, Any], refusal: str
) -> None:
    directory = untrained(tmp_path, config, scheduler)
    with pytest.raises(ModelRefused) as refused:
        train(directory / "pictures.npz", directory, RECIPE, "cpu")

    assert refusal in str(refused.value)
    assert not (directory / WEIGHTS).exists()


def trainer(**recipe: Any) -> Trainer:
    return Trainer(ARCHITECTURE, PROCESS.schedule, Recipe(autocast=False, **recipe), "cpu")


def noise(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, *ARCHITECTURE.shape, generator=torch.Generator().manual_seed(seed))


class Oracle(nn.Module):
    """A net that knows the pictures, and names their noise but for a half."""

    def __init__(self, pictures: Tensor) -> None:
        super().__init__()
        self.pictures, self.most = pictures, 0  # the largest batch that it saw

    def embed(self, k: Tensor) -> Tensor:
        return k

    def forward(self, x: Tensor, k: Tensor) -> Tensor:
        self.most = max(self.most, len(x))
        a, b = (
            torch.tensor(bar[k + 1])[:, None, None, None]
            for bar in (PROCESS.schedule.alpha_bar, PROCESS.schedule.beta_bar)
        )
        return ((x - a * self.pictures[: len(x)]) / b + 0.5).float()


def with_oracle(made: Trainer, pictures: Tensor) -> Oracle:
    """Puts an oracle in the place of the net."""
    made.net = oracle = Oracle(pictures)
    return oracle


def test_the_loss_is_how_far_the_noise_was_missed_at_both_ends() -> None:
    pictures, made = noise(2, seed=1), trainer()
    with_oracle(made, pictures)
    missed = made.loss(pictures, torch.tensor([1, T]), noise(2))

    torch.testing.assert_close(missed, torch.full((2,), 0.25), rtol=0, atol=1e-4)


def test_the_held_out_loss_is_taken_in_batches_of_the_usual_size() -> None:
    pictures = noise(1).expand(20, -1, -1, -1)
    oracle = with_oracle(made := trainer(batch=8), pictures)
    made.average = {}

    assert set(made.held_out_loss(pictures).values()) == {0.25}
    assert oracle.most == 8


def test_the_average_follows_the_net_at_the_pace_of_its_step() -> None:
    made = trainer(batch=8, warm_up=1)
    made.seen, made.step = 80, 10
    before = {name: tensor.clone() for name, tensor in made.average.items()}
    made.update(noise(8))

    decay = 1 - 11**-0.75
    for name, tensor in made.net.named_parameters():
        expected = decay * before[name] + (1 - decay) * tensor.detach()
        torch.testing.assert_close(made.average[name], expected, rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(made.average[name], before[name]) for name in before)


def moved(directory: Path, target: Path) -> Path:
    """A directory elsewhere that holds what came back of a training in this one, in two files."""
    split(directory / STATE, untrained(target) / WEIGHTS, target / STATE)
    shutil.rmtree(directory)
    return target


@pytest.mark.parametrize("elsewhere", [False, True], ids=["where it was", "elsewhere, from two files"])
def test_an_interrupted_training_resumes_and_ends_in_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elsewhere: bool
) -> None:
    whole, stopped = (untrained(tmp_path / name) for name in ("whole", "stopped"))
    train(whole / "pictures.npz", whole, RECIPE, "cpu")
    update, began, stop_at = Trainer.update, list[int](), 48

    def watched(self: Trainer, x0: Tensor) -> float:
        began.append(self.seen)
        if self.seen == stop_at:
            raise KeyboardInterrupt
        return update(self, x0)

    monkeypatch.setattr(Trainer, "update", watched)
    with pytest.raises(KeyboardInterrupt):
        train(stopped / "pictures.npz", stopped, RECIPE, "cpu")
    began.clear()
    stop_at = -1
    if elsewhere:
        stopped = moved(stopped, tmp_path / "elsewhere")
    train(stopped / "pictures.npz", stopped, RECIPE, "cpu")

    assert began == list(range(32, 96, 8))
    for name in ("training.safetensors", WEIGHTS):
        first, second = load_file(whole / name), load_file(stopped / name)
        assert first.keys() == second.keys()
        assert [key for key in first if not torch.equal(first[key], second[key])] == []


@pytest.mark.parametrize("beside", ["nothing", "others"])
def test_a_state_without_its_average_resumes_only_beside_its_own_weights(tmp_path: Path, beside: str) -> None:
    directory, longer = untrained(tmp_path / "trained"), replace(RECIPE, images=128)
    train(directory / "pictures.npz", directory, RECIPE, "cpu")
    directory = moved(directory, tmp_path / "moved")
    (directory / WEIGHTS).unlink()
    if beside == "others":
        write_weights(trainer().average, directory / WEIGHTS)

    with pytest.raises(ModelRefused, match=f"training.safetensors needs the {WEIGHTS} that it came with beside it"):
        train(directory / "pictures.npz", directory, longer, "cpu")


def test_either_file_of_the_digits_state_is_small_enough_to_come_back(tmp_path: Path) -> None:
    config = json.loads((DIGITS / "config.json").read_text())
    made = Trainer(architecture(config), PROCESS.schedule, Recipe(batch=1), "cpu")
    made.update(torch.zeros(1, *made.arch.shape))
    made.save(tmp_path / STATE)
    split(tmp_path / STATE, tmp_path / "digits.safetensors", tmp_path / "digits.training.safetensors")

    sizes = {path.name: path.stat().st_size / 2**20 for path in tmp_path.glob("digits.*")}  # MiB
    assert sizes.keys() == {"digits.safetensors", "digits.training.safetensors"}
    assert max(sizes.values()) < 16, sizes


def held_out_losses(directory: Path) -> list[tuple[int, dict[str, float]]]:
    """(pictures seen, held-out loss by level), as the log has them."""
    lines = [json.loads(line) for line in (directory / "training.jsonl").read_text().splitlines()]
    return [(line["images"], line["held_out"]) for line in lines]


def test_training_that_starts_from_weights_begins_as_good_as_they_are(tmp_path: Path) -> None:
    taught, goes_on = (untrained(tmp_path / name) for name in ("taught", "goes-on"))
    train(taught / "pictures.npz", taught, RECIPE, "cpu")
    train(goes_on / "pictures.npz", goes_on, RECIPE, "cpu", taught / WEIGHTS)

    assert held_out_losses(goes_on)[0] == (0, held_out_losses(taught)[-1][1])
    assert [seen for seen, _ in held_out_losses(goes_on)] == [0, 32, 64, 96]


def test_a_checkpoint_takes_precedence_over_weights_to_start_from(tmp_path: Path) -> None:
    directory = untrained(tmp_path)
    train(directory / "pictures.npz", directory, RECIPE, "cpu")
    train(directory / "pictures.npz", directory, replace(RECIPE, images=128), "cpu", directory / "not-there")

    assert [seen for seen, _ in held_out_losses(directory)] == [32, 64, 96, 96, 128]


def test_weights_of_another_net_are_refused_as_a_start(tmp_path: Path) -> None:
    directory = untrained(tmp_path)
    save_file({"conv_in.weight": torch.zeros(1)}, tmp_path / "other.safetensors")

    with pytest.raises(ModelRefused, match="other.safetensors does not hold the weights of this net"):
        train(directory / "pictures.npz", directory, RECIPE, "cpu", tmp_path / "other.safetensors")


def test_when_its_minutes_are_over_training_stops_at_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, clock = untrained(tmp_path), iter(range(0, 10**6, 10))
    monkeypatch.setattr("model.train.train.time.monotonic", lambda: float(next(clock)))  # ten seconds between two looks
    train(directory / "pictures.npz", directory, replace(RECIPE, images=10**6, log_every=10**6, minutes=1.0), "cpu")

    with safe_open(directory / "training.safetensors", "pt") as state:
        seen = int(state.metadata()["seen"])
    assert seen == 56  # at 60 seconds it is not over yet, at 70 it is
    assert [seen for seen, _ in held_out_losses(directory)] == [56]
    assert (directory / WEIGHTS).exists()


@pytest.mark.parametrize("minutes", [0.0, -1.0, float("nan")])
def test_minutes_that_are_not_positive_are_refused(minutes: float) -> None:
    with pytest.raises(ValueError, match="minutes must be a positive number"):
        Recipe(minutes=minutes)


def test_a_device_without_room_for_a_state_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.train.trainer.safe_open", mock.Mock(side_effect=torch.OutOfMemoryError))

    with pytest.raises(torch.OutOfMemoryError):
        trainer().resume(tmp_path / STATE, tmp_path / WEIGHTS)
