"""Every combination of parameters, of which CI tries a part: each value, and pairs of values evenly."""

from collections.abc import Iterable
from itertools import product
from typing import Any

import pytest


def grid(*axes: Iterable[Any], one_in: int) -> list[Any]:
    """All combinations for `pytest.mark.parametrize`; but for one in so many, they have the mark `long`.

    Those that are left lie on diagonals: with two axes, each value of one meets every `one_in`th value of the other.
    """
    return [
        pytest.param(
            *(value for _, value in cell), marks=[pytest.mark.long] if sum(i for i, _ in cell) % one_in else []
        )
        for cell in product(*(enumerate(axis) for axis in axes))
    ]
