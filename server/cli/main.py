"""The `ddpm` command. Each subcommand is a module of `server.cli`, imported only when it is used."""

import errno
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module

from ddpm_client.errors import ClientError, Invalid

from model.usage import Parser
from server import __version__
from server.errors import EXIT_CODES, EXIT_FAILED, EXIT_USAGE, ServerError, exit_code
from server.troubles import shortage

INTERRUPTED = 130  # a shell's exit code for a process that Ctrl-C ended
ENDS: tuple[type[Exception], ...] = (ServerError, *EXIT_CODES)  # of which an exit code tells
OUTPUT = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # what a command's output may meet
COMMANDS = {
    "serve": "serve model directories over HTTP",
    "generate": "make a picture",
    "models": "list the models of a server, or those in DDPM_WEIGHTS",
    "train": "train a model directory on pictures",
    "tune": "find a plan of few steps for a model",
    "convert": "convert a checkpoint into a model directory",
    "bench": "measure image-steps per second",
    "key": "make an API key",
    "check": "check a data directory, and salvage what is sound",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The console script. Returns the exit code; docs/settings.md lists them."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = Parser("ddpm", description="Serve pixel-space diffusion models, and make pictures with them.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    parser.add_argument("--version", action="version", version=f"ddpm-server {__version__}")
    for name, summary in COMMANDS.items():
        commands.add_parser(name, help=summary, add_help=False)
    if not given or given[0] not in COMMANDS:
        parser.parse_args(given)  # exits with the help, the version or a usage error
    failure: Exception
    try:
        code: int = import_module(f"server.cli.{given[0]}").main(given[1:])
        print(end="", flush=True)
        return code
    except ENDS as error:
        failure, code = error, exit_code(error)
    except ClientError as error:
        refused = isinstance(error, Invalid) or getattr(error, "code", "") == "model-not-found"
        failure, code = error, EXIT_USAGE if refused else EXIT_FAILED
    except OSError as error:
        if shortage(error) is None and error.errno not in OUTPUT:
            raise
        _discard_output()
        if error.errno == errno.EPIPE:  # whoever reads has had enough, as `head`
            return EXIT_FAILED
        failure, code = error, EXIT_FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    print(f"ddpm: {failure}", file=sys.stderr)
    return code


def _discard_output() -> None:
    """Lets what is still buffered for standard output go nowhere, or Python would write it in the end."""
    with suppress(OSError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
