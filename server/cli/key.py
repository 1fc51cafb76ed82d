"""Makes a key for the file that DDPM_API_KEYS names: its line on standard output, the key itself, which is kept
nowhere, on standard error. `ddpm key alice >> keys`"""

import sys
from argparse import ArgumentParser
from collections.abc import Sequence

from server.web import auth


def main(arguments: Sequence[str]) -> int:
    """Prints a new key and its line. Returns the exit code."""
    parser = ArgumentParser("ddpm key", description=__doc__)
    parser.add_argument("name", help="whose key it is")
    parser.add_argument("--quota", type=int, help="image-steps that may be asked for in a minute (default: any)")
    given = parser.parse_args(arguments)
    key, line = auth.make_key(given.name, given.quota)
    print(line)
    print(key, file=sys.stderr)
    return 0
