"""`ddpm convert SRC DIR` converts a checkpoint into a model directory. torch is imported only for what may be one."""

import sys
from collections.abc import Sequence

from model.convert import choice, flags
from model.errors import ModelRefused, reason

EXIT_FAILED, EXIT_MODEL_REFUSED = 1, 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Converts. Returns the exit code: 0 done, 1 failed, 3 model refused; a usage error exits with 2."""
    given = flags.parsed(arguments)
    try:
        choice.check(given)
        from model.convert import conversion

        for line in conversion.convert(given):
            print(line)
    except ModelRefused as refused:
        print(f"ddpm: {refused}", file=sys.stderr)
        return EXIT_MODEL_REFUSED
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        print(f"ddpm: {reason(error)}{where}", file=sys.stderr)
        return EXIT_FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
