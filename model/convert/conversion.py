"""Converts a checkpoint into a model directory, which is written only if it can be opened."""

import json
import tempfile
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from shutil import copyfile
from typing import Any

import torch
from safetensors.torch import save_file

from model.checkpoint.card import WEIGHTS, read_card
from model.checkpoint.load import load_layers
from model.checkpoint.pipeline import INDEX
from model.checkpoint.plans import FOLDER, read_plans
from model.checkpoint.presets import read_presets
from model.convert import directories, formats
from model.convert.protocol import Converted, Options
from model.convert.sources import read_state
from model.digests import file_digest
from model.errors import ModelRefused
from model.sampling.schedule import Process, SavedPlan


def convert(given: Namespace) -> list[str]:
    """Makes the model directory that the flags ask for. Returns lines that say what was taken, left and assumed.

    Raises ModelRefused, OSError.
    """
    options = Options(**{field.name: getattr(given, field.name) for field in fields(Options)})
    source, target, told = given.source, given.target, list[str]()
    if source.is_dir():
        converted, files = directories.convert(source, options, given.part)
        part = ""
    else:
        state, part, parts = read_state(source, given.part)
        inner = (given.part or "").removeprefix(part).lstrip(".")
        converted = formats.convert(state, options, given.format, inner, source.name)
        files = [source]
        if len(parts) > 1:
            told = [f"{source.name} holds {', '.join(map(repr, parts))}; took {part!r}"]
    told += converted.notes
    left = write(
        converted, target, _readme(target.name, converted, files, part, told), source if source.is_dir() else None
    )
    return [*told, *left, f"{target.name}: {converted.origin}"]


def _readme(name: str, converted: Converted, files: Sequence[Path], part: str, told: Sequence[str]) -> str:
    """README.md of the model directory."""
    taken = f", part `{part}`" if part else ""
    read = ", ".join(f"`{file.name}`{taken}, sha256 `{file_digest(file)}`" for file in files)
    notes = "".join(f"- {line}\n" for line in told)
    return f"# {name}\n\n{converted.origin}.\n\nConverted from {read}.\n\n{notes}"


def write(converted: Converted, target: Path, readme: str, source: Path | None = None) -> list[str]:
    """Writes a model directory, and moves it to its place if it can be opened. Raises ModelRefused, OSError.

    Plans of a source that is a directory come along, and presets, but for those that are not for the model as it was
    converted: returns a line for each.
    """
    left = list[str]()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".convert-", dir=target.parent) as scratch:
        directory = Path(scratch) / "model"
        directory.mkdir()
        index = _index(converted)
        written = {
            "config.json": converted.config,
            "scheduler_config.json": converted.scheduler,
            INDEX: index,
        }
        for name, values in written.items():
            (directory / name).write_text(json.dumps(values, indent=2) + "\n")
        (directory / "README.md").write_text(readme)
        save_file({k: t.contiguous() for k, t in converted.tensors.items()}, directory / WEIGHTS, {"format": "pt"})
        (directory / WEIGHTS).chmod(0o644)  # the server may be run by another user
        card = read_card(directory)
        load_layers(card, torch.device("cpu"), torch.float32)
        if source is not None:
            plans, left = _take_plans(source, directory, card.process)
            presets, others = _fitting_presets(converted.presets, replace(card.process, plans=plans))
            left += others
            if presets:
                (directory / INDEX).write_text(json.dumps(index | {"presets": presets}, indent=2) + "\n")
        directory.rename(target)
    return left


def _index(converted: Converted) -> dict[str, Any]:
    """model_index.json, without presets."""
    index = {
        "_class_name": "DDPMPipeline",
        "scheduler": ["diffusers", converted.scheduler.get("_class_name", "DDPMScheduler")],
        "unet": ["diffusers", converted.config.get("_class_name", "UNet2DModel")],
    }
    steps = {} if converted.default_steps is None else {"default_steps": converted.default_steps}
    return index | steps | dict(converted.of_labels)


def _take_plans(source: Path, directory: Path, process: Process) -> tuple[dict[str, SavedPlan], list[str]]:
    """Copies the plans that are for this process. (those, a line for each that was left)"""
    plans, refused = read_plans(source, process)
    for name in plans:
        (directory / FOLDER).mkdir(exist_ok=True)
        copyfile(source / FOLDER / f"{name}.json", directory / FOLDER / f"{name}.json")
    return plans, [f"plan {name} was left: {reason}" for name, reason in refused.items()]


def _fitting_presets(presets: Mapping[str, Any], process: Process) -> tuple[dict[str, Any], list[str]]:
    """(the presets that are for this process, a line for each that is not)"""
    fitting, left = dict[str, Any](), list[str]()
    for name, chosen in presets.items():
        try:
            read_presets({"presets": {name: chosen}}, process)
        except ModelRefused as error:
            left.append(f"preset {ascii(name)[1:-1]} was left: {error}")
        else:
            fitting[name] = chosen
    return fitting, left
