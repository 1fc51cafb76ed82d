"""What goes into the engine and what comes out of it: plain values, no torch."""

from collections.abc import Hashable
from dataclasses import astuple, dataclass
from operator import add
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from model.sampling.plan import Plan

Picture: TypeAlias = NDArray[np.uint8]  # [H, W, C]
Floats: TypeAlias = NDArray[np.float32]  # [C, H, W]


@dataclass(frozen=True, slots=True)
class Request:
    """One picture to make. `frames` are the numbers of updates after which its state is shown (0 = pure noise)."""

    id: Hashable
    seed: int
    plan: Plan
    order: float = 0.0  # smaller is seated first, among those of one owner
    frames: frozenset[int] = frozenset()
    shows_x: bool = True
    shows_x0: bool = False
    wants_floats: bool = False
    owner: str = ""  # owners have equal shares


@dataclass(frozen=True, slots=True)
class Preview:
    """A sample's state after `step` updates: x_t, and the x0 predicted on the way there (none before the first)."""

    id: Hashable
    step: int
    x: Picture | None
    x0: Picture | None


@dataclass(frozen=True, slots=True)
class Finished:
    """A picture. `floats` are its pixels in [-1, 1], unrounded, if they were asked for."""

    id: Hashable
    picture: Picture
    floats: Floats | None


@dataclass(frozen=True, slots=True)
class Cancelled:
    """A sample that was given up before it ended."""

    id: Hashable


@dataclass(frozen=True, slots=True)
class Failed:
    """A sample that could not be made, and why."""

    id: Hashable
    reason: str


Event: TypeAlias = Preview | Finished | Cancelled | Failed
ENDS = (Finished, Cancelled, Failed)  # each sample ends in exactly one of these


@dataclass(frozen=True, slots=True)
class Stats:
    """Where an engine stands, and what it has done so far in numbers that only grow."""

    seated: int = 0
    waiting: int = 0
    steps: int = 0  # steps of the batch
    sample_steps: int = 0  # the same, times the samples in it
    padded: int = 0  # slots that a step computed for nobody
    exhausted: int = 0  # times that memory ran out, after which the batch was smaller

    @property
    def slot_steps(self) -> int:
        """Slots that were computed, in all steps."""
        return self.sample_steps + self.padded

    def __add__(self, other: "Stats") -> "Stats":
        return Stats(*map(add, astuple(self), astuple(other)))
