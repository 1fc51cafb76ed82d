"""Trains a net on pictures, into a model directory that can be served from its first checkpoint on. Sub-folders are
labels. Ctrl-C stops at a checkpoint, and the same command goes on from there."""

import json
import shutil
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from model.errors import ModelError, NoSuchDevice, reason
from model.options import read_json
from model.train import flags, fresh
from model.train.recipe import STATE
from model.train.report import Lines, Standing
from model.train.source import Source, find, outline, require_outside
from model.usage import Parser
from server.cli.progress import DESCRIBED, progress_bar
from server.errors import SettingsError, StorageFull

CONFIG, SCHEDULER, INDEX = "config.json", "scheduler_config.json", "model_index.json"
CONFIGURATIONS = (CONFIG, SCHEDULER)
DRAWN_S = 0.1  # seconds from one bar to the next
SIGNALLED = 128  # and the number of the signal: a shell's exit code for a process that it ended


class Bar:
    """A report on a terminal: a progress bar, and lines above it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._bar, self._clock, self._next = progress_bar(), clock, clock()

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.close()

    def say(self, line: str) -> None:
        """See `Report`."""
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()

    def reading(self, done: int, count: int) -> None:
        """See `Report`."""
        self._show(done / count, f"{done:,} of {count:,} pictures read")

    def update(self, standing: Standing) -> None:
        """See `Report`."""
        self._show(standing.done, str(standing))

    def _show(self, done: float, told: str) -> None:
        if self._clock() >= self._next:
            self._next = self._clock() + DRAWN_S
            self._bar.bar_format, self._bar.total, self._bar.n = DESCRIBED, 1.0, done
            self._bar.set_description_str(told)


def _parser() -> Parser:
    parser = Parser("ddpm train", description=__doc__)
    told = "a folder of pictures, with a sub-folder for each label or without; or an .npz with an array `images`"
    parser.add_argument("images", type=Path, metavar="IMAGES", help=told)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="model directory to write")
    new = parser.add_argument_group("a new directory", "By default its configurations are made to fit the pictures.")
    new.add_argument(
        "--size", type=int, metavar="N", help="side of a picture (32, or their own if all are of one size)"
    )
    new.add_argument("--width", type=int, metavar="N", help="channels of the first level (32; above 64 pixels, 64)")
    told = f"model directory to copy {' and '.join(CONFIGURATIONS)} from instead"
    new.add_argument("--config", type=Path, metavar="DIR", help=told)
    flags.add_arguments(parser)
    return parser


def main(arguments: Sequence[str]) -> int:
    """Trains. Returns the exit code."""
    given = _parser().parse_args(arguments)
    if not given.images.exists():
        raise SettingsError(f"{given.images} is not there")
    try:
        flags.recipe_of(given)
        require_outside(given.out, given.images)
        with _undone_if_refused(given.out):
            _configure(given, find(given.images))
            device = flags.device_of(given.device)
            if not flags.has_device(device):
                raise NoSuchDevice(f"--device must be cpu, or a GPU that PyTorch finds here, got {device!r:.40}")
            number = _run(given)
    except ValueError as error:
        raise SettingsError(str(error)) from None
    except OSError as error:
        raise StorageFull(f"--out {given.out} cannot be written: {error.strerror or error}") from None
    return SIGNALLED + number if number else 0


@contextmanager
def _undone_if_refused(directory: Path) -> Iterator[None]:
    """If an error comes before there is a checkpoint, the configurations written meanwhile are removed: pictures that
    are mended may need others."""
    new = [directory / name for name in (*CONFIGURATIONS, INDEX) if not (directory / name).exists()]
    was_there = directory.exists()
    try:
        yield
    except (ModelError, SettingsError, OSError, ValueError):
        if not (directory / STATE).exists():
            with suppress(OSError):
                for path in new:
                    path.unlink(missing_ok=True)
                if not was_there:
                    directory.rmdir()
        raise


def _run(given: Namespace) -> int:
    if not sys.stderr.isatty():
        return flags.run(given.images, given.out, given, Lines())
    with Bar() as bar:
        return flags.run(given.images, given.out, given, bar)


def _configure(given: Namespace, source: Source) -> None:
    """Writes the configurations that the directory lacks. Raises SettingsError, ModelRefused, ValueError."""
    directory, there = given.out, [(given.out / name).is_file() for name in CONFIGURATIONS]
    if given.config is not None and not all((given.config / name).is_file() for name in CONFIGURATIONS):
        raise SettingsError(f"--config must be a folder with {' and '.join(CONFIGURATIONS)}")
    made, guided = dict[str, dict[str, Any]](), given.label_dropout > 0
    if given.config is None and not all(there):
        pictures = outline(source)
        sides = fresh.sides_for(pictures, given.size)
        made[CONFIG] = fresh.net_config(pictures.channels, sides, given.width, len(source.names))
        made |= {SCHEDULER: fresh.scheduler_config(), INDEX: fresh.index(source.names, guided)}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name in CONFIGURATIONS:
            if given.config is not None and not (directory / name).exists():
                shutil.copy(given.config / name, directory / name)
        config = read_json(directory / CONFIG) if (directory / CONFIG).is_file() else made[CONFIG]
        if INDEX not in made and config.get("num_class_embeds"):
            made[INDEX] = fresh.labels_index(source.names, guided)
        for name, values in made.items():
            if not (directory / name).exists():
                (directory / name).write_text(json.dumps(values, indent=2) + "\n")
    except OSError as error:
        raise SettingsError(f"--out {directory} cannot be written: {reason(error)}") from None
    _require_same(given, config)


def _require_same(given: Namespace, config: dict[str, Any]) -> None:
    """Raises SettingsError if the flags ask for another net than the directory has."""
    widths, size = config.get("block_out_channels"), config.get("sample_size")
    width = widths[0] if isinstance(widths, list) and widths else None
    for flag, wanted, there in (("--size", given.size, size), ("--width", given.width, width)):
        if wanted is not None and wanted != there:
            raise SettingsError(f"{flag} {wanted}: {given.out}/{CONFIG} has {there}, and a net keeps its shape")
