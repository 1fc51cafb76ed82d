"""The losses of the article: what the benchmark compares is what it writes, and curves are those of their runs."""

import json
import math
import re

import numpy as np
import pytest
import torch

from benchmarks.curves import draw
from benchmarks.losses import LOSSES, SCHEDULE, after, before, between, ratios
from benchmarks.quality import curve
from tests.test_docs import ROOT


def noise(seed: int, count: int = 4) -> torch.Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_noise_of_a_step_is_that_of_the_article() -> None:
    """With eps_t and that of all steps before drawn, as in eq. 10: eq. 12 gives eps_t back from eps and omega."""
    eps_t, eps_before, t = noise(0), noise(1), 300
    alpha = SCHEDULE.alpha_bar[t] / SCHEDULE.alpha_bar[t - 1]
    beta, bar, bar_before = np.sqrt(1 - alpha**2), SCHEDULE.beta_bar[t], SCHEDULE.beta_bar[t - 1]
    eps = (alpha * bar_before * eps_before + beta * eps_t) / bar
    omega = (beta * eps_before - alpha * bar_before * eps_t) / bar
    ratio = torch.tensor(ratios(SCHEDULE)[t])

    torch.testing.assert_close(ratio, torch.tensor(beta / bar))
    torch.testing.assert_close(before(eps, omega, torch.zeros_like(eps), ratio), eps_t.square().mean(dim=(1, 2, 3)))


def test_on_average_the_loss_before_is_the_one_after_weighted_and_a_constant() -> None:
    eps, out = noise(0, 1).expand(20_000, -1, -1, -1), 0.7 * noise(0, 1)
    for t in (1, 10, 500):
        ratio = torch.tensor(ratios(SCHEDULE)[t])
        averaged = before(eps, noise(1, 20_000), out, ratio).mean()
        weighted = ratio.square() * after(eps, eps, out, ratio)[0]

        torch.testing.assert_close(between(eps, eps, out, ratio)[0], weighted)
        torch.testing.assert_close(averaged, weighted + 1 - ratio.square(), rtol=5e-3, atol=1e-12)


def test_the_picture_that_ships_ends_where_its_run_ended() -> None:
    drawn = (ROOT / "docs" / "pictures" / "losses.svg").read_text()
    heights = [float(y) for y in re.findall(r'<polyline[^>]*points="[^"]*,([\d.]+)"', drawn)]
    lines = (ROOT / "benchmarks" / "results" / "2026-11-29-cpu-losses.jsonl").read_text().splitlines()
    found = {line["name"].partition(":")[0]: line["value"] for line in map(json.loads, lines[1:])}
    ends = [math.log(found[name]) for name in LOSSES]  # the axis is logarithmic

    assert len(heights) == len(ends) == 3
    assert (heights[1] - heights[0]) / (heights[2] - heights[0]) == pytest.approx(
        (ends[1] - ends[0]) / (ends[2] - ends[0]), abs=0.01
    )


@pytest.mark.parametrize("name", ["digits", "emoji"])
def test_the_curves_of_a_model_are_those_of_its_log(name: str) -> None:
    model = ROOT / "weights" / name
    log = [json.loads(line) for line in (model / "training.jsonl").read_text().splitlines()]

    assert curve(log) == (model / "curve.svg").read_text()


def test_losses_that_are_close_have_an_axis_of_their_own() -> None:
    drawn = draw("title", "loss", [10, 20], {"one": [0.3, 0.12], "two": [0.4, 0.3]})

    assert ">0.1<" in drawn and ">0.2<" in drawn and ">0.5<" in drawn and ">1<" not in drawn
