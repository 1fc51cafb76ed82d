"""Which models are in memory, when there is not room for all. Numbers only; this is the whole rule:

A model that is asked for and not here is loaded as soon as there is room; of several, the one asked for first. Room is
made by models with nothing to do, the least recently used first. If that is not enough, busy ones must leave too, the
one that has been here longest first. Who is to leave takes nobody new on, and finishes what it had been asked for
before; but after its turn (TURN_S, or LOADS times what it took to load, from when it was here and another was waiting)
only what is seated. What it had to put down is asked for anew as soon as it is gone. So each gets its turn, and at most
a fraction of the time goes into loading.
"""

from collections.abc import Collection
from dataclasses import dataclass, field

TURN_S = 10.0
LOADS = 4.0


@dataclass(frozen=True, slots=True)
class Stay:
    """Since when a model is here, and how long it may stay when another wants its place."""

    since: float
    turn_s: float


@dataclass(slots=True)
class Eviction:
    """The models of one device."""

    budget_bytes: int  # 0: there is room for all
    sizes: dict[str, int]  # of every model, bounded; measured once it has been here
    here: dict[str, Stay] = field(default_factory=dict)  # the least recently used first
    wanted: dict[str, float] = field(default_factory=dict)  # not here; since when, the first first

    def fits(self, name: str) -> bool:
        """Whether there is room for one more."""
        return self._missing(name) <= 0

    def ask(self, name: str, now: float) -> None:
        """Somebody wants a model."""
        if name in self.here:
            self.here[name] = self.here.pop(name)
        else:
            self.wanted.setdefault(name, now)

    def came(self, name: str, size_bytes: int, now: float, load_s: float) -> None:
        """It is loaded, and takes so much."""
        self.wanted.pop(name, None)
        self.here[name] = Stay(now, max(TURN_S, LOADS * load_s))
        self.sizes[name] = size_bytes

    def drop(self, name: str) -> None:
        """It is not here any more, or not wanted any more."""
        self.here.pop(name, None)
        self.wanted.pop(name, None)

    @property
    def next(self) -> str | None:
        """Who is to be loaded."""
        return next(iter(self.wanted), None)

    def leaving(self, busy: Collection[str]) -> list[str]:
        """Who must go for the next one, or because more is here than may be."""
        chosen, missing = list[str](), self._missing(self.next)
        if missing <= 0:
            return []
        idle = [name for name in self.here if name not in busy]
        for name in idle + sorted(self.here.keys() - set(idle), key=lambda name: self.here[name].since):
            if missing <= 0:
                break
            chosen.append(name)
            missing -= self.sizes[name]
        return chosen

    def turn_is_over(self, name: str, now: float) -> bool:
        """Whether one that is leaving must put down what is not seated."""
        stay = self.here[name]
        return now >= max(stay.since, next(iter(self.wanted.values()), stay.since)) + stay.turn_s

    def _missing(self, name: str | None) -> int:
        if not self.budget_bytes:
            return 0
        taken = sum(self.sizes[other] for other in self.here)
        return taken + (self.sizes[name] if name is not None else 0) - self.budget_bytes
