"""A model directory's card, read without torch: the net's shape, T, schedule, prediction, digest.

A model directory is one that diffusers saves for a DDPM: `config.json` (the net), `scheduler_config.json` (the
schedule), `model_index.json` (optional) and `diffusion_pytorch_model.safetensors`, flat or in `unet/` and `scheduler/`.
Nothing in it is executed, and every number in it is checked against bounds here, before memory is allocated for it.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from model.checkpoint.foreign import found_instead, require_served_kind
from model.checkpoint.header import entries_of, require_tensors
from model.checkpoint.labels import read_labels
from model.checkpoint.pipeline import is_part, read_index
from model.checkpoint.plans import read_plans
from model.checkpoint.presets import Fields, Preset, read_presets
from model.checkpoint.scheduler import FILE as SCHEDULER
from model.checkpoint.scheduler import read_process
from model.checkpoint.shapes import Shapes, count, embedding_width, shapes
from model.checkpoint.weighing import candidates, served_names
from model.digests import combined_digest, file_digest, text_digest
from model.errors import ModelRefused
from model.nets.config import MAX_PARAMETERS, architecture
from model.nets.lucidrains_config import LUCIDRAINS, AnyArchitecture, lucidrains_architecture
from model.options import MAX_CONFIG_BYTES, Json, lies_in, read_config, read_json, require_file
from model.sampling.labels import Labels
from model.sampling.schedule import Process, SavedPlan

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,139}")
MAX_SHARDS = 256
MAX_TABLE = 1 << 30  # numbers in the table of timestep embeddings


@dataclass(frozen=True, slots=True)
class Source:
    """A model's origin on a hub."""

    id: str
    revision: str  # hash of the commit


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """Everything known of a model without loading it. Built by `read_card`."""

    name: str
    directory: Path
    weights: Path  # the safetensors file, or the index of several
    architecture: AnyArchitecture
    process: Process
    presets: Mapping[Preset, Fields]
    labels: Labels | None = None  # of a conditional net
    configs: tuple[str, ...] = ()  # sha256 of the net's and the scheduler's configuration as they were read
    shards: tuple[Path, ...] = ()  # the files of an index, ordered by name
    left: tuple[str, ...] = ()  # the names of other weights in the directory that could have been taken
    source: Source | None = None  # None: a directory of this machine

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a picture."""
        return self.architecture.shape

    @property
    def unlabelled(self) -> int:
        """What a conditional net is told of a picture without a label: the null label, if it knows one."""
        return 0 if self.labels is None or self.labels.null is None else self.labels.null

    @property
    def taken(self) -> str:
        """The name of the weights, relative to the directory, to be shown."""
        name = self.weights.relative_to(self.directory).as_posix()
        return name.encode(errors="backslashreplace").decode()  # the name of a folder may be any bytes

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """All files that hold weights."""
        return self.shards or (self.weights,)

    @cached_property
    def digest(self) -> str:
        """Content address of everything that determines a picture: weights and both configurations. Raises OSError."""
        return combined_digest([*map(file_digest, self.weight_files), *self.configs])

    @property
    def readme(self) -> str:
        """The text of README.md, or nothing."""
        path = self.directory / "README.md"
        if not path.is_file() or not lies_in(path, self.directory):
            return ""  # a link could lead to any file of this machine, and the text is shown
        with path.open("rb") as file:
            return file.read(MAX_CONFIG_BYTES).decode(errors="replace")


def weighed(directory: Path) -> tuple[Path, tuple[str, ...]]:
    """(the path of the weights that are taken, the names of others that could have been). Raises OSError."""
    found = candidates(directory)
    served = served_names(each.name for each in found if each.config is not None)
    if not any("/" not in name or name.startswith("unet") for name in served):
        served = []  # a folder of models is no model
    usual = f"unet/{WEIGHTS}" if (directory / "unet").is_dir() else WEIGHTS
    taken = served[0] if served else usual
    others = [each.name for each in found if each.averaged or each.name in served]
    return directory / taken, tuple(name for name in others if name != taken)


def schedule_file(directory: Path) -> Path:
    """The path of the scheduler_config.json of this directory. It may lie beside `unet/`."""
    schedule, above = directory / "scheduler", directory.resolve().parent
    folders = [schedule, directory, *([above / "scheduler", above] if is_part(directory) else [])]
    found = (path for path in (folder / SCHEDULER for folder in folders) if path.exists() or path.is_symlink())
    return next(found, (schedule if schedule.is_dir() else directory) / SCHEDULER)


def read_card(directory: Path, name: str | None = None, plans: Mapping[str, SavedPlan] | None = None) -> ModelCard:
    """The card of a model directory. Raises ModelRefused, in one line, if the directory is not usable.

    plans: those that were read of it before, whatever is there now
    """
    if not directory.is_dir():
        raise ModelRefused(f"{directory.name} is not a directory")
    index = read_index(directory)
    weights, left = weighed(directory)
    net_file, hint = weights.parent / "config.json", found_instead(weights.parent)
    require_file(net_file, hint)
    config, digest = read_config(net_file)
    require_served_kind(config)
    scheduler, schedule_digest = read_config(schedule_file(directory))
    arch = lucidrains_architecture(config) if config.get("_class_name") == LUCIDRAINS else architecture(config)
    process, tensors = read_process(scheduler, index, arch.learned_variance), shapes(arch)
    _require_bounds(tensors, process.schedule.T + arch.labels)
    plans, refused = read_plans(directory, process) if plans is None else (plans, {})
    process = replace(process, plans=plans, refused_plans=refused)
    labels = read_labels(index, arch)
    null = [] if labels is None or labels.null is None else [text_digest(f"null_label {labels.null}")]
    told = index.get("scheduler") if scheduler.get("_class_name") is None else None  # the scheduler's class
    require_file(weights, hint)
    card = ModelCard(
        name=name or directory.name,
        directory=directory,
        weights=weights,
        architecture=arch,
        process=process,
        presets=read_presets(index, process),
        labels=labels,
        configs=(digest, schedule_digest, *([text_digest(json.dumps(told))] if told is not None else []), *null),
        shards=_shards(weights) if weights.suffix == ".json" else (),
        left=left,
    )
    require_tensors([(path.name, entries_of(path)) for path in card.weight_files], tensors, weights.name)
    return card


def _require_bounds(tensors: Shapes, rows: int) -> None:
    """Raises ModelRefused if the net has more weights, or more embeddings, than any net needs. rows: embeddings"""
    if (parameters := count(tensors)) > MAX_PARAMETERS:
        raise ModelRefused(f"config.json: at most {MAX_PARAMETERS} parameters are allowed, it calls for {parameters}")
    if (numbers := embedding_width(tensors) * rows) > MAX_TABLE:
        raise ModelRefused(f"config.json: at most {MAX_TABLE} numbers may embed timesteps, it calls for {numbers}")


def shard_names(index: Json, name: str, suffixes: tuple[str, ...] = (".safetensors",)) -> tuple[str, ...]:
    """The files that an index names. Raises ModelRefused if one of them may lie elsewhere than beside it."""
    named = index.get("weight_map")
    if not isinstance(named, dict) or not named or not all(isinstance(file, str) for file in named.values()):
        raise ModelRefused(f"{name}: weight_map must say of every tensor in which file it is")
    files = tuple(sorted(set(named.values())))
    if len(files) > MAX_SHARDS or not all(SHARD.fullmatch(file) and file.endswith(suffixes) for file in files):
        kinds = " or ".join(suffixes)
        raise ModelRefused(f"{name}: weight_map must name at most {MAX_SHARDS} files beside it, each {kinds}")
    return files


def _shards(index: Path) -> tuple[Path, ...]:
    files = tuple(index.parent / file for file in shard_names(read_json(index), index.name))
    for file in files:
        require_file(file)
    return files
