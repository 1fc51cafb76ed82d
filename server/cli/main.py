"""The `ddpm` command. Each of its commands has a room in `server.commands`; only the one that is used is entered."""

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from types import ModuleType

from ddpm_client.errors import ClientError, Invalid

from model.errors import ModelRefused, NoSuchDevice
from server import __version__
from server.errors import (
    EXIT_CODES,
    EXIT_FAILED,
    EXIT_USAGE,
    EngineFailed,
    SettingsError,
    StorageFull,
    StoreInUse,
    StoreRefused,
)

INTERRUPTED = 130  # what a shell says of whoever ended by Ctrl-C
COMMANDS = {
    "serve": "serve model directories over HTTP",
    "generate": "make a picture",
    "models": "list the models that are served, or that could be",
    "train": "train a model directory on pictures",
    "convert": "turn a foreign checkpoint into a model directory",
    "bench": "measure how fast pictures are made",
    "key": "make an API key",
}


def _room(command: str) -> ModuleType:
    """The room of a command, entered now: none of them should wait for what only another needs."""
    match command:
        case "serve":
            from server.cli import serve

            return serve
        case "generate":
            from server.cli import generate

            return generate
        case "models":
            from server.cli import models

            return models
        case "train":
            from server.cli import train

            return train
        case "convert":
            from server.cli import convert

            return convert
        case "bench":
            from server.cli import bench

            return bench
        case _:
            from server.cli import key

            return key


def main(arguments: Sequence[str] | None = None) -> int:
    """The console script. Returns the exit code, as docs/settings.md has them."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = ArgumentParser("ddpm", description="Pictures from pixel-space diffusion models, served or made here.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    parser.add_argument("--version", action="version", version=f"ddpm-server {__version__}")
    for name, summary in COMMANDS.items():
        commands.add_parser(name, help=summary, add_help=False)
    if not given or given[0] not in COMMANDS:
        parser.parse_args(given)  # which ends here, with help or with what is wrong
    try:
        code: int = _room(given[0]).main(given[1:])
    except (SettingsError, ModelRefused, StoreRefused, StoreInUse, StorageFull, NoSuchDevice) as error:
        return _end(error, EXIT_CODES[type(error)])
    except EngineFailed as error:
        return _end(error, error.exit_code)
    except ClientError as error:
        return _end(error, EXIT_USAGE if isinstance(error, Invalid) else EXIT_FAILED)
    except KeyboardInterrupt:
        return INTERRUPTED
    return code


def _end(error: Exception, code: int) -> int:
    print(f"ddpm: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
