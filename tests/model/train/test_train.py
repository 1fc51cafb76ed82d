"""Training: it teaches what the directory will be asked for, or refuses to begin; and it can be stopped at any time."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.checkpoint.card import WEIGHTS, read_card
from model.errors import ModelRefused
from model.nets.config import OPENAI
from model.nets.lucidrains_config import LUCIDRAINS
from model.train.__main__ import main as command
from model.train.checkpoints import SHEET
from model.train.flags import add_arguments
from model.train.recipe import SHEETS, STATE, Recipe
from model.train.report import Standing
from model.train.source import require_outside
from model.train.state import resume
from model.train.train import train
from model.train.trainer import Trainer
from tests.model.train.worlds import RECIPE, Told, log_of, metadata_of, trainer, untrained
from tests.test_docs import ROOT


@pytest.fixture(autouse=True)
def small_sheets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.train.sheet.ROWS", 1)
    monkeypatch.setattr("model.train.sheet.STEPS", 1)


def trained(directory: Path, recipe: Recipe = RECIPE, start: Path | None = None, told: Told | None = None) -> int:
    return train(directory / "pictures.npz", directory, recipe, "cpu", start, told or Told())


@pytest.mark.parametrize(
    ("config", "scheduler", "refusal"),
    [
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
        trained(directory)

    assert refusal in str(refused.value)
    assert not (directory / WEIGHTS).exists()


def same_bits(first: Path, second: Path) -> bool:
    """Whether two trainings have left the same tensors."""
    for name in (STATE, WEIGHTS):
        one, other = load_file(first / name), load_file(second / name)
        if one.keys() != other.keys() or not all(torch.equal(one[key], other[key]) for key in one):
            return False
    return True


class Signals(Told):
    """A report that sends this process a signal after so many pictures, and lets it finish the next update."""

    def __init__(self, number: int, seen: int) -> None:
        super().__init__()
        self.number, self.seen = number, seen

    def update(self, standing: Standing) -> None:
        super().update(standing)
        if standing.seen == self.seen:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(("number", "labels"), [(signal.SIGINT, 3), (signal.SIGTERM, None)])
def test_a_signal_ends_a_training_at_a_checkpoint_and_it_goes_on_to_the_same_bits(
    tmp_path: Path, number: int, labels: int | None
) -> None:
    whole, stopped = (untrained(tmp_path / name, {"num_class_embeds": labels}) for name in ("whole", "stopped"))
    told, again = Signals(number, 8), Told()

    assert trained(whole) == 0
    assert trained(stopped, told=told) == number
    assert told.lines[-1] == "stopped after 16 pictures, at a checkpoint: the same command goes on from there"
    assert metadata_of(stopped)["seen"] == "16"
    assert trained(stopped, told=again) == 0
    assert [standing.seen for standing in again.standings] == [24, 32]
    assert (again.lines[1], again.lines[-1]) == ("goes on after 16 pictures", "done after 32 pictures")
    assert same_bits(whole, stopped)


def test_a_training_that_is_killed_between_checkpoints_goes_on_at_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, killed = (untrained(tmp_path / name) for name in ("whole", "killed"))
    trained(whole)
    trained(killed, told=Signals(signal.SIGINT, 8))
    update = Trainer.update

    def killing(self: Trainer, x0: Tensor, labels: Tensor | None = None) -> float:
        if self.seen == 24:
            raise MemoryError
        return update(self, x0, labels)

    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(Trainer, "update", killing)
        trained(killed)

    assert metadata_of(killed)["seen"] == "16"
    trained(killed)
    assert same_bits(whole, killed)


def test_the_same_signal_twice_ends_a_training_without_a_checkpoint(tmp_path: Path) -> None:
    class Twice(Signals):
        def update(self, standing: Standing) -> None:
            super().update(standing)
            super().update(standing)

    directory = untrained(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        trained(directory, told=Twice(signal.SIGINT, 8))

    assert not (directory / STATE).exists()


def test_a_signal_ends_a_look_at_once_and_the_checkpoint_has_all_but_the_look(tmp_path: Path) -> None:
    directory = untrained(tmp_path)

    def looking(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("a signal does not end it")

    with mock.patch("model.train.checkpoints.sheet", looking):
        assert trained(directory) == signal.SIGTERM

    assert (directory / WEIGHTS).exists() and (directory / STATE).exists()
    assert not (directory / SHEET).exists()
    assert "held_out" in log_of(directory)[-1]


@pytest.mark.long
def test_sigterm_ends_a_process_at_a_checkpoint_and_the_same_command_goes_on(tmp_path: Path) -> None:
    directory = untrained(tmp_path)
    flags = ["--batch", "8", "--images", "100000", "--device", "cpu"]
    command = [sys.executable, "-u", "-m", "model.train", str(directory / "pictures.npz"), str(directory), *flags]
    ends = list[tuple[int, str]]()
    for _ in range(2):
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            begun = list(takewhile(lambda line: "pictures per second" not in line, process.stdout))
            process.send_signal(signal.SIGTERM)
            *_, last = process.stdout.read().splitlines()
        ends.append((process.returncode, last))

    seen = int(metadata_of(directory)["seen"])
    assert begun[1].startswith("goes on after")
    assert [code for code, _ in ends] == [128 + signal.SIGTERM] * 2
    assert f"stopped after {seen:,} pictures, at a checkpoint" in ends[1][1]
    assert seen >= 160  # the speed is told after ten updates of a run


@pytest.mark.long
def test_two_processes_that_share_the_batch_teach_the_same_as_one(tmp_path: Path) -> None:
    alone, shared = (untrained(tmp_path / name, {"num_class_embeds": 3}) for name in ("alone", "shared"))
    flags = ["--images", "64", "--batch", "8", "--warm-up", "8", "--ema", "0.9", "--device", "cpu"]
    for directory, launch in ((alone, []), (shared, ["torch.distributed.run", "--nproc-per-node", "2", "-m", "--"])):
        words = ["-m", *launch, "model.train", str(directory / "pictures.npz"), str(directory), *flags]
        subprocess.run([sys.executable, *words], cwd=ROOT, check=True, capture_output=True)

    one, other = (load_file(directory / STATE) for directory in (alone, shared))
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(other[name], one[name], rtol=1e-3, atol=1e-4)
    assert [line["images"] for line in log_of(shared)] == [64]


def test_torchrun_passes_every_flag_of_a_training_on() -> None:
    from torch.distributed.run import get_args_parser

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    own = ["IMAGES", "DIR", *(flag for action in parser._actions for flag in action.option_strings)]
    launched = get_args_parser().parse_args(["--nproc-per-node", "2", "-m", "--", "model.train", *own])

    assert "--start" in own
    assert (launched.training_script, launched.training_script_args) == ("model.train", own)


def clockwork(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Makes every update take so long."""
    now, update = 0.0, Trainer.update

    def updating(self: Trainer, x0: Tensor, labels: Tensor | None = None) -> float:
        nonlocal now
        now += seconds
        return update(self, x0, labels)

    monkeypatch.setattr(Trainer, "update", updating)
    monkeypatch.setattr(time, "monotonic", lambda: now)


def test_checkpoints_come_early_at_first_and_then_every_minute_each_with_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = untrained(tmp_path)
    clockwork(monkeypatch, 10.0)
    trained(directory, replace(RECIPE, images=8 * 20))  # 200 seconds

    assert [line["seconds"] for line in log_of(directory)] == [10, 30, 90, 150, 200]
    assert sorted(int(path.stem) / 8 * 10 for path in (directory / SHEETS).iterdir()) == [10, 30, 90, 150, 200]
    assert (directory / SHEET).read_bytes() == (directory / SHEETS / "000000160.png").read_bytes()


def test_minutes_end_a_training_and_count_in_all_runs_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, recipe = untrained(tmp_path), replace(RECIPE, images=None, minutes=1.0)
    clockwork(monkeypatch, 10.0)
    told = Signals(signal.SIGINT, 24)

    assert trained(directory, recipe, told=told) == signal.SIGINT
    assert told.standings[-1].left_s == 20.0
    assert trained(directory, recipe) == 0
    assert (metadata_of(directory)["seen"], metadata_of(directory)["seconds"]) == ("48", "60.0")
    assert trained(directory, recipe, told=told) == 0  # all is done
    assert told.lines[-1] == "done after 48 pictures"


def test_it_says_first_what_it_will_do_and_after_ten_updates_how_long_that_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, told = untrained(tmp_path / "mine", {"num_class_embeds": 3}), Told()
    clockwork(monkeypatch, 0.5)
    trained(directory, replace(RECIPE, images=88), told=told)
    parameters = sum(tensor.numel() for tensor in load_file(directory / WEIGHTS).values())
    threads = torch.get_num_threads()

    assert told.lines[0] == (
        f"training mine: 40 pictures with 2 labels (0, 1), 8 x 8 in grey; {parameters:,} parameters, on cpu"
        f" ({threads} thread{'s' if threads > 1 else ''}) in float32"
    )
    assert told.lines[1].startswith("16.0 pictures per second: 88 pictures in 0 s; what it makes is in mine/")


def test_it_says_that_labels_are_not_learned(tmp_path: Path) -> None:
    trained(untrained(tmp_path), told=(told := Told()))

    assert "40 pictures with 2 labels (0, 1), which config.json has no num_class_embeds for, 8 x 8" in told.lines[0]


def test_it_does_not_go_on_with_other_labels(tmp_path: Path) -> None:
    directory = untrained(tmp_path, {"num_class_embeds": 3})
    trained(directory)
    arrays = dict(np.load(directory / "pictures.npz"))
    for names, said in (
        (["ants", "zebras"], "2 labels, 0 to 1, not 2, of which the first other one is ants"),
        (["1", "0"], "the same labels in another order, from 0 to 1"),
    ):
        np.savez(directory / "pictures.npz", **arrays, names=np.array(names))
        with pytest.raises(ModelRefused, match=f"training.safetensors has learned {said}; without it, training begins"):
            trained(directory)


def test_a_training_among_its_own_pictures_is_refused(tmp_path: Path) -> None:
    directory = untrained(tmp_path / "mine")
    (directory / SHEETS).mkdir()
    for source in (tmp_path, directory, directory / SHEETS):
        with pytest.raises(ValueError, match=r"mine must lie outside .*, or the next run would be trained on its samp"):
            train(source, directory, RECIPE, "cpu", report=Told())
    require_outside(tmp_path / ".models" / "mine", tmp_path)  # no picture is looked for there


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_a_batch_for_which_there_is_no_memory_is_an_error_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    words = ["model.train", str(tmp_path / "pictures.npz"), str(untrained(tmp_path)), "--batch", "4096"]
    with (
        mock.patch.object(sys, "argv", words),
        mock.patch("model.train.train.Training.run", side_effect=error),
        pytest.raises(SystemExit) as ended,
    ):
        command()

    assert ended.value.code == 2
    said = "model.train: memory ran out, with 4096 pictures per update (--batch)"
    assert capsys.readouterr().err == f"{said} (usage: model.train --help)\n"


def test_the_average_that_is_best_on_held_out_pictures_is_served(tmp_path: Path) -> None:
    directory, emas = untrained(tmp_path), (0.9999, 0.5)
    with mock.patch.object(Trainer, "held_out_losses", lambda *_: {0.9999: {10: 0.2}, 0.5: {10: 0.1}}):
        trained(directory, replace(RECIPE, emas=emas))
    state, weights = load_file(directory / STATE), load_file(directory / WEIGHTS)

    assert {name for name in weights if torch.equal(weights[name], state[f"average.0.5.{name}"])} == weights.keys()
    assert metadata_of(directory)["ema"] == "0.5"
    assert log_of(directory)[-1]["emas"] == {"0.9999": 0.2, "0.5": 0.1}

    trained(directory, replace(RECIPE, emas=emas, images=64), told=Signals(signal.SIGINT, 40))  # without a look
    assert metadata_of(directory)["ema"] == "0.5"


def test_weights_that_were_only_begun_to_be_written_are_never_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = untrained(tmp_path)
    trained(directory)
    digest = read_card(directory).digest

    def dying(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        path.write_bytes(b"half of the")
        raise KeyboardInterrupt

    monkeypatch.setattr("model.train.state.save_file", dying)
    with pytest.raises(KeyboardInterrupt):
        trained(directory, replace(RECIPE, images=40))

    assert read_card(directory).digest == digest
    assert metadata_of(directory)["seen"] == "32"


def test_training_that_starts_from_weights_begins_as_good_as_they_are(tmp_path: Path) -> None:
    taught, goes_on = (untrained(tmp_path / name) for name in ("taught", "goes-on"))
    trained(taught)
    trained(goes_on, replace(RECIPE, images=8), start=taught / WEIGHTS)  # one update, at a rate of 0
    (before,), (after,) = log_of(taught), log_of(goes_on)

    assert after["held_out"] == pytest.approx(before["held_out"], abs=2e-5)


def test_a_net_of_labels_may_start_from_one_that_knows_none(tmp_path: Path) -> None:
    taught, labelled = untrained(tmp_path / "taught"), untrained(tmp_path / "labelled", {"num_class_embeds": 3})
    trained(taught)
    trained(labelled, replace(RECIPE, images=8), start=taught / WEIGHTS)
    weights = load_file(labelled / WEIGHTS)

    assert weights["conv_in.weight"].allclose(load_file(taught / WEIGHTS)["conv_in.weight"], atol=1e-4)
    assert weights["class_embedding.weight"].shape[0] == 3


def test_a_checkpoint_takes_precedence_over_weights_to_start_from(tmp_path: Path) -> None:
    directory = untrained(tmp_path)
    trained(directory)
    trained(directory, replace(RECIPE, images=40), start=directory / "not-there")

    assert [line["images"] for line in log_of(directory)] == [32, 40]


def test_weights_of_another_net_are_refused_as_a_start(tmp_path: Path) -> None:
    directory = untrained(tmp_path)
    save_file({"conv_in.weight": torch.zeros(1)}, tmp_path / "other.safetensors")

    with pytest.raises(ModelRefused, match="other.safetensors does not hold the weights of this net"):
        trained(directory, start=tmp_path / "other.safetensors")


@pytest.mark.parametrize("damage", ["cut", "other averages", "another net"])
def test_a_state_from_which_nothing_can_go_on_is_refused(tmp_path: Path, damage: str) -> None:
    directory, recipe = untrained(tmp_path), RECIPE
    trained(directory)
    if damage == "cut":
        (directory / STATE).write_bytes((directory / STATE).read_bytes()[:-1000])
    elif damage == "other averages":
        recipe = replace(RECIPE, emas=(0.7,))
    else:
        config = json.loads((directory / "config.json").read_text()) | {"block_out_channels": [8, 8]}
        (directory / "config.json").write_text(json.dumps(config))

    with pytest.raises(ModelRefused, match="training.safetensors is damaged, of another net, or has other"):
        trained(directory, recipe)


def test_a_state_of_an_earlier_version_goes_on(tmp_path: Path) -> None:
    directory = untrained(tmp_path)
    trained(directory)
    save_file(load_file(directory / STATE), directory / STATE, {"seen": "32", "step": "4"})
    trained(directory, replace(RECIPE, images=40))

    assert metadata_of(directory)["seen"] == "40"


def test_a_device_without_room_for_a_state_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.train.state.safe_open", mock.Mock(side_effect=torch.OutOfMemoryError))

    with pytest.raises(torch.OutOfMemoryError):
        resume(trainer(), tmp_path / STATE)


def test_beside_a_training_nothing_else_is_taken_for_weights(tmp_path: Path) -> None:
    directory = untrained(tmp_path)
    trained(directory)

    assert {path.name for path in directory.iterdir()} >= {STATE, SHEET, SHEETS, "training.jsonl"}
    assert (read_card(directory).taken, read_card(directory).left) == (WEIGHTS, ())
