"""Stage compiled: ours beside torch.compile, which takes a minute for every batch size and many for its best."""

import math
from collections.abc import Iterator
from functools import partial

from benchmarks.gpu.facts import Fact, Setting
from benchmarks.gpu.speed import OURS, Race
from benchmarks.gpu.stage import Part
from benchmarks.gpu.worlds import small

REDUCED, TUNED, TRACED = "torch.compile, reduce-overhead", "torch.compile, max-autotune", "torch.compile, eager"
TUNING_S = 300.0  # the least that max-autotune is begun with


def parts(setting: Setting) -> list[Part]:
    """The fast compiler first."""
    if setting.dry:
        race = Race(setting, "tiny net", small(setting), (1,), (1, 2), 0.01)
        race.begin(OURS, TRACED)
        return [partial(race.join, OURS, TRACED), partial(race.run, (1,), (OURS, TRACED)), race.end]
    race = Race(setting, "CIFAR-10 configuration", small(setting), (1, 64), (1, 2, 4, 8, 16, 32, 64), 0.1, math.inf)
    race.begin(OURS, REDUCED)
    return [
        partial(race.join, OURS, REDUCED),
        partial(race.run, (1,), (OURS, REDUCED)),
        partial(race.run, (64,), (OURS, REDUCED)),
        partial(race.end, REDUCED),
        *(partial(tuned, race, batch) for batch in race.batches),
        race.end,
    ]


def tuned(race: Race, batch: int) -> Iterator[Fact]:
    """Beside the compiler's best, if there is time for it."""
    if race.setting.left_s < TUNING_S:
        yield Fact(f"{race.title}, batch {batch}: {TUNED} left out", f"{race.setting.left_s:.0f} s are left", main=True)
        return
    if TUNED not in race.remotes:
        race.begin(TUNED)
        yield from race.join(TUNED)
    yield from race.run((batch,), (OURS, TUNED))
