"""The pipeline around a net decides whether the net makes pictures alone, wherever the net's files lie in it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from model.checkpoint.card import read_card, schedule_file
from model.convert.choice import check
from model.convert.flags import parsed
from tests.model.convert.directories import write_model
from tests.model.convert.refusals import refusal

UNET, SCHEDULER = ["diffusers", "UNet2DModel"], ["diffusers", "DDPMScheduler"]
DDPM = {"_class_name": "DDPMPipeline", "_diffusers_version": "0.35.0", "unet": UNET, "scheduler": SCHEDULER}
LDM = DDPM | {"_class_name": "LDMPipeline", "vqvae": ["diffusers", "VQModel"]}
BESIDE = "model_index.json: LDMPipeline has vqvae (VQModel) besides unet and scheduler, so its net alone makes no "


def write_pipeline(directory: Path, index: dict[str, Any] | None) -> Path:
    """A pipeline's directory in folders."""
    write_model(directory, folders=True)
    if index is not None:
        (directory / "model_index.json").write_text(json.dumps(index))
    return directory


@pytest.mark.parametrize("part", ["", "unet"])
def test_a_net_of_latents_is_refused_wherever_it_is_pointed_at(tmp_path: Path, part: str) -> None:
    message = refusal(lambda: read_card(write_pipeline(tmp_path / "ldm", LDM) / part))

    assert message == f"{BESIDE}pictures; it is not served"


def test_a_link_to_a_net_does_not_hide_its_pipeline(tmp_path: Path) -> None:
    (tmp_path / "pretty").symlink_to(write_pipeline(tmp_path / "ldm", LDM) / "unet")

    assert refusal(lambda: read_card(tmp_path / "pretty")).startswith(BESIDE)


@pytest.mark.parametrize("part", ["vqvae", "vae", "movq", "text_encoder"])
@pytest.mark.parametrize("at", ["", "unet"])
def test_without_an_index_the_folders_beside_the_net_tell(tmp_path: Path, part: str, at: str) -> None:
    (write_pipeline(tmp_path / "some", None) / part).mkdir()

    message = refusal(lambda: read_card(tmp_path / "some" / at))
    assert message.startswith(f"unet: the pipeline has {part} besides unet and scheduler")


@pytest.mark.parametrize("at", ["", "unet"])
def test_without_an_index_a_folder_of_any_name_tells_by_its_class(tmp_path: Path, at: str) -> None:
    directory = write_pipeline(tmp_path / "some", None)
    (directory / "first_stage").mkdir()
    (directory / "first_stage" / "config.json").write_text('{"_class_name": "AutoencoderKL"}')

    assert refusal(lambda: read_card(directory / at)).startswith("unet: the pipeline has first_stage besides unet")


def test_another_model_beside_a_model_is_no_part_of_it(tmp_path: Path) -> None:
    write_model(tmp_path / "unet_faces")
    (tmp_path / "autoencoder").mkdir()
    (tmp_path / "autoencoder" / "config.json").write_text('{"_class_name": "AutoencoderKL"}')

    assert read_card(tmp_path / "unet_faces").name == "unet_faces"
    check(parsed([str(tmp_path / "unet_faces"), str(tmp_path / "new")]))


@pytest.mark.parametrize("kind", ["DDPMPipeline", "DDIMPipeline", "PNDMPipeline", "RePaintPipeline", "DDPM", None])
def test_pipelines_of_a_net_of_pictures_are_served(tmp_path: Path, kind: str | None) -> None:
    absent = {"vqvae": [None, None], "safety_checker": None, "trained_on": ["a", None], "default_steps": 5}
    directory = write_pipeline(tmp_path, DDPM | absent | {"_class_name": kind})

    assert read_card(directory).process.default_steps == 5
    assert read_card(directory / "unet").process.default_steps == 5  # with the scheduler beside it


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "VE": ({"_class_name": "ScoreSdeVePipeline"}, "ScoreSdeVePipeline is not served, for its process is another"),
    "Karras": ({"_class_name": "KarrasVePipeline"}, "KarrasVePipeline is not served, for its process is another"),
    "consistency": ({"_class_name": "ConsistencyModelPipeline"}, "its net is a consistency model"),
    "unknown": ({"_class_name": "MyPipeline"}, "MyPipeline is not served, for it is not known to make"),
    "code": ({"_class_name": ["pipeline", "MyPipeline"]}, "MyPipeline is not served"),
    "hostile": ({"_class_name": "a\nb" * 100}, "'a\\nba"),
    "a number": ({"_class_name": 7}, "7 is not served"),
    "an empty list": ({"_class_name": []}, "is not served"),
    "a text": ({"text_encoder": ["transformers", "CLIPTextModel"]}, "has text_encoder (CLIPTextModel) besides"),
    "code of a part": ({"vae": ["vae", "MyVae"]}, "has vae (MyVae) besides"),
    "a pipeline's name for other code": (
        {"_class_name": ["my", "DDPMPipeline"]},
        "DDPMPipeline is not served, for it is ",
    ),
    "another net": (
        {"unet": ["diffusers", "UNet2DConditionModel"]},
        "unet is UNet2DConditionModel of diffusers, which ",
    ),
    "code of a net": ({"unet": ["my_unet", "UNet2DModel"]}, "unet is UNet2DModel of my_unet, which is not one"),
    "another process": (
        {"scheduler": ["diffusers", "KarrasVeScheduler"]},
        "scheduler is KarrasVeScheduler of diffusers",
    ),
    "code of a process": ({"scheduler": ["steps", "DDPMScheduler"]}, "scheduler is DDPMScheduler of steps, which"),
    "a part with options": (
        {"vae": ["diffusers", "AutoencoderKL", {"dtype": None}]},
        "has vae (AutoencoderKL) besides",
    ),
    "a part as an object": ({"decoder": {"_class_name": "VQModel"}}, "has decoder (VQModel) besides"),
    "a hostile part": ({"a\nb": ["x", "y\nz"]}, "has 'a\\nb' ('y\\nz') besides"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_pipelines_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    change, expected = OTHERS[kind]
    message = refusal(lambda: read_card(write_pipeline(tmp_path, DDPM | change)))

    assert message.startswith("model_index.json: ") and expected in message
    assert len(message) < 600


def test_an_index_above_concerns_only_the_parts_that_it_names(tmp_path: Path) -> None:
    named = LDM | {"net": UNET}
    (tmp_path / "model_index.json").write_text(json.dumps(named))
    write_model(tmp_path / "digits")
    write_model(tmp_path / "net")

    assert read_card(tmp_path / "digits").name == "digits"
    assert refusal(lambda: read_card(tmp_path / "net")).startswith("model_index.json: LDMPipeline has ")


def test_a_checkpoint_of_a_training_has_its_schedule_one_folder_up(tmp_path: Path) -> None:
    whole = write_pipeline(tmp_path / "run", DDPM)
    (whole / "checkpoint-500").mkdir()
    shutil.copytree(whole / "unet", whole / "checkpoint-500" / "unet")

    assert read_card(whole / "checkpoint-500").process.schedule.T == read_card(whole).process.schedule.T
    assert schedule_file(whole / "checkpoint-500") == whole / "scheduler" / "scheduler_config.json"
    (whole / "model_index.json").write_text(json.dumps(LDM))
    assert refusal(lambda: read_card(whole / "checkpoint-500")).startswith(BESIDE)


def test_a_flat_schedule_serves_a_net_in_a_folder(tmp_path: Path) -> None:
    whole = write_pipeline(tmp_path / "run", DDPM)
    (whole / "scheduler" / "scheduler_config.json").rename(whole / "scheduler_config.json")

    assert schedule_file(whole) == schedule_file(whole / "unet") == whole / "scheduler_config.json"
    assert read_card(whole).process.schedule.T == read_card(whole / "unet").process.schedule.T
