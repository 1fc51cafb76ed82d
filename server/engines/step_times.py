"""What is known of an engine's times: how long a step takes, by batch size, and how long a load or a start takes."""

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from server.worker.messages import ModelStatus, Step

START_S = 1.0  # of a process, before it begins to load
FADING = 0.9  # of the longest recent step, from one heartbeat to the next
NEWEST = 0.1  # the weight of the newest step in the mean of its batch size


@dataclass(slots=True)
class StepTimes:
    """Learned from what the engine reports."""

    start_s: float = 5.0  # of an engine with its models
    longest_s: float = 0.0  # the longest turn of recent ones, in which every loaded model makes a step
    _mean_s: dict[str, dict[int, float]] = field(default_factory=lambda: defaultdict(dict))  # by model and batch size
    _loads: dict[str, float] = field(default_factory=dict)  # seconds, by model that has been loaded
    _down_since: float | None = field(default_factory=time.monotonic)  # None while there is an engine

    def learn(self, steps: Sequence[Step], models: int) -> None:
        """These steps were taken on an engine with so many loaded models."""
        for step in steps:
            mean_s = self._mean_s[step.model]
            before = mean_s.get(step.bucket, step.seconds)
            mean_s[step.bucket] = before + NEWEST * (step.seconds - before)
        longest_s = max((step.seconds for step in steps), default=0.0)
        self.longest_s = max(longest_s * models, FADING * self.longest_s)

    def turn_s(self, models: Iterable[str]) -> float:
        """The longest turn that is to be expected while these models have work, however long ago their steps were."""
        known = sum(max(self._mean_s[model].values()) for model in models if model in self._mean_s)
        return max(self.longest_s, known)

    def started(self, models: Mapping[str, ModelStatus]) -> None:
        """An engine has become ready with these models."""
        loads = {name: status.load_s for name, status in models.items() if status.loaded}
        self._loads |= loads
        self.start_s, self._down_since = START_S + sum(loads.values()), None

    def loaded(self, name: str, status: ModelStatus) -> None:
        """A model has been loaded."""
        self._loads[name] = status.load_s

    def died(self) -> None:
        """There is no engine."""
        self._down_since = time.monotonic()

    def step_s(self, model: str, buckets: Sequence[int]) -> list[float]:
        """Seconds of a step by the number of pictures in it, 0 .. the largest bucket; zeros if none was seen.

        Pictures take what their bucket takes; between buckets that were seen it is interpolated.
        """
        counts, mean_s = range(buckets[-1] + 1), self._mean_s.get(model)
        if not mean_s:
            return [0.0 for _ in counts]
        seen = sorted(mean_s)
        times = np.interp(buckets, seen, [mean_s[bucket] for bucket in seen])
        by_count: list[float] = times[np.searchsorted(buckets, counts)].tolist()
        return by_count

    def load_s(self, model: str, status: ModelStatus | None) -> float:
        """Seconds until steps of this model can be made. A model that was never loaded is taken to load like others."""
        if self._down_since is not None:
            return max(0.0, self.start_s - (time.monotonic() - self._down_since))
        if status is not None and status.loaded:
            return 0.0
        return self._loads.get(model, max(self._loads.values(), default=START_S))
