"""Which models are in memory when there is not room for all: the whole policy, in numbers only.

A model that is asked for is loaded as soon as there is room; of several, the one asked for first. Idle models make
room, the least recently used first. If that is not enough, busy ones must leave too, the one that was loaded first. A
model that must leave gets no new requests, and finishes those it has; but once its turn is over (TURN_S, or
TURN_PER_LOAD times what its load took, since it was loaded and another was waiting), it finishes only what is seated.
The rest is asked for anew as soon as it is gone. So each model gets its turn, and at most a fraction of the time is
spent on loading.
"""

from collections.abc import Collection
from dataclasses import dataclass, field

from model.errors import ModelRefused

TURN_S = 10.0  # the shortest turn
TURN_PER_LOAD = 4.0  # how many times as long as its load a turn lasts, if that is more than TURN_S


@dataclass(frozen=True, slots=True)
class Stay:
    """Since when a model is loaded, and how long it may stay when another needs its room."""

    since: float
    turn_s: float


@dataclass(slots=True)
class Eviction:
    """The models of one device, by name."""

    budget_bytes: int  # 0: there is room for all
    sizes: dict[str, int]  # bytes of every model: a bound, or what was measured once it was loaded
    here: dict[str, Stay] = field(default_factory=dict)  # loaded models, the least recently used first
    wanted: dict[str, float] = field(default_factory=dict)  # since when the others are asked for, in that order

    def require_room(self, name: str, size_bytes: int) -> None:
        """Raises ModelRefused if a model of this size could never be loaded."""
        if self.budget_bytes and size_bytes > self.budget_bytes:
            raise ModelRefused(f"{name} takes {size_bytes} bytes, models may take {self.budget_bytes}")

    def fits(self, name: str) -> bool:
        """Whether there is room for one more."""
        return self._missing(name) <= 0

    def ask(self, name: str, now: float) -> None:
        """Notes a request for a model."""
        if name in self.here:
            self.here[name] = self.here.pop(name)
        else:
            self.wanted.setdefault(name, now)

    def came(self, name: str, size_bytes: int, now: float, load_s: float) -> None:
        """Notes that a model is loaded, and what it takes."""
        self.wanted.pop(name, None)
        self.here[name] = Stay(now, max(TURN_S, TURN_PER_LOAD * load_s))
        self.sizes[name] = size_bytes

    def drop(self, name: str) -> None:
        """Notes that a model is unloaded, or not asked for any more."""
        self.here.pop(name, None)
        self.wanted.pop(name, None)

    @property
    def next(self) -> str | None:
        """The model that is to be loaded."""
        return next(iter(self.wanted), None)

    def leaving(self, busy: Collection[str]) -> list[str]:
        """The models that must make room for the next one, or because those here take more than the budget."""
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
        """Whether a model that must leave is to give back what is not seated."""
        stay = self.here[name]
        return now >= max(stay.since, next(iter(self.wanted.values()), stay.since)) + stay.turn_s

    def _missing(self, name: str | None) -> int:
        if not self.budget_bytes:
            return 0
        taken = sum(self.sizes[other] for other in self.here)
        return taken + (self.sizes[name] if name is not None else 0) - self.budget_bytes
