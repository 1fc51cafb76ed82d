"""The engine's input and output: plain values, no torch."""

from collections.abc import Hashable
from dataclasses import KW_ONLY, dataclass, fields
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from model.sampling.table import Plan

Picture: TypeAlias = NDArray[np.uint8]  # [H, W, C]
Floats: TypeAlias = NDArray[np.float32]  # [C, H, W]


@dataclass(frozen=True, slots=True)
class Request:
    """One picture to make. `frames` are the numbers of updates after which its state is shown (0 is pure noise)."""

    id: Hashable
    seed: int
    plan: Plan
    _: KW_ONLY
    rank: float = 0.0  # among the samples of one owner, the lowest is seated first
    frames: frozenset[int] = frozenset()
    shows_x: bool = True
    shows_x0: bool = False
    wants_floats: bool = False
    owner: str = ""  # owners have equal shares
    labels: tuple[int, ...] = ()  # of a conditional net: the picture's label, and behind it the null label if guided


@dataclass(frozen=True, slots=True)
class Preview:
    """A sample's state after `step` updates: x_t, and the x0 predicted in the last of them (None if there was none)."""

    id: Hashable
    step: int
    x: Picture | None
    x0: Picture | None


@dataclass(frozen=True, slots=True)
class Finished:
    """A finished picture. `floats` are its pixels in [-1, 1] before rounding, if they were requested."""

    id: Hashable
    picture: Picture
    floats: Floats | None


@dataclass(frozen=True, slots=True)
class Cancelled:
    """A sample was cancelled before it finished."""

    id: Hashable


@dataclass(frozen=True, slots=True)
class Failed:
    """A sample could not be finished, for this reason."""

    id: Hashable
    reason: str


Event: TypeAlias = Preview | Finished | Cancelled | Failed
ENDS = (Finished, Cancelled, Failed)  # each sample ends in exactly one of these


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """An engine's gauges (the first two) and its counters since the start."""

    seated: int = 0  # slots with samples in them
    waiting: int = 0
    steps: int = 0  # steps of the batch
    sample_steps: int = 0  # updates of samples: a step counts once for each slot with a sample in it
    padded: int = 0  # slots that were computed without a sample in them
    exhausted: int = 0  # how often memory ran out, after which the batch was smaller

    @property
    def slot_steps(self) -> int:
        """Slots that were computed, in all steps."""
        return self.sample_steps + self.padded

    def __add__(self, other: "Stats") -> "Stats":
        """The sums of two engines' numbers."""
        return Stats(**{each.name: getattr(self, each.name) + getattr(other, each.name) for each in fields(self)})
