"""Stage server: whether pictures keep their bytes in company, what the server costs, and how long it takes to start."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

from benchmarks import exactness
from benchmarks.gpu.facts import Fact, Setting
from benchmarks.gpu.stage import Part
from benchmarks.gpu.worlds import DIGITS, device_of, facts_of, small
from benchmarks.loopback import Load, a_server, beside
from benchmarks.models import our_engine
from model.engine.engine import Engine

COMPARISONS = 200
LOAD = Load(clients=16, pictures=4, steps=1000, rounds=3)
DRY_COMPARISONS, DRY_LOAD = 8, Load(clients=2, pictures=2, steps=4, rounds=2)


@dataclass(slots=True)
class Digits:
    """An engine with the digits, made when it is asked for."""

    setting: Setting
    made: Engine | None = field(default=None)

    @property
    def load(self) -> Load:
        """What is asked of it and of the server."""
        return DRY_LOAD if self.setting.dry else LOAD

    def engine(self) -> Engine:
        """It."""
        if self.made is None:
            self.made = our_engine(DIGITS, device_of(self.setting), self.load.slots)
        return self.made


def parts(setting: Setting) -> list[Part]:
    """One engine serves for the first two."""
    digits = Digits(setting)
    return [partial(same_bytes, digits), partial(start, setting, digits.load.slots), partial(loopback, digits)]


def same_bytes(digits: Digits) -> Iterator[Fact]:
    """Pictures in changing company beside the same alone."""
    comparisons = DRY_COMPARISONS if digits.setting.dry else COMPARISONS
    yield from facts_of([exactness.compare(digits.engine(), comparisons)], [""])


def start(setting: Setting, slots: int) -> Iterator[Fact]:
    """From the call to a server that says it is ready: compiled kernels are kept, so the second start finds them."""
    for which in ("first", "second"):
        began = time.monotonic()
        with a_server(small(setting), slots, device_of(setting)):
            took_s = time.monotonic() - began
        yield Fact(f"{small(setting).name}, {slots} slots: the {which} start", took_s, "s", main=True)
        if setting.dry:
            return


def loopback(digits: Digits) -> Iterator[Fact]:
    """The server over loopback beside the engine's bare loop."""
    yield from facts_of(beside(digits.engine(), DIGITS, digits.load), ["against"])
