"""Presets: what a model's index names is checked when it is read, and there is a rule for what it does not name."""

from dataclasses import replace
from typing import Any

import pytest

from model.checkpoint.presets import BALANCED, FAST, PRESETS, read_presets
from model.sampling.plan import resolve
from model.sampling.schedule import NoiseSchedule
from tests.model.convert.refusals import refusal
from tests.model.tiny import PROCESS, T

INVALID: list[tuple[Any, str]] = [
    ("fast", 'model_index.json: presets must be an object of fast, balanced, full, got "fast"'),
    ({"turbo": {}}, "model_index.json: presets must be an object of fast, balanced, full, got {"),
    ({"fast": 10}, "model_index.json: presets.fast: fast must be an object of sampler, plan, "),
    ({"fast": {"noise": "torch"}}, "model_index.json: presets.fast: fast must be an object of sampler, plan, "),
    ({"fast": {"steps": "10"}}, 'model_index.json: presets.fast: steps must be an integer, got "10"'),
    ({"fast": {"steps": True}}, "model_index.json: presets.fast: steps must be an integer, got true"),
    ({"fast": {"steps": 10.0}}, "model_index.json: presets.fast: steps must be an integer, got 10.0"),
    ({"fast": {"sampler": ["ddim"]}}, 'model_index.json: presets.fast: sampler must be a word, got ["ddim"]'),
    ({"fast": {"clip": 1}}, "model_index.json: presets.fast: clip must be true or false, got 1"),
    ({"fast": {"eta": None}}, "model_index.json: presets.fast: eta must be a number, got null"),
    ({"full": {"steps": T + 1}}, f"model_index.json: presets.full: steps must lie in 1..{T}, got {T + 1}"),
    ({"balanced": {"sampler": "euler"}}, "model_index.json: presets.balanced: sampler must be one of ddpm, "),
    ({"fast": {"order": 2}}, "model_index.json: presets.fast: order applies to "),
    ({"fast": {"sampler": "unipc", "order": 9}}, "presets.fast: order must lie in 1..3 for unipc, got 9"),
    ({"fast": {"sampler": "ddim", "eta": float("nan")}}, "presets.fast: eta must lie in 0..1, got nan"),
    ({"fast": {"variance": "huge"}}, "presets.fast: variance must be one of small, large, learned"),
    ({"fast": {"variance": "learned"}}, "presets.fast: variance must be small or large: this net has not learned one"),
    ({"fast": {"spacing": "quad"}}, "presets.fast: spacing must be one of leading, "),
    ({"fast": {"plan": "five"}}, "presets.fast: plan must be left out, for this model has none"),
]


@pytest.mark.parametrize(("presets", "why"), INVALID)
def test_a_preset_for_which_there_is_no_plan_refuses_the_model(presets: Any, why: str) -> None:
    assert why in refusal(lambda: read_presets({"presets": presets}, PROCESS))


@pytest.mark.parametrize("levels", [1, 5, 1000])
def test_a_model_that_names_none_has_the_presets_of_the_rule(levels: int) -> None:
    schedule = NoiseSchedule.of([0.01] * levels)
    process = replace(PROCESS, schedule=schedule, default_steps=min(100, levels))
    presets = read_presets({}, process)
    resolved = {name: resolve(process, **presets[name]) for name in PRESETS}

    assert [resolved[name].steps for name in PRESETS] == [min(most, levels) for most in (FAST, BALANCED, 100)]
    assert resolved["fast"] == replace(resolved["balanced"], steps=min(FAST, levels))
    assert resolved["full"] == resolve(process)  # which a request without choices is


def test_a_preset_that_is_named_stands_beside_those_of_the_rule() -> None:
    named = {"sampler": "ddim", "steps": 7, "eta": 0.5, "clip": False}
    presets = read_presets({"presets": {"fast": named}}, PROCESS)

    assert presets == {**read_presets({}, PROCESS), "fast": named}


def test_a_preset_whose_plan_is_refused_is_that_of_the_rule() -> None:
    process = replace(PROCESS, refused_plans={"five": "five.json is not valid JSON"})
    ddim = {"sampler": "ddim", "steps": 3}

    presets = read_presets({"presets": {"fast": {"plan": "five"}, "balanced": ddim}}, process)
    assert presets == {**read_presets({}, process), "balanced": ddim}
