"""A request between its submission and its end."""

from dataclasses import dataclass, field

from model.engine.events import Request
from model.engine.slots import SavedState
from model.sampling.noise import TorchNoise


@dataclass(slots=True, eq=False)
class Sample:
    """A request that has not ended. It waits, is seated in a slot, perhaps is preempted, and is then copied out."""

    request: Request
    rank: float = field(init=False)
    owner: str = field(init=False)
    stops: frozenset[int] = field(init=False)  # numbers of updates after which its state is copied out
    source: TorchNoise | None = field(init=False, default=None)  # of noise that comes from outside, once seated
    width: int = field(init=False)  # how many slots it takes
    slots: tuple[int, ...] = field(init=False, default=())  # where it is seated
    arrival: int = field(init=False, default=-1)  # the scheduler's
    step: int = field(init=False, default=0)  # updates done; the device's cursor equals it, and is never read
    saved: SavedState | None = field(init=False, default=None)  # its state, if it was preempted
    leaving: bool = field(init=False, default=False)  # finished, but still being copied off the device

    def __post_init__(self) -> None:
        self.rank, self.owner = self.request.rank, self.request.owner
        self.width = max(1, len(self.request.labels))
        self.stops = self.request.frames | {self.request.plan.steps}

    @property
    def left(self) -> int:
        """Updates still to do."""
        return self.request.plan.steps - self.step

    @property
    def ended(self) -> bool:
        """Whether the last row of its plan has been walked."""
        return self.left == 0

    @property
    def seat(self) -> int:
        """The slot of a seated sample from which its picture is read."""
        return self.slots[0]

    def restart(self) -> None:
        """Forgets all progress: the sample begins with the noise of its seed again, and comes to the same bytes."""
        self.step, self.source, self.saved = 0, None, None
