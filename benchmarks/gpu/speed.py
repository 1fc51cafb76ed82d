"""Stage speed: milliseconds per step beside others, what matters most first; then batches that are always full.

Contenders load side by side, each in its own process, and nobody is timed before all have. One that fails is left out,
and says why in the log. Ours captures few batch sizes, but enough to choose its kernels about as a server does.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from benchmarks import full
from benchmarks.contenders import Setup
from benchmarks.engine import Trial, speed, warm
from benchmarks.gpu.facts import Fact, Setting
from benchmarks.gpu.stage import Part, each_by_itself
from benchmarks.gpu.worlds import device_of, facts_of, large, small
from benchmarks.remote import Remote

OURS, FREE, GRAPH = "ours", "ours, EXACT=0", "diffusers, bare CUDA graph"
HALF, PLAIN = "diffusers, bfloat16", "diffusers"
LOADING_S, ANSWER_S = 75.0, 30.0  # the longest that others are waited for
RACING_S = 45.0  # of the stage's time are kept for those that ours is held against
KEPT_S = 5.0  # of the stage's time are not spent on waiting


@dataclass(slots=True)
class Race:
    """The contenders of one model."""

    setting: Setting
    title: str
    directory: Path
    batches: tuple[int, ...]
    buckets: tuple[int, ...]  # that ours captures
    block_s: float
    answer_s: float = ANSWER_S
    remotes: dict[str, Remote] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where they run."""
        return device_of(self.setting)

    def _patience_s(self, most_s: float) -> float:
        return max(1.0, min(most_s, self.setting.left_s - KEPT_S))

    def begin(self, *names: str) -> None:
        """These begin to load. What promises nothing captures only the batches that are timed."""
        threads = 1 if self.setting.dry else 0  # two would wait for each other where there is other work
        for name in names:
            buckets = self.batches if name == FREE else self.buckets
            setup = Setup(self.directory, self.device, max(buckets), buckets, threads)
            self.remotes[name] = Remote.start(name, setup)

    def join(self, *names: str) -> Iterator[Fact]:
        """These are waited for. Who cannot be loaded is left out; raises RuntimeError if nobody can."""
        for name in names:
            remote = self.remotes[name]
            try:
                ours_s = self.setting.left_s - RACING_S  # without it nobody else is worth a number
                remote.patience_s = self._patience_s(max(LOADING_S, ours_s) if name == OURS else LOADING_S)
                yield Fact(f"{self.title}: {name}, loaded in", remote.answer(), "s")
                remote.patience_s = self._patience_s(self.answer_s)
                if name in (OURS, FREE):
                    yield Fact(f"{self.title}: {name}, kernels", remote.ask("kernels"))
            except RuntimeError as error:
                yield Fact(f"{self.title}: {name} left out", str(error)[:300])
                remote.end()
                del self.remotes[name]
        if not self.remotes.keys() & set(names):
            raise RuntimeError(f"none of {', '.join(names)} could be loaded")

    def run(self, batches: Sequence[int], names: Sequence[str]) -> Iterator[Fact]:
        """Milliseconds per step of these, those left out excepted, and how many times faster ours is."""
        for batch in batches:  # each by itself, so that no contender warms up before the first number
            trial = Trial(self.title, self.directory, (batch,), self.block_s, 3)
            there = [self.remotes[name] for name in names if name in self.remotes]
            for remote in there:
                remote.patience_s = self._patience_s(self.answer_s)
            yield from facts_of(speed(trial, list(warm(there, trial))), [": ours"])

    def replays(self, batches: Sequence[int]) -> Iterator[Fact]:
        """What the GPU takes for a step when the next one always waits already."""
        for batch in batches if self.device.type == "cuda" else ():
            name = f"{self.title}, batch {batch}: ours, a replay behind another"
            yield Fact(name, self.remotes[OURS].ask("replay", batch), "ms")

    def nodes(self, batches: Sequence[int]) -> Iterator[Fact]:
        """Kernels and copies of a step, as a profiler sees them."""
        for batch in batches if self.device.type == "cuda" else ():
            name = f"{self.title}, batch {batch}: ours, nodes"
            yield Fact(name, self.remotes[OURS].ask("nodes", batch), "per step")

    def memory(self) -> Iterator[Fact]:
        """The most memory that each has held."""

        def of_one(name: str) -> Iterator[Fact]:
            yield Fact(f"{self.title}: {name}, memory", self.remotes[name].ask("memory") / 2**20, "MiB at most")

        yield from each_by_itself(list(self.remotes), of_one)

    def always_full(self, batch: int, block_s: float) -> Iterator[Fact]:
        """Requests of 50 and of 20 steps in a batch that is always full, beside those of 1000."""
        found = self.remotes[OURS].ask("full", batch, block_s)
        yield from facts_of(full.compare(self.title, batch, found), [" against "])

    def end(self, *names: str) -> Iterator[Fact]:
        """These, or all, make room."""
        for name in names or list(self.remotes):
            if remote := self.remotes.pop(name, None):
                remote.end()
        yield from ()


def parts(setting: Setting) -> list[Part]:
    """The net of 32 x 32 pixels, then the one of 256 x 256. Nobody loads while somebody is timed."""
    if setting.dry:
        return dry_parts(setting)
    first = Race(setting, "CIFAR-10 configuration", small(setting), (1, 64), (1, 2, 4, 8, 16, 32, 64, 256), 0.1)
    first.begin(OURS, GRAPH)
    second = Race(setting, "256 x 256 configuration", large(setting), (1, 8), (1, 2, 4, 8), 0.2)
    return [
        partial(first.join, OURS, GRAPH),
        partial(first.run, (1, 64), (OURS, GRAPH)),
        partial(first.always_full, 64, 0.3),
        partial(first.replays, (1, 64)),
        *begin_later(first, FREE, HALF, PLAIN),
        partial(first.run, (1, 64), (OURS, FREE)),
        partial(first.run, (1, 64), (OURS, HALF, PLAIN)),
        partial(first.run, (256,), (OURS, GRAPH, HALF, PLAIN)),
        first.memory,
        partial(first.end, GRAPH, FREE, HALF, PLAIN),
        *begin_later(second, OURS, GRAPH, HALF, PLAIN),
        partial(second.run, (1, 8), (OURS, GRAPH)),
        partial(second.replays, (1, 8)),
        partial(second.run, (1, 8), (OURS, HALF, PLAIN)),
        second.memory,
        partial(second.nodes, (1, 8)),
        partial(first.nodes, (1, 64)),
        first.end,
        second.end,
    ]


def dry_parts(setting: Setting) -> list[Part]:
    """Each kind of part once, of tiny nets."""
    first = Race(setting, "tiny net", small(setting), (1, 4), (1, 4), 0.01)
    second = Race(setting, "larger tiny net", large(setting), (1,), (1, 2), 0.01)
    first.begin(OURS, FREE, PLAIN)
    return [
        partial(first.join, OURS, FREE),
        partial(first.run, (1, 4), (OURS, FREE)),
        partial(first.always_full, 4, 0.01),
        partial(first.join, PLAIN),
        partial(first.run, (1,), (OURS, PLAIN)),
        first.memory,
        first.end,
        *begin_later(second, OURS),
        partial(second.run, (1,), (OURS,)),
        second.end,
    ]


def begin_later(race: Race, *names: str) -> list[Part]:
    """Contenders that begin when the part is reached."""

    def load() -> Iterator[Fact]:
        race.begin(*names)
        yield from race.join(*names)

    return [load]
