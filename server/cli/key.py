"""Makes an API key: prints its line for the file that DDPM_API_KEYS names on standard output, and the key itself, which
is stored nowhere, on standard error. `ddpm key alice >> keys`: a running server accepts the key within two seconds."""

import sys
from collections.abc import Sequence

from model.usage import Parser
from server.web import auth


def main(arguments: Sequence[str]) -> int:
    """Prints a new key and its line. Returns the exit code."""
    parser = Parser("ddpm key", description=__doc__)
    parser.add_argument("name", help="name of the key's owner")
    parser.add_argument("--quota", type=int, help="image-steps per minute that it allows (default: no limit)")
    given = parser.parse_args(arguments)
    key, line = auth.make_key(given.name, given.quota)
    print(line)
    print(key, file=sys.stderr)
    return 0
