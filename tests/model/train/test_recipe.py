"""The numbers of a training: their bounds, and the learning rate that they make."""

import math
from typing import Any

import pytest

from model.train.recipe import Recipe, ema_at


@pytest.mark.parametrize(
    ("numbers", "refusal"),
    [
        ({"images": 0}, "images must be at least 1"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"warm_up": 0}, "warm_up must be at least 1"),
        ({"rate": 0.0}, "rate must be a positive number"),
        ({"rate": math.nan}, "rate must be a positive number"),
        ({"minutes": 0.0}, "minutes must be a positive number"),
        ({"minutes": -1.0}, "minutes must be a positive number"),
        ({"minutes": math.nan}, "minutes must be a positive number"),
        ({"images": None}, "images or minutes must say when the training ends"),
        ({"label_dropout": 1.5}, "label_dropout must lie in 0..1"),
        ({"balance": -0.1}, "balance must lie in 0..1"),
        ({"emas": ()}, "emas must be different numbers"),
        ({"emas": (1.0,)}, "emas must be different numbers"),
        ({"emas": (0.9, 0.9)}, "emas must be different numbers"),
        ({"batch": 10**8}, "batch must be at most 65536"),
        ({"crops": -1}, r"crops must lie in 0\.\.1024"),
        ({"crops": 10**8}, r"crops must lie in 0\.\.1024"),
    ],
)
def test_numbers_out_of_bounds_are_refused(numbers: dict[str, Any], refusal: str) -> None:
    with pytest.raises(ValueError, match=refusal):
        Recipe(**numbers)


def test_the_rate_rises_and_falls_over_the_pictures() -> None:
    recipe = Recipe(images=1000, warm_up=100, rate=1.0)

    assert recipe.rate_at(0) == 0
    assert recipe.rate_at(50) == pytest.approx(0.5 * 0.5 * (1 + math.cos(math.pi / 20)))
    assert recipe.rate_at(500) == pytest.approx(0.5)
    assert recipe.rate_at(1000) == recipe.rate_at(2000) == 0


@pytest.mark.parametrize(("images", "warm"), [(6_000, 200), (96_000, 3_200), (6_000_000, 3_200)])
def test_the_rate_rises_for_a_thirtieth_of_the_pictures_but_50_updates_at_most(images: int, warm: int) -> None:
    assert Recipe(images=images).rate_at(warm // 2) == pytest.approx(
        Recipe(images=images, warm_up=warm).rate_at(warm // 2)
    )


def test_without_a_number_of_pictures_the_rate_follows_the_minutes() -> None:
    recipe = Recipe(images=None, minutes=10, rate=1.0)

    assert recipe.rate_at(10**6, 0.0) == pytest.approx(1.0)  # warm by pictures
    assert recipe.rate_at(0, 10.0) == pytest.approx(0.5, rel=0.01)  # half warm by time: a thirtieth of it is 20 s
    assert recipe.rate_at(10**6, 300.0) == pytest.approx(0.5)
    assert recipe.rate_at(10**6, 600.0) == recipe.rate_at(10**6, 700.0) == 0
    assert (recipe.done(10**6, 300.0), recipe.done(0, 700.0)) == (0.5, 1.0)


def test_with_a_number_of_pictures_minutes_only_end_the_training() -> None:
    recipe = Recipe(images=1000, warm_up=1, minutes=1, rate=1.0)

    assert recipe.rate_at(500, 59.0) == pytest.approx(0.5)
    assert recipe.done(500, 60.0) == 1.0


def test_a_moving_average_has_a_short_memory_at_first() -> None:
    assert (ema_at(0, 0.999), ema_at(10**6, 0.999)) == (0.0, 0.999)
    assert ema_at(10, 0.999) == 1 - 11**-0.75
