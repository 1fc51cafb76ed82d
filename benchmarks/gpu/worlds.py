"""Where the stages measure, and what: the first GPU and the nets that people serve, or, dry, the CPU and a tiny net."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from benchmarks.gpu.facts import Fact, Setting
from benchmarks.gpu.run import ROOT
from benchmarks.measure import Measure
from benchmarks.models import CIFAR10, LARGE, TINY, random_model

DIGITS = ROOT / "benchmarks" / "digits"


def device_of(setting: Setting) -> torch.device:
    """What is measured."""
    return torch.device("cpu") if setting.dry else torch.device("cuda", torch.cuda.current_device())


def _made(setting: Setting, name: str, config: dict[str, object]) -> Path:
    directory = Path(setting.scratch) / name
    return directory if directory.exists() else random_model(directory, config)


def tiny(setting: Setting) -> Path:
    """The smallest net."""
    return _made(setting, "tiny", TINY)


def small(setting: Setting) -> Path:
    """The CIFAR-10 configuration, or the smallest net."""
    return tiny(setting) if setting.dry else _made(setting, "cifar10", CIFAR10)


def large(setting: Setting) -> Path:
    """The 256 x 256 configuration, or a net hardly larger than the smallest."""
    return _made(setting, "large", TINY | {"sample_size": 16} if setting.dry else LARGE)


def facts_of(measures: Iterable[Measure], main: Iterable[str] = ()) -> Iterator[Fact]:
    """Measures as facts. main: words of which one is in the name of those that matter most"""
    words = tuple(main)
    for measure in measures:
        matters = any(word in measure.name for word in words)
        yield Fact(measure.name, measure.value, measure.unit, measure.spread, main=matters)
