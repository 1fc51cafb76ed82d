"""`python -m model.train` trains a model directory. See `model.train.train`."""

import sys
from pathlib import Path

from model.errors import ModelError
from model.train.flags import add_arguments, run
from model.usage import Parser


def main() -> int:
    parser = Parser("model.train", description="Trains a model directory, also as a process of torchrun.")
    parser.add_argument("source", type=Path, help="a folder of images, or an .npz with an array `images`")
    parser.add_argument("directory", type=Path, help="a model directory: config.json and scheduler_config.json")
    add_arguments(parser)
    args = parser.parse_args()
    try:
        number = run(args.source, args.directory, args)
    except (ModelError, OSError, ValueError) as error:
        parser.error(str(error))
    return 128 + number if number else 0


if __name__ == "__main__":
    sys.exit(main())
