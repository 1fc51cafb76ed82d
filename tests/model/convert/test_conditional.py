"""A conditional net of diffusers is converted, whatever it makes the embedding of a label of."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, UNet2DModel
from torch import Tensor

from model.checkpoint.card import read_card
from model.convert.directories import ORDER
from tests.model.convert.test_convert import converted, noise, refused, written
from tests.model.worlds import labelled, pipeline, relative_error, shaken, small

pytestmark = pytest.mark.usefixtures("in_this_process")

LABELS = torch.tensor([4, 0])
OF_LABELS = {"id2label": {"0": "cat", "3": "dog"}, "null_label": 4, "guidance": 2.0}


def rewritten(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@torch.inference_mode()
def is_of(directory: Path, net: UNet2DModel, told: Tensor = LABELS) -> bool:
    """Whether this model directory computes what the net does. told: to the net, for LABELS"""
    x, timesteps = noise(8)
    made = labelled(directory, x, timesteps, LABELS)
    return relative_error(made, net(x, timesteps, class_labels=told).sample) < 2e-5


@pytest.mark.parametrize("embeds", [None, "timestep"])
def test_a_directory_of_a_conditional_net_is_converted_with_what_it_says_of_labels(
    tmp_path: Path, embeds: str | None
) -> None:
    net = shaken(small(num_class_embeds=5, class_embed_type=embeds))
    pipeline(net).save_pretrained(tmp_path / "ddpm", safe_serialization=False)
    rewritten(tmp_path / "ddpm" / "unet" / "config.json", num_class_embeds=5)
    rewritten(tmp_path / "ddpm" / "model_index.json", **OF_LABELS)
    directory = converted(tmp_path / "ddpm")
    again: Any = DDPMPipeline.from_pretrained(directory)

    assert is_of(directory, net) and is_of(directory, again.unet)
    assert read_card(directory).architecture.labels == 5
    index = json.loads((directory / "model_index.json").read_text())
    assert {name: index.get(name) for name in OF_LABELS} == OF_LABELS


def test_the_weights_of_a_conditional_net_alone_are_converted_with_its_configuration(tmp_path: Path) -> None:
    net = shaken(small(num_class_embeds=5))
    net.save_pretrained(tmp_path / "net")
    torch.save({"ema": net.state_dict()}, tmp_path / "net.bin")

    assert is_of(converted(tmp_path / "net.bin", "--config", str(tmp_path / "net" / "config.json")), net)


def test_a_net_that_is_given_embeddings_needs_them_in_its_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net, embeddings = shaken(small(class_embed_type="identity")), torch.randn(5, 32)
    net.save_pretrained(tmp_path / "net")
    flags = ["--config", str(tmp_path / "net" / "config.json")]
    rewritten(tmp_path / "net" / "config.json", num_class_embeds=5)
    source = written(tmp_path / "net.safetensors", net.state_dict())
    assert "add them as class_embedding.weight, a row for each label" in refused(capsys, source, *flags)

    written(source, net.state_dict() | {"class_embedding.weight": embeddings})
    assert is_of(converted(source, *flags), net, embeddings[LABELS])


@pytest.mark.parametrize("embeds", ["timestep", "identity"])
def test_a_net_that_does_not_tell_how_many_labels_it_knows_is_refused_with_what_to_write(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], embeds: str
) -> None:
    shaken(small(class_embed_type=embeds)).save_pretrained(tmp_path / "net")
    rewritten(tmp_path / "net" / "config.json", num_class_embeds=None)
    if embeds == "identity":
        weights = shaken(small(num_class_embeds=5)).state_dict()
        written(tmp_path / "net" / "diffusion_pytorch_model.safetensors", weights)

    assert refused(capsys, tmp_path / "net") == (
        "config.json: num_class_embeds must be an integer in 1..65536, got null: "
        f"class_embed_type {embeds} does not tell how many labels the net knows"
    )


@pytest.mark.parametrize("embeds", [None, "timestep"])
def test_averages_without_names_have_the_order_in_which_diffusers_registers_a_conditional_net(
    embeds: str | None,
) -> None:
    with torch.device("meta"):
        theirs = [
            name for name, _ in UNet2DModel(**small(num_class_embeds=5, class_embed_type=embeds)).named_parameters()
        ]

    def place(key: str) -> list[int]:
        return [int(word) if word.isdecimal() else ORDER.index(word) for word in key.split(".")]

    assert sorted(theirs, key=place) == theirs
