"""Progress on a terminal: one line on standard error, which disappears in the end."""

import sys

from tqdm import tqdm

COUNTED = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"
DESCRIBED = "{percentage:3.0f}%|{bar}| {desc}"


def progress_bar() -> "tqdm[None]":
    """A line for a description, on standard error if that is a terminal. It disappears when it is closed."""
    return tqdm(file=sys.stderr, bar_format="{desc}", disable=None, leave=False)
