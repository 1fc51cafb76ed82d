"""Presets: three choices that a request can name in place of a sampler, its steps and its other fields.

A model names its own under `presets` in `model_index.json`. There is a rule for those that it does not name, and for
those whose plan is refused, as the model is served without that plan.
"""

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias, get_args

from model.checkpoint.pipeline import INDEX
from model.errors import ModelRefused, PlanError
from model.options import Json, Options
from model.sampling.plan import resolve
from model.sampling.schedule import Process

Preset: TypeAlias = Literal["fast", "balanced", "full"]
PRESETS: tuple[Preset, ...] = get_args(Preset)
Fields: TypeAlias = Mapping[str, Any]  # of a request, without those that are left to the model
TYPES: Mapping[str, tuple[str, tuple[type, ...]]] = {
    **dict.fromkeys(("sampler", "plan", "spacing", "variance"), ("a word", (str,))),
    **dict.fromkeys(("steps", "order"), ("an integer", (int,))),
    "eta": ("a number", (int, float)),
    "clip": ("true or false", (bool,)),
}
SOLVER: Fields = {"sampler": "unipc", "order": 3, "spacing": "trailing"}  # among the best where steps are few
FAST, BALANCED = 10, 25  # steps


def read_presets(index: Json, process: Process) -> Mapping[Preset, Fields]:
    """What each preset of a model stands for. Raises ModelRefused naming a preset for which there is no plan."""
    T, named = process.schedule.T, index.get("presets") or {}
    if not isinstance(named, dict) or not named.keys() <= {*PRESETS}:
        raise Options(INDEX, index).refuse("presets", f"an object of {', '.join(PRESETS)}")
    usual: dict[Preset, Fields] = {
        "fast": {**SOLVER, "steps": min(FAST, T)},
        "balanced": {**SOLVER, "steps": min(BALANCED, T)},
        "full": {"sampler": "ddpm"},
    }
    found = {name: _read(Options(f"{INDEX}: presets.{name}", {name: named[name]}), name, process) for name in named}
    return usual | {name: fields for name, fields in found.items() if fields.get("plan") not in process.refused_plans}


def _read(file: Options, name: str, process: Process) -> Fields:
    fields = file.values[name]
    if not isinstance(fields, dict) or not fields.keys() <= TYPES.keys():
        raise file.refuse(name, f"an object of {', '.join(TYPES)}")
    for field, value in fields.items():
        words, types = TYPES[field]
        if type(value) not in types:
            raise Options(file.name, fields).refuse(field, words)
    try:
        if fields.get("plan") not in process.refused_plans:
            resolve(process, **fields)
    except PlanError as error:
        raise ModelRefused(f"{file.name}: {error}") from None
    return fields
