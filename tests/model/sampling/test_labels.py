"""What a request says of labels, and what becomes of it in the table."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from torch import Tensor

from model.checkpoint.card import read_card
from model.engine.events import Finished, Request
from model.errors import PlanError
from model.sampling.labels import Conditions, Label, Labels, resolve_labels
from model.sampling.table import R
from tests.model.convert.directories import write_model
from tests.model.tiny import T, a_plan
from tests.model.worlds import engine, generator, opened, pipeline, planned, shaken, small

PETS = Labels(count=4, null=3, names={0: "cat", 1: "dog"}, guidance=2.5)
NO_NULL = Labels(count=3)
ALLOWED = "random, a label 0..2, or one of its names: cat, dog"


def resolved(labels: Labels | None = PETS, n: int = 1, **asked: Any) -> Conditions | None:
    """What becomes of these fields, for pictures of the seeds 5, 6, ..."""
    return resolve_labels(labels, 1000, range(5, 5 + n), **asked)


def test_a_label_goes_by_its_number_or_its_name_and_has_the_models_guidance() -> None:
    assert resolved(label=1) == resolved(label="dog") == Conditions(labels=(1,), guidance=2.5)
    assert resolved(n=3, each=["dog", 0, 2]) == Conditions(labels=(1, 0, 2), guidance=2.5)
    assert resolved(label=2, guidance=1) == Conditions(labels=(2,), guidance=1.0)
    assert resolved(label=2, interval=[900, 1]) == Conditions(labels=(2,), guidance=2.5, interval=(900, 1))


def test_without_a_label_a_net_is_told_none_or_one_of_the_seed_if_it_knows_no_none() -> None:
    assert resolved() is None
    assert resolved(None) is None
    assert resolved(NO_NULL, 2) == Conditions(labels=(NO_NULL.drawn(5), NO_NULL.drawn(6)), guidance=1.0)


def test_a_random_label_belongs_to_its_seed_and_each_is_as_likely() -> None:
    drawn = [PETS.drawn(seed) for seed in range(3000)]
    expected = 3000 / 3

    assert resolved(n=4, label="random") == Conditions(labels=tuple(drawn[5:9]), guidance=2.5)
    assert set(drawn) == {0, 1, 2}
    assert max(abs(count - expected) for count in Counter(drawn).values()) < 4 * math.sqrt(expected * 2 / 3)


REFUSED: list[tuple[Labels | None, dict[str, Any], str, str]] = [
    (None, {"label": 1}, "label", "label must be left out: this model knows no labels"),
    (None, {"guidance": 2.0}, "guidance", "guidance must be left out: this model knows no labels"),
    (PETS, {"label": 3}, "label", f"label must be {ALLOWED}, got 3"),
    (PETS, {"label": 4}, "label", f"label must be {ALLOWED}, got 4"),
    (PETS, {"label": "bird"}, "label", f"label must be {ALLOWED}, got 'bird'"),
    (PETS, {"each": [0, 1]}, "labels", "labels must be as many as pictures, 1, got 2"),
    (PETS, {"each": [9]}, "labels/0", f"labels.0 must be {ALLOWED}, got 9"),
    (PETS, {"each": [0], "label": 0}, "labels", "labels must be left out beside label, which is one for all pictures"),
    (PETS, {"guidance": 2.0}, "guidance", "guidance applies to pictures with a label only"),
    (PETS, {"label": 0, "guidance": 20.5}, "guidance", "guidance must lie in 0..20, got 20.5"),
    (PETS, {"label": 0, "guidance": math.nan}, "guidance", "guidance must lie in 0..20, got nan"),
    (
        PETS,
        {"label": 0, "interval": [1, 900]},
        "guidance_interval",
        "guidance_interval must be [high, low] with 1000 >= high >= low >= 1, got [1, 900]",
    ),
    (
        PETS,
        {"label": 0, "guidance": 1, "interval": [900, 1]},
        "guidance_interval",
        "guidance_interval must be left out with guidance 1, which changes nothing",
    ),
    (
        Labels(count=4, null=3),
        {"label": 0, "interval": [900, 1]},
        "guidance_interval",
        "guidance_interval must be left out with guidance 1, which is this model's own",
    ),
    (NO_NULL, {"label": 3}, "label", "label must be random or a label 0..2, got 3"),
    (NO_NULL, {"label": 0, "guidance": 2.0}, "guidance", "guidance must be left out: this model has no null label"),
]


@pytest.mark.parametrize(("labels", "asked", "field", "message"), REFUSED)
def test_what_does_not_apply_is_refused_with_what_does(
    labels: Labels | None, asked: dict[str, Any], field: str, message: str
) -> None:
    with pytest.raises(PlanError) as refusal:
        resolved(labels, **asked)
    assert (refusal.value.field, str(refusal.value)) == (field, message)


# The list of ImageNet has "crane" twice.
NAMES = {0: "tench, Tinca tinca", 1: "crane", 2: "crane", 3: "4", 4: "0", 5: "hen, bird", 6: "cock, bird", 7: "hen"}
IMAGENET = Labels(count=8, names=NAMES)


@pytest.mark.parametrize(
    ("called", "label"),
    [("tench, Tinca tinca", 0), ("tench", 0), ("Tinca tinca", 0), ("4", 3), ("0", 4), (0, 0), ("1", 1), ("hen", 7)],
)
def test_a_label_is_called_by_its_name_by_a_part_of_it_or_by_its_number(called: Label, label: int) -> None:
    found = resolved(IMAGENET, label=called)
    assert found is not None and found.labels == (label,)


@pytest.mark.parametrize(
    ("called", "message"),
    [
        ("crane", "label must be a number: several labels are called crane: 1, 2"),
        ("bird", "label must be a number: several labels are called bird: 5, 6"),
        (
            "Tinca",
            "label must be random, a label 0..7, or one of its names: tench, Tinca tinca, crane, 4, 0, hen, bird,"
            " cock, bird, hen, got 'Tinca'",
        ),
    ],
)
def test_a_name_of_two_labels_or_of_none_is_refused(called: str, message: str) -> None:
    with pytest.raises(PlanError) as refusal:
        resolved(IMAGENET, label=called)
    assert str(refusal.value) == message


def test_of_several_labels_the_one_that_is_wrong_is_named() -> None:
    with pytest.raises(PlanError) as refusal:
        resolve_labels(PETS, T, range(2), each=["cat", 99])
    assert refusal.value.field == "labels/1" and str(refusal.value).startswith("labels.1 must be random, a label 0..2")


@pytest.mark.parametrize(
    ("text", "label"), [("dog", 1), ("Cat", 0), ("2", 2), ("3", None), ("a dog", None), ("", None)]
)
def test_a_text_means_a_label_if_it_is_its_name_or_number(text: str, label: int | None) -> None:
    assert PETS.meant(text) == label


def test_guidance_is_a_column_and_an_interval_where_it_is_not_zero() -> None:
    everywhere, between = a_plan(T, guidance=3.0), a_plan(T, guidance=3.0, guidance_interval=(20, 11))

    assert everywhere.rows[:, R].tolist() == [2.0] * T
    assert between.rows[:, R].tolist() == [0.0] * 10 + [2.0] * 10 + [0.0] * 10
    assert not a_plan(T).rows[:, R].any()


# Pictures


def their_picture(net: UNet2DModel, scheduler: Any, label: int, guidance: float, interval: tuple[int, int]) -> Tensor:
    """The loop that a user of diffusers writes for classifier-free guidance. -> [C, H, W]"""
    draws = generator(7)
    x = torch.randn(1, 3, 8, 8, generator=draws)
    for t in scheduler.timesteps:
        with_label = net(x, t, class_labels=torch.tensor([label])).sample
        without = net(x, t, class_labels=torch.tensor([4])).sample
        high, low = interval
        strength = guidance if low <= t + 1 <= high else 1.0
        x = scheduler.step(without + strength * (with_label - without), t, x, generator=draws).prev_sample
    return x[0]


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_guided_pictures_are_those_of_a_loop_around_diffusers(tmp_path: Path, sampler: str) -> None:
    net = shaken(small(num_class_embeds=5))
    pipeline(net, DDPMScheduler()).save_pretrained(tmp_path)
    (tmp_path / "model_index.json").write_text('{"null_label": 4}')
    model = opened(tmp_path)
    maker, expected = engine(model, 6), dict[int, Tensor]()
    for number, (guidance, interval) in enumerate([(1.0, None), (3.0, None), (3.0, (700, 200))]):
        scheduler: Any = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler}[sampler]()
        scheduler.set_timesteps(20)
        expected[number] = their_picture(net, scheduler, 2, guidance, interval or (1000, 1))
        told = (2,) if guidance == 1 else (2, 4)
        choice = planned(model.card.process, sampler, 20, noise="torch", guidance=guidance, guidance_interval=interval)
        maker.submit(Request(number, 7, choice, labels=told))
    made: dict[object, Finished] = {}
    while maker.busy:
        made |= {event.id: event for event in maker.step() if isinstance(event, Finished)}
    for number, x in expected.items():
        grey = ((x / 2 + 0.5).clamp(0, 1) * 255).round().permute(1, 2, 0).numpy()
        assert np.abs(made[number].picture.astype(np.float32) - grey).max() <= 1


def test_the_null_label_is_part_of_the_digest(tmp_path: Path) -> None:
    digests = set()
    for null in (None, 2, 3):
        index = {} if null is None else {"null_label": null}
        digests.add(read_card(write_model(tmp_path / str(null), labels=4, index=index)).digest)

    assert len(digests) == 3
