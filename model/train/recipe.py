"""How to train: the numbers of a run, without a net or data."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How to train. Lengths are counted in pictures seen."""

    images: int = 640_000
    batch: int = 64
    rate: float = 1e-3  # peak learning rate of AdamW: linear warm-up, then half a cosine down to 0
    warm_up: int = 20_000
    emas: tuple[float, ...] = (
        0.999,
        0.9995,
        0.9999,
    )  # decays of the moving averages; the best on held-out pictures is kept
    max_norm: float = 1.0
    autocast: bool = False  # bfloat16 in the net; parameters, loss and state stay float32
    label_dropout: float = 0.1  # share of pictures that are shown without their label
    balance: float = 0.0  # 0: each picture is drawn as often as any other; 1: each label is
    flips: bool = False  # half of the pictures are mirrored, left to right
    crops: int = 0  # pixels by which a picture is moved at most, down and across; its edge is repeated
    minutes: float = math.inf  # after which it stops, even before all pictures have been seen

    def __post_init__(self) -> None:
        for name in ("images", "batch", "warm_up"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.rate < math.inf:
            raise ValueError(f"rate must be a positive number, got {self.rate}")
        if not self.minutes > 0:
            raise ValueError(f"minutes must be a positive number, got {self.minutes}")
        for name in ("label_dropout", "balance"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in 0..1, got {getattr(self, name)}")
        if not self.emas or not all(0 <= decay < 1 for decay in self.emas) or len({*self.emas}) < len(self.emas):
            raise ValueError(f"emas must be different numbers in 0..1, each below 1, got {self.emas}")
        if self.crops < 0:
            raise ValueError(f"crops must be at least 0, got {self.crops}")

    def rate_at(self, seen: int) -> float:
        """The learning rate after `seen` pictures."""
        progress = min(1.0, seen / self.images)
        return self.rate * min(1.0, seen / self.warm_up) * 0.5 * (1 + math.cos(math.pi * progress))


def ema_at(step: int, decay: float) -> float:
    """The decay of a moving average at an update: a short memory at first, while everything changes."""
    return float(min(decay, 1 - (1 + step) ** -0.75))
