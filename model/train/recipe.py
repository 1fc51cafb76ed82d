"""How to train: the numbers of a run, and the names of what it leaves, without a net or data."""

import math
from dataclasses import dataclass

STATE = "training.safetensors"  # in a model directory: all that a training needs to go on
SHEETS = "samples"  # in it too: a folder of pictures that the net has made
IMAGES = 640_000  # pictures to see, where neither they nor minutes are given
MOST_BATCH, MOST_CROPS = 1 << 16, 1 << 10
WARM_UP, WARM_UP_SHARE = 50, 1 / 30  # updates, and share of the training: the rate rises for the shorter


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How to train. Lengths are counted in pictures seen."""

    images: int | None = IMAGES  # None: as many as can be seen in the minutes
    batch: int = 64
    rate: float = 1e-3  # peak learning rate of AdamW: linear warm-up, then half a cosine down to 0
    warm_up: int | None = None  # None: those of 50 updates, but at most a thirtieth of the training
    emas: tuple[float, ...] = (0.999, 0.9995, 0.9999)  # decays of the averages; the best on held-out pictures is served
    max_norm: float = 1.0
    autocast: bool = False  # bfloat16 in the net; parameters, loss and state stay float32
    label_dropout: float = 0.1  # share of pictures that are shown without their label
    balance: float = 0.0  # 0: each picture is drawn as often as any other; 1: each label is
    flips: bool = False  # half of the pictures are mirrored, left to right
    crops: int = 0  # pixels by which a picture is moved at most, down and across; its edge is repeated
    minutes: float = math.inf  # of training in all: those of earlier runs that it goes on from count, too

    def __post_init__(self) -> None:
        for name in ("images", "batch", "warm_up"):
            if (number := getattr(self, name)) is not None and number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        if not 0 < self.rate < math.inf:
            raise ValueError(f"rate must be a positive number, got {self.rate}")
        if not self.minutes > 0:
            raise ValueError(f"minutes must be a positive number, got {self.minutes}")
        if self.images is None and self.minutes == math.inf:
            raise ValueError("images or minutes must say when the training ends")
        for name in ("label_dropout", "balance"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in 0..1, got {getattr(self, name)}")
        if not self.emas or not all(0 <= decay < 1 for decay in self.emas) or len({*self.emas}) < len(self.emas):
            raise ValueError(f"emas must be different numbers in 0..1, each below 1, got {self.emas}")
        if self.batch > MOST_BATCH:
            raise ValueError(f"batch must be at most {MOST_BATCH}, got {self.batch}")
        if not 0 <= self.crops <= MOST_CROPS:
            raise ValueError(f"crops must lie in 0..{MOST_CROPS}, got {self.crops}")

    def done(self, seen: int, seconds: float) -> float:
        """The part of the training that is done after so many pictures and seconds, from 0 to 1."""
        by_images = 0.0 if self.images is None else seen / self.images
        return min(1.0, max(by_images, seconds / (60 * self.minutes)))

    def rate_at(self, seen: int, seconds: float = 0.0) -> float:
        """The learning rate after so many pictures; if their number has no limit, after so many seconds."""
        done = min(1.0, seen / self.images) if self.images is not None else self.done(seen, seconds)
        if self.warm_up is None:
            warmth = max(seen / (WARM_UP * self.batch), done / WARM_UP_SHARE)
        else:
            warmth = seen / self.warm_up
        return self.rate * min(1.0, warmth) * 0.5 * (1 + math.cos(math.pi * done))


def ema_at(step: int, decay: float) -> float:
    """The decay of a moving average at an update: a short memory at first, while everything changes."""
    return float(min(decay, 1 - (1 + step) ** -0.75))
