"""The losses of Su's article (kexue.fm/archives/9119) before its reduction of variance, eq. 11, and after it, eq. 15.

    python -m benchmarks.losses benchmarks/digits.npz --curve docs/pictures/losses.svg

The same small net learns from the same pictures, levels t and noisy pictures by each loss. F is what the net says, the
noise of the whole x_t as in Ho's paper: the article's first eps_theta is (beta_t / beta_bar_t) F. Its two independent
kinds of noise are eps, that of x_t, and omega; the noise of the last step is eps_t of eq. 12. Averaged over omega the
loss before is the one between, eq. 14, and a constant: the same gradient with less variance. After it, the article
drops the factor, too. All are compared by || eps - F ||² on pictures that were held out.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from benchmarks.curves import draw
from benchmarks.measure import Measure, machine
from model.nets.config import Architecture
from model.sampling.schedule import FloatArray, NoiseSchedule, Process, su_2022
from model.train.data import Pictures
from model.train.recipe import Recipe
from model.train.source import find
from model.train.trainer import Trainer

SCHEDULE = su_2022()
NET = Architecture(
    height=32,
    width=32,
    in_channels=1,
    out_channels=1,
    block_out_channels=(16, 32, 32),
    down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    norm_num_groups=8,
)
BATCH, POINTS, PROBES = 32, 12, 64  # pictures of an update, points of a curve, and held-out pictures
AVERAGE = 0.999  # the moving average that is compared
GRADIENTS = 32  # of which a variance is taken
LEVELS = (None, 10, 100, 500)  # t for which it is taken; None: all

Loss: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (eps, omega, F, beta_t / beta_bar_t) -> [B]


def _mean(x: Tensor) -> Tensor:
    return x.square().mean(dim=(1, 2, 3))


def before(eps: Tensor, omega: Tensor, out: Tensor, ratio: Tensor) -> Tensor:
    """Eq. 11: || eps_t - (beta_t / beta_bar_t) F ||². alpha_t beta_bar_(t-1) / beta_bar_t is what is left of 1."""
    eps_t = ratio * eps - (1 - ratio.square()).sqrt() * omega  # eq. 12
    return _mean(eps_t - ratio * out)


def between(eps: Tensor, omega: Tensor, out: Tensor, ratio: Tensor) -> Tensor:
    """Eq. 14: (beta_t / beta_bar_t)² || eps - F ||²"""
    return _mean(ratio * (eps - out))


def after(eps: Tensor, omega: Tensor, out: Tensor, ratio: Tensor) -> Tensor:
    """Eq. 15: || eps - F ||²"""
    return _mean(eps - out)


def ratios(schedule: NoiseSchedule) -> FloatArray:
    """beta_t / beta_bar_t, which is 1 at t = 1; there is none at 0. [T + 1]"""
    alpha = schedule.alpha_bar[1:] / schedule.alpha_bar[:-1]
    found: FloatArray = np.concatenate([[1.0], np.sqrt(1 - alpha**2) / schedule.beta_bar[1:]])
    return found


LOSSES: dict[str, Loss] = {"before": before, "between": between, "after": after}
NAMES = {"before": "eq. 11", "between": "eq. 14", "after": "eq. 15"}


class Lesson:
    """A net that learns by one of the losses."""

    def __init__(self, pictures: Pictures, loss: Loss, images: int) -> None:
        recipe = Recipe(images=images, batch=BATCH, warm_up=max(1, images // 20), emas=(AVERAGE,), max_norm=math.inf)
        self.pictures, self.loss = pictures, loss
        self.trainer = Trainer(NET, Process(SCHEDULE), recipe, "cpu")
        self.ratio = torch.tensor(ratios(SCHEDULE), dtype=torch.float32)  # [T + 1]

    def losses(self, step: int, loss: Loss, level: int | None = None) -> Tensor:
        """The loss of each picture of an update's batch, always of the same pictures, levels and noise. -> [B]

        level: t of all, instead of levels from 1 to T
        """
        torch.manual_seed(step + 1)
        x0, t, eps = self.trainer.prepared(self.pictures.draw(step, BATCH)[0])
        t = t if level is None else torch.full_like(t, level)
        omega = torch.randn(eps.shape)
        out = self.trainer.predict(self.trainer.noised(x0, t, eps), t, None)
        return loss(eps, omega, out, self.ratio[t].view(-1, 1, 1, 1))

    def held_out(self) -> float:
        """|| eps - F ||² of the moving average, over all levels."""
        pictures, _ = self.pictures.probes()
        (found,) = self.trainer.held_out_losses(pictures[:PROBES]).values()
        return sum(found.values()) / len(found)

    def run(self) -> Iterator[tuple[int, float]]:
        """(pictures seen, held-out loss) now and then."""
        images = self.trainer.recipe.images
        assert images is not None
        every = max(1, images // BATCH // POINTS)
        while self.trainer.seen < images:
            self.trainer.descend(self.losses(self.trainer.step, self.loss).mean(), BATCH)
            if self.trainer.step % every == 0:
                yield self.trainer.seen, self.held_out()

    def variance(self, loss: Loss, level: int | None) -> tuple[float, float]:
        """The variance of a picture's loss, and of the gradient of a batch's, summed over the parameters; for this net
        as it is, at one t or at all."""
        total = squares = torch.zeros(())
        losses = list[Tensor]()
        for step in range(GRADIENTS):
            each = self.losses(step, loss, level)
            parts = torch.autograd.grad(each.mean(), list(self.trainer.net.parameters()))
            gradient = torch.cat([part.flatten() for part in parts]).double()
            total, squares = total + gradient, squares + gradient.square()
            losses.append(each.detach())
        spread = (squares - total.square() / GRADIENTS) / (GRADIENTS - 1)
        return float(torch.cat(losses).double().var()), float(spread.sum())


def measures(pictures: Pictures, images: int, curve: Path | None) -> Iterator[Measure]:
    """Trains with each loss, draws the curves, and compares variances at the net that the last one has made."""
    curves, seen = dict[str, list[float]](), list[int]()
    for name, loss in LOSSES.items():
        lesson = Lesson(pictures, loss, images)
        points = list(lesson.run())
        seen, curves[NAMES[name]] = [at for at, _ in points], [found for _, found in points]
        yield Measure(f"{name}: held-out loss after {seen[-1]} pictures", points[-1][1], "")
    if curve is not None:
        curve.write_text(draw("Held-out loss by the loss that is minimised", "loss", seen, curves))
    for level in LEVELS:
        found = zip(lesson.variance(before, level), lesson.variance(between, level), strict=True)
        of_loss, of_gradient = (first / second for first, second in found)
        where = "" if level is None else f", t = {level}"
        yield Measure(f"variance of a picture's loss, before against averaged{where}", of_loss, "times")
        yield Measure(f"variance of a batch's gradient, before against averaged{where}", of_gradient, "times")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path, help="grey pictures of up to 32 x 32, such as benchmarks/digits.npz")
    parser.add_argument("--images", type=int, default=20_000, help="pictures that each net sees (%(default)s)")
    parser.add_argument("--curve", type=Path, help="an SVG to write: held-out loss over pictures seen")
    args = parser.parse_args()
    print(machine(), flush=True)
    for measure in measures(Pictures(find(args.pictures), NET), args.images, args.curve):
        print(measure.line(), flush=True)


if __name__ == "__main__":
    main()
