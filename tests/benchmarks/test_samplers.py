"""How samplers are compared: the distance has a closed form, nothing is made or measured twice, all lines are shown."""

import argparse
import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from benchmarks import samplers
from benchmarks.classifier import Classifier, Digits
from benchmarks.distance import Gaussian, distance, frechet
from benchmarks.measure import ROOT
from benchmarks.quality import Batch, make
from benchmarks.samplers import Maker, Real, Sweep, choices, digest_of, rms
from benchmarks.samplers_report import apart, draw, points, read, table
from model.checkpoint.card import read_card
from model.checkpoint.load import Model
from model.engine.engine import Engine
from model.engine.runner import prepared
from model.nets.unet import UNet
from model.sampling.plan import plan, resolve
from model.sampling.schedule import Process, linear
from model.sampling.table import Plan
from tests.model.tiny import ARCHITECTURE, FunctionNet, card

PROCESS = Process(linear())


def a_gaussian(*, mean: list[float], covariance: list[list[float]]) -> Gaussian:
    return Gaussian(np.array(mean), np.array(covariance))


def test_the_frechet_distance_is_that_of_the_closed_form() -> None:
    a = a_gaussian(mean=[0.0, 1.0], covariance=[[4.0, 0.0], [0.0, 9.0]])
    b = a_gaussian(mean=[3.0, 1.0], covariance=[[1.0, 0.0], [0.0, 0.25]])
    turned = a_gaussian(mean=[0.0, 1.0], covariance=[[2.0, 0.9], [0.9, 1.0]])
    product = a.covariance @ turned.covariance
    cross = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))  # tr of the root of a 2 x 2 matrix

    assert frechet(a, b) == pytest.approx(3**2 + (2 - 1) ** 2 + (3 - 0.5) ** 2)
    assert frechet(a, turned) == pytest.approx(4 + 9 + 2 + 1 - 2 * cross)


def test_a_set_is_at_no_distance_from_itself() -> None:
    features = np.random.default_rng(0).normal(size=(50, 8)) @ np.arange(64.0).reshape(8, 8) / 64  # of rank 2

    assert distance(features, Gaussian.of(features)).plain == pytest.approx(0, abs=1e-3)


def test_groups_of_other_sizes_weigh_the_same_and_are_no_bias() -> None:
    draw, apart = np.random.default_rng(0), 6.0 * np.eye(8)
    target = Gaussian(apart.mean(0), np.eye(8) + np.cov(apart, rowvar=False, bias=True))  # of eight groups alike
    groups = np.repeat(np.arange(8), [300, 40, 40, 40, 40, 40, 40, 60])
    found = [distance(draw.normal(size=(600, 8)) + apart[groups], target, groups) for _ in range(12)]
    corrected = np.array([each.corrected for each in found])

    assert min(each.plain for each in found) > 0.05
    assert abs(corrected.mean()) < 0.03
    assert distance(draw.normal(size=(600, 8)) + apart[groups], target).corrected > 1


def test_the_jackknife_takes_away_what_few_pictures_add_and_tells_the_error() -> None:
    draw, real = np.random.default_rng(0), a_gaussian(mean=[0.0] * 16, covariance=np.eye(16).tolist())
    found = [distance(draw.normal(size=(400, 16)), real) for _ in range(20)]
    corrected = np.array([each.corrected for each in found])

    assert min(each.plain for each in found) > 0.1
    assert abs(corrected.mean()) < 0.01
    assert corrected.std() == pytest.approx(np.mean([each.error for each in found]), rel=0.4)


def test_rms_is_of_the_seeds_that_both_have() -> None:
    black, grey = np.zeros((3, 32, 32, 1), np.uint8), np.full((2, 32, 32, 1), 51, np.uint8)

    assert rms(black, grey) == 0.4  # 51 of 255, where the range is 2 wide


def an_engine() -> Engine:
    """Of pictures as large as the judge's; its net says that half of each picture is noise."""
    arch = dataclasses.replace(ARCHITECTURE, height=32, width=32)
    net = FunctionNet(lambda x, k: x * 0.5, arch)
    return Engine(prepared(Model(card(arch, PROCESS), cast(UNet, net), torch.zeros(1000, 1)), 8))


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """A run of its own over some steps of ddpm and ddim, and with so many pictures."""
    monkeypatch.setattr(samplers, "CONVERGED", {"sampler": "ddim", "steps": 9})
    torch.manual_seed(0)
    digits = Digits(torch.randint(256, (40, 1, 32, 32), dtype=torch.uint8), torch.arange(40) % 10)
    net, out = Classifier().eval(), tmp_path / "out.jsonl"
    real = Real.of(net, digits)
    out.write_text('{"machine": {"cpu": "any"}}\n')

    def run(steps: list[int], pictures: int, model: str = "sha256:0", seed: int = 0) -> list[dict[str, Any]]:
        asked = argparse.Namespace(samplers=["ddpm", "ddim"], steps=steps, spacing=[None], clip=["no"])
        maker = Maker(an_engine(), tmp_path, model, "any", seed)
        return [*Sweep(PROCESS, maker, net, real, "judge", out).lines(choices(PROCESS, asked), pictures)]

    return run


def test_a_second_run_makes_and_measures_only_what_the_first_has_not(
    sweep: Callable[..., list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = list[tuple[int, range]]()

    def counted(engine: Engine, table: Plan, seeds: range) -> Batch:
        made.append((table.steps, seeds))
        return make(engine, table, seeds)

    monkeypatch.setattr(samplers, "make", counted)
    first = sweep([2], 20)
    assert [(line["choice"]["sampler"], "rms" in line) for line in first] == [("ddpm", False), ("ddim", True)]
    assert made == [(2, range(20)), (2, range(20)), (9, range(20))]

    made.clear()
    assert sweep([2], 20) == [] and made == []
    assert [line["choice"]["steps"] for line in sweep([2, 3], 20)] == [3, 3]
    assert made == [(3, range(20)), (3, range(20))]

    made.clear()
    assert len(sweep([3], 30)) == 2
    assert made == [(3, range(20, 30)), (3, range(20, 30)), (9, range(20, 30))]
    assert len(sweep([2], 20, "sha256:1")) == 2
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 1 + 2 + 2 + 2 + 2

    made.clear()
    assert len(sweep([2], 20, seed=500)) == 2
    assert made == [(2, range(500, 520)), (2, range(500, 520)), (9, range(500, 520))]


def test_what_an_interrupted_run_has_kept_is_what_a_whole_run_makes(
    sweep: Callable[..., list[dict[str, Any]]],
) -> None:
    sweep([4], 20)
    in_two = sweep([4], 40)
    whole = sweep([4], 40, "sha256:1")

    varying = ("key", "ms_per_picture")
    assert [{k: v for k, v in line.items() if k not in varying} for line in in_two] == [
        {k: v for k, v in line.items() if k not in varying} for line in whole
    ]


def a_line(sampler: str, steps: int, frechet: float, pictures: int = 1000, **choice: Any) -> dict[str, Any]:
    shares = {"readable": 0.81, "rarest": 0.07, "imbalance": 0.05}
    far = {"frechet": frechet, "frechet_error": 0.01, "frechet_plain": frechet + 0.02}
    return {"choice": {"sampler": sampler, "steps": steps} | choice, **shares, **far, "key": {"pictures": pictures}}


def test_the_table_has_a_row_for_each_choice_from_the_most_pictures(tmp_path: Path) -> None:
    lines = [
        a_line("ddim", 10, 0.3, 300, clip=True),
        a_line("ddim", 10, 0.2, 1000, clip=True),
        a_line("ddim", 10, 0.5, 300, clip=True),
        a_line("dpmpp", 10, 0.1, order=3, spacing="trailing", clip=False),
        a_line("dpmpp", 5, 0.4, order=3, plan="fast"),
        other := a_line("dpmpp", 5, 0.7, order=3, plan="fast"),
    ]
    other["key"]["first"] = 500
    file = tmp_path / "lines.jsonl"
    file.write_text("\n".join(map(json.dumps, [{"machine": {}}, *lines])) + "\n")
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table(read(file)).splitlines()[2:]]

    assert [row[:5] + [row[7], row[9]] for row in rows] == [
        ["`fast` (plan)", "5", "", "", "81.0 %", "0.400 ± 0.010", "1000"],
        ["`fast` (plan)", "5", "", "", "81.0 %", "0.700 ± 0.010", "1000, from seed 500"],
        ["dpmpp 3", "10", "trailing", "no", "81.0 %", "0.100 ± 0.010", "1000"],
        ["ddim", "10", "", "yes", "81.0 %", "0.200 ± 0.010", "1000"],
    ]
    assert points(read(file), {"sampler": "dpmpp"}, "frechet") == [(5, 0.4), (10, 0.1)]


def test_the_plot_names_what_it_draws_where_its_line_begins() -> None:
    lines = [a_line("ddim", steps, 1 / steps) for steps in (100, 4, 10)] + [a_line("ddpm", 5, 0.9, plan="fast")]
    series: dict[str, tuple[dict[str, Any], str]] = {
        "ddim": ({"sampler": "ddim"}, "#123456"),
        "fast": ({"saved": True}, "#654321"),
        "absent": ({"sampler": "unipc"}, "#000000"),
    }
    svg = ElementTree.fromstring(draw(lines, series))
    polylines = [each for each in svg.iter() if each.tag.endswith("polyline")]
    texts = [each.text for each in svg.iter() if each.tag.endswith("text")]
    circles = [each for each in svg.iter() if each.tag.endswith("circle")]
    xs, ys = np.array([point.split(",") for point in polylines[1].attrib["points"].split()], float).T

    assert [line.attrib["stroke"] for line in polylines] == ["#123456"] * 2
    assert texts.count("ddim") == texts.count("fast") == 2 and "absent" not in texts
    assert len(circles) == 8
    assert xs[1] - xs[0] == pytest.approx((xs[2] - xs[0]) * np.log(10 / 4) / np.log(100 / 4), abs=0.1)
    assert ys[1] - ys[0] == pytest.approx((ys[2] - ys[0]) * np.log(10 / 4) / np.log(100 / 4), abs=0.1)


def test_labels_keep_their_distance_and_stay_near_what_they_name() -> None:
    assert apart([0.0, 100.0], 10) == [0, 100]
    assert apart([50.0, 50.0, 47.0, 200.0], 10) == [49, 59, 39, 200]


def test_the_plans_that_ship_are_those_that_were_measured() -> None:
    process = read_card(ROOT / "benchmarks" / "digits").process
    lines = [line for file in (ROOT / "benchmarks" / "results").glob("*-samplers.jsonl") for line in read(file)]
    measured = {(line["choice"].get("plan"), line["key"].get("rows")) for line in lines}

    assert process.plans
    assert {(name, digest_of(plan(process, resolve(process, plan=name)))) for name in process.plans} <= measured


def test_the_table_in_the_documents_is_what_was_measured_of_a_thousand_pictures() -> None:
    text = (ROOT / "docs" / "concepts.md").read_text()
    lines = [line for file in (ROOT / "benchmarks" / "results").glob("*-samplers.jsonl") for line in read(file)]
    head, _, *rows = text[text.index("| steps | 5 |") :].split("\n\n")[0].splitlines()
    steps, told = [int(cell) for cell in head.split("|")[2:-1]], 0
    for row in rows:
        first, *cells = (cell.strip() for cell in row.split("|")[1:-1])
        for count, cell in zip(steps, cells, strict=True):
            if cell:
                names, order = re.findall(r"`([\w-]+)`", first), re.search(r"order (\d)", first)
                here = [line for line in lines if line["choice"].get("steps") == count and "first" not in line["key"]]
                if len(names) > 1:
                    found = [line for line in here if line["choice"].get("plan") in names]
                else:
                    wanted = {"sampler": names[0]} | ({"order": int(order[1])} if order else {})
                    wanted |= {"spacing": "linspace" if names == ["ddpm"] else "trailing", "clip": True}
                    found = [line for line in here if wanted.items() <= line["choice"].items()]
                (line,) = (line for line in found if line["key"]["pictures"] == 1000 and line["key"].get("rows"))
                assert cell == f"{100 * line['readable']:.0f} / {line['frechet']:.2f}", (first, count)
                told += 1

    assert told > 50
