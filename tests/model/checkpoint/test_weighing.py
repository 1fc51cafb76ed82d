"""Serving weighs the weights in a directory as converting does: averages first, and what was left is told."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from model.checkpoint.card import WEIGHTS, read_card
from model.checkpoint.weighing import served_names, standing, told
from model.convert import directories
from model.convert.protocol import Options
from model.digests import file_digest
from model.errors import ModelRefused
from tests.model.convert.directories import weights as sound
from tests.model.convert.directories import write_model

EMA, NON_EMA = "diffusion_pytorch_model.ema.safetensors", "diffusion_pytorch_model.non_ema.safetensors"
HALF = "diffusion_pytorch_model.fp16.safetensors"
# What a directory holds: the names of its weights, the best first, and those that are never served.
DIRECTORIES: dict[str, tuple[list[str], list[str]]] = {
    "a checkpoint of a training": ([f"unet_ema/{WEIGHTS}", f"unet/{WEIGHTS}"], []),
    "an average in halves": ([f"unet_ema/{HALF}", f"unet/{WEIGHTS}"], []),
    "an average in a file of its own": ([EMA, WEIGHTS], []),
    "what says that it is no average": ([WEIGHTS], [NON_EMA]),
    "a folder of any name": ([f"averaged/{WEIGHTS}", WEIGHTS], []),
    "a folder before loose files": ([f"unet/{WEIGHTS}", WEIGHTS], ["diffusion_pytorch_model.early.safetensors"]),
    "two folders": ([f"unet/{WEIGHTS}", f"unet_2/{WEIGHTS}"], []),
    "halves": ([WEIGHTS, HALF, "diffusion_pytorch_model.bf16.safetensors"], []),
}


def write(directory: Path, names: list[str]) -> Path:
    """A directory with a schedule, and the same net's weights under these names, each times another number."""
    for i, name in enumerate(names, 1):
        if not (directory / name).parent.joinpath("config.json").exists():
            (write_model((directory / name).parent, {"optimization_step": 500, "decay": 0.9999}) / WEIGHTS).unlink()
        save_file({key: tensor * i for key, tensor in sound().items()}, directory / name)
    if not (directory / "scheduler_config.json").exists():
        (directory / names[0]).with_name("scheduler_config.json").rename(directory / "scheduler_config.json")
    return directory


@pytest.mark.parametrize("kind", DIRECTORIES)
def test_what_is_served_is_what_would_be_converted(tmp_path: Path, kind: str) -> None:
    best, others = DIRECTORIES[kind]
    card = read_card(write(tmp_path, [*others, *reversed(best)]))

    assert (card.taken, card.left) == (best[0], tuple(best[1:]))
    assert directories.convert(tmp_path, Options())[1] == [card.weights] == [tmp_path / best[0]]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *(
            (name, 0)
            for name in ("unet_ema/a", "ema.pt", "ema_0.9999", "state_dict_ema", "ModelEMA", "emaModel", "swa")
        ),
        *((name, 1) for name in ("schema", "cinema/unet", "remake.pt", "swapped", "semantic", "model", "best")),
        *((name, 2) for name in ("non_ema", "no-average", "pre_swa")),
    ],
)
def test_an_average_is_known_by_whole_words(name: str, expected: int) -> None:
    assert standing(name) == expected


def test_a_folder_of_models_is_no_model(tmp_path: Path) -> None:
    for name in ("digits", "faces_ema"):
        write_model(tmp_path / name)

    with pytest.raises(ModelRefused, match="^config.json is missing$"):
        read_card(tmp_path)


def test_a_damaged_average_is_not_replaced_by_the_net(tmp_path: Path) -> None:
    directory = write(tmp_path, [f"unet_ema/{WEIGHTS}", f"unet/{WEIGHTS}"])
    (directory / "unet_ema" / "config.json").write_text("{")

    with pytest.raises(ModelRefused, match="config.json is not valid JSON"):
        read_card(directory)


def test_an_average_that_cannot_be_served_is_told_of(tmp_path: Path) -> None:
    directory = write(tmp_path, [f"unet_ema/{WEIGHTS}", f"unet/{WEIGHTS}"])
    (directory / "unet_ema" / WEIGHTS).rename(directory / "unet_ema" / "diffusion_pytorch_model.bin")
    card = read_card(directory)

    assert told(card.taken, card.left) == (
        f"weights: took 'unet/{WEIGHTS}'; left 'unet_ema/diffusion_pytorch_model.bin'"
    )


def test_the_names_that_weights_may_have_are_few() -> None:
    index = "diffusion_pytorch_model.safetensors.index.json"
    shard, halves = "diffusion_pytorch_model-00001-of-00002.safetensors", f"{index.removesuffix('json')}fp16.json"

    assert served_names([NON_EMA, shard, "lora.safetensors", halves, index, HALF]) == [index, HALF, halves]


def test_a_model_of_one_net_leaves_nothing(tmp_path: Path) -> None:
    card = read_card(write_model(tmp_path))
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"the same as a pickle")
    (tmp_path / "vae.json").write_text(json.dumps({}))

    assert (read_card(tmp_path).left, read_card(tmp_path).digest) == ((), card.digest)
    assert file_digest(card.weights)


@pytest.mark.parametrize("name", ["faces.index.json", f"{WEIGHTS}.index.json.bak", f"{WEIGHTS}.index.not.json"])
def test_a_file_whose_name_is_like_that_of_an_index_is_no_weights(tmp_path: Path, name: str) -> None:
    (write_model(tmp_path) / name).write_text("{}")

    assert (read_card(tmp_path).taken, read_card(tmp_path).left) == (WEIGHTS, ())


def test_the_variant_of_an_index_may_have_a_hyphen() -> None:
    index = f"{WEIGHTS}.index.ema-only.json"

    assert served_names([WEIGHTS, index]) == [index, WEIGHTS]


def test_a_folder_that_cannot_be_read_keeps_no_model_from_being_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (write_model(tmp_path) / "lost+found").mkdir()  # at the root of a volume, for its owner alone
    usual = os.stat

    def stat(path: Any, **named: Any) -> os.stat_result:
        if "lost+found/" in os.fspath(path):
            raise PermissionError(13, "Permission denied")
        return usual(path, **named)

    monkeypatch.setattr(os, "stat", stat)

    assert read_card(tmp_path).taken == WEIGHTS


@pytest.mark.parametrize("name", [WEIGHTS, EMA, f"unet_ema/{WEIGHTS}", "unet_ema/config.json"])
def test_a_link_that_leads_nowhere_makes_no_other_net_be_taken(tmp_path: Path, name: str) -> None:
    directory = write(tmp_path, [f"unet_ema/{WEIGHTS}", HALF] if "/" in name else [HALF])
    (directory / name).unlink(missing_ok=True)
    (directory / name).symlink_to("nowhere")

    with pytest.raises(ModelRefused, match=f"{Path(name).name} is not a regular file"):
        read_card(directory)


def test_what_is_shown_of_the_weights_can_be_sent_whatever_bytes_their_folder_is_named_of(tmp_path: Path) -> None:
    card = read_card(write(tmp_path, [f"ema_\udcff/{WEIGHTS}", WEIGHTS]))

    assert card.taken.encode() == rb"ema_\udcff/" + WEIGHTS.encode()
