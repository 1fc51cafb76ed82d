"""What is known of an engine's times: of its steps, and of what it takes to load."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from server.worker.messages import ModelStatus, Step

START_S = 1.0  # of a process, before it begins to load
FADING = 0.9  # of the longest step lately, from one beat to the next


MEMORY = 0.1  # the weight of the newest step in the mean of its batch size


@dataclass(slots=True)
class Pace:
    """How long a step takes, by the number of pictures in it."""

    _mean_s: dict[int, float] = field(default_factory=dict)

    def learn(self, batch: int, seconds: float) -> None:
        """A step of so many slots took so long."""
        before = self._mean_s.get(batch, seconds)
        self._mean_s[batch] = before + MEMORY * (seconds - before)

    def step_s(self, buckets: Sequence[int]) -> list[float]:
        """Seconds of a step by how many pictures are in it, 0 .. the largest bucket; they take what their bucket takes,
        and between the buckets that were seen lies a line. Zeros if none was."""
        if not self._mean_s:
            return [0.0] * (buckets[-1] + 1)
        seen = sorted(self._mean_s)
        times = np.interp(buckets, seen, [self._mean_s[bucket] for bucket in seen])
        counts = range(buckets[-1] + 1)
        by_count: list[float] = times[np.searchsorted(buckets, counts)].tolist()
        return by_count


@dataclass(slots=True)
class StepTimes:
    """Learned from what the engine tells."""

    start_s: float = 5.0  # what a start takes, with its models
    longest_s: float = 0.0  # the longest that the engine was busy with a step of each model, lately
    _times: dict[str, Pace] = field(default_factory=dict)  # by model
    _loads: dict[str, float] = field(default_factory=dict)  # seconds, by model that has been loaded
    _since: float | None = field(default_factory=time.monotonic)  # since when there has been no engine

    def learn(self, steps: Sequence[Step], models: int) -> None:
        """These steps were taken, where so many models are loaded."""
        for step in steps:
            self._times.setdefault(step.model, Pace()).learn(step.bucket, step.seconds)
        longest_s = max((step.seconds for step in steps), default=0.0)
        self.longest_s = max(longest_s * models, FADING * self.longest_s)

    def started(self, served: Mapping[str, ModelStatus]) -> None:
        """An engine is there, with these models."""
        loads = {name: model.load_s for name, model in served.items() if model.loaded}
        self._loads |= loads
        self.start_s, self._since = START_S + sum(loads.values()), None

    def loaded(self, name: str, served: ModelStatus) -> None:
        """One more model is there."""
        self._loads[name] = served.load_s

    def died(self) -> None:
        """There is no engine."""
        self._since = time.monotonic()

    def step_s(self, model: str, buckets: Sequence[int]) -> Sequence[float]:
        """Seconds of a step by the number of pictures in it, 0 .. the largest bucket; zeros before there was any."""
        return self._times.get(model, Pace()).step_s(buckets)

    def load_s(self, model: str, served: ModelStatus | None) -> float:
        """Seconds until steps of this model can be made. A model that has never been loaded takes as long as others."""
        usual_s = max(self._loads.values(), default=START_S)
        own_s = 0.0 if served is not None and served.loaded else self._loads.get(model, usual_s)
        if self._since is None:
            return own_s
        return max(0.0, self.start_s - (time.monotonic() - self._since))
