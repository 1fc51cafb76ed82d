"""Trains a model directory on pictures: a folder of images, or an .npz with an array `images`. After an interruption
the same command resumes from the last checkpoint."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from model.errors import NoSuchDevice, reason
from model.usage import Parser
from server.errors import SettingsError, StorageFull

CONFIGURATIONS = ("config.json", "scheduler_config.json")


def main(arguments: Sequence[str]) -> int:
    """Trains. Returns the exit code."""
    from model.train import train

    parser = Parser("ddpm train", description=__doc__)
    parser.add_argument("images", type=Path, metavar="IMAGES", help="the pictures")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the model directory to write")
    parser.add_argument(
        "--config",
        type=Path,
        metavar="DIR",
        help=f"model directory to copy {' and '.join(CONFIGURATIONS)} from if --out lacks them (default: it has them)",
    )
    train.add_arguments(parser)
    given = parser.parse_args(arguments)
    if given.config is not None:
        _configure(given.out, given.config)
    if not all((given.out / name).is_file() for name in CONFIGURATIONS):
        raise SettingsError(f"--out must be a folder with {' and '.join(CONFIGURATIONS)}, or --config must name one")
    if not given.images.exists():
        raise SettingsError(f"{given.images} is not there")
    if not train.has_device(given.device):
        raise NoSuchDevice(f"--device must be cpu, or a GPU that PyTorch finds here, got {given.device!r:.40}")
    try:
        train.run(given.images, given.out, given)
    except ValueError as error:
        raise SettingsError(str(error)) from None
    except OSError as error:
        raise StorageFull(f"--out {given.out} cannot be written: {error.strerror or error}") from None
    return 0


def _configure(directory: Path, source: Path) -> None:
    """Copies the configurations that the directory lacks."""
    if not all((source / name).is_file() for name in CONFIGURATIONS):
        raise SettingsError(f"--config must be a folder with {' and '.join(CONFIGURATIONS)}")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name in CONFIGURATIONS:
            if not (directory / name).exists():
                shutil.copy(source / name, directory / name)
    except OSError as error:
        raise SettingsError(f"--out {directory} cannot be written: {reason(error)}") from None
