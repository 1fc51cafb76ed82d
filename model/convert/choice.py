"""Which net of a directory is converted, and what is refused before torch is imported, which takes a second."""

from argparse import Namespace
from pathlib import Path

from model.checkpoint.foreign import require_served_kind
from model.checkpoint.pipeline import is_part, other_parts, read_index, require_served
from model.checkpoint.scheduler import noise_schedule
from model.checkpoint.weighing import INDEX, SHADOW, Candidate, candidates
from model.convert import files
from model.errors import ModelRefused
from model.nets.lucidrains_config import LUCIDRAINS
from model.options import Json, read_json


def check(given: Namespace) -> None:
    """Raises ModelRefused for a source or for files of options that can be of no use, whatever the weights are."""
    overruling = given.schedule, given.timesteps, given.beta_start, given.beta_end
    config, scheduler = given.config, given.scheduler
    if given.source.is_dir():
        _require_pictures(given.source.resolve())
        if given.format:
            raise ModelRefused("--format and --part must not be given: SRC is a directory of diffusers")
        taken = next((each for each in fitting(given.source, given.part)[1] if SHADOW not in each.name), None)
        if taken is not None:
            config = config or config_of(taken, given.source)
            if not INDEX.search(taken.path.name):
                files.kind(taken.path)
        scheduler = scheduler or above(given.source, "scheduler")
    else:
        files.kind(given.source)
    if config is not None:
        read_net_config(config)
    if scheduler is not None and not any(overruling):
        noise_schedule({"_class_name": "DDPMScheduler"} | read_json(scheduler))


def _require_pictures(directory: Path) -> None:
    """Raises ModelRefused if a net in this directory makes no pictures alone."""
    read_index(directory)
    if is_part(directory):
        if is_part(directory.parent):  # `unet/` of a checkpoint, in the folder of a pipeline
            read_index(directory.parent)
        require_served({}, other_parts(directory))


def fitting(directory: Path, part: str | None) -> tuple[list[Candidate], list[Candidate]]:
    """(all weights in a directory, those that may be taken), the best first. Raises ModelRefused."""
    found = candidates(directory)
    if not found:
        raise ModelRefused(_instead(directory))
    named = [each for each in found if part is None or f"{each.name}/".startswith(f"{part}/")]
    if not named and len(found) == 1:
        raise ModelRefused("--format and --part must not be given: SRC is a directory of diffusers with one net")
    if not named:
        raise ModelRefused(f"--part must be one of {', '.join(ascii(each.name) for each in found)}")
    return found, named


def config_of(taken: Candidate, directory: Path) -> Path:
    """The configuration of a net of a directory. Raises ModelRefused."""
    if (config := taken.config or above(directory, "net")) is None:
        raise ModelRefused(f"{taken.name} has no config.json beside it: give --config CONFIG.json")
    return config


def read_net_config(config: Path) -> Json:
    """A net's configuration of diffusers. Raises ModelRefused."""
    values = read_json(config)
    if values.get("_class_name") == LUCIDRAINS:
        raise ModelRefused(f"{config.name} is that of a model directory, which needs no conversion")
    require_served_kind(values)
    return values


def above(directory: Path, what: str) -> Path | None:
    """The nearest configuration of a net or a scheduler: here, in the folder above, or, in a folder of the net, above
    that."""
    names = {
        "net": ("config.json", "unet/config.json", "unet_ema/config.json"),
        "scheduler": ("scheduler/scheduler_config.json", "scheduler_config.json"),
    }
    home = directory.resolve()
    further = list(home.parents)[: 2 if home.name.startswith("unet") else 1]
    paths = (place / name for place in (home, *further) for name in names[what])
    return next((path for path in paths if path.is_file()), None)


def _instead(directory: Path) -> str:
    """What is in a directory that holds no net."""
    entries = sorted(each.name + "/" * each.is_dir() for each in directory.iterdir())
    some = ", ".join(ascii(name) for name in entries[:5]) + (", …" if len(entries) > 5 else "")
    return f"{directory.name} holds no weights of a net: {some or 'it is empty'}"
