"""How good are the emoji? A small judge of groups, distances to the nearest pictures of the training, and a sheet.

    python -m benchmarks.emoji [MODEL] [--sheet samples.png]

The judge learns from the pictures that the model was trained on, and is itself measured on those that neither has seen.
Of each made picture the nearest training picture is looked for, as of each held-out one: a model that only copies has
smaller distances. Most emoji of people exist in several tones of skin, so that held-out pictures have near ones, too.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.distance import Gaussian, alike, distance
from benchmarks.measure import Measure, machine
from benchmarks.quality import engine_of
from model.checkpoint.card import ModelCard, read_card
from model.engine.events import Finished, Request
from model.sampling.plan import plan, resolve
from model.sampling.schedule import FloatArray, IntArray
from model.train.data import Uint8Array, held_out, load_dataset
from server.worker.device import choose_dtype

ROOT = Path(__file__).parent.parent
EPOCHS, BATCH, RATE = 12, 64, 2e-3  # of the judge: a minute on one core
ACROSS = 12  # pictures of each group on the sheet


class Judge(nn.Module):
    """Four convolutions, each halving the picture, and one dense layer. [B, 3, 32, 32] in [0, 1] -> [B, groups]"""

    def __init__(self, groups: int, widths: tuple[int, ...] = (24, 48, 64, 64)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inside, outside in zip((3, *widths), widths, strict=False):
            layers += [nn.Conv2d(inside, outside, 3, padding=1, bias=False), nn.MaxPool2d(2)]
            layers += [nn.BatchNorm2d(outside), nn.ReLU()]
        self.features = nn.Sequential(*layers)  # -> [B, 64, 2, 2]
        self.out = nn.Linear(widths[-1] * 4, groups)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.out(self.features(x).flatten(1))
        return logits


def train(pictures: Tensor, labels: Tensor) -> Judge:
    """A judge of these pictures, always the same. pictures: [N, 3, 32, 32] uint8, labels: [N]"""
    torch.manual_seed(0)
    net = Judge(int(labels.max()) + 1)
    optimizer = torch.optim.AdamW(net.parameters(), RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=EPOCHS * (len(labels) // BATCH))
    weight = 1 / torch.bincount(labels).float().sqrt()  # people are more than half of all
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(labels))[: len(labels) // BATCH * BATCH].split(BATCH):
            x = pictures[chosen].float() / 255
            x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(3), x)
            loss = F.cross_entropy(net(x), labels[chosen], weight, label_smoothing=0.05)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
    return net.eval()


@dataclass(frozen=True, slots=True)
class Seen:
    """What a judge sees in pictures."""

    named: IntArray  # [N] the likeliest group
    features: FloatArray  # [N, 64] float64


@torch.inference_mode()
def look(net: Judge, pictures: Tensor) -> Seen:
    """pictures: [N, 3, 32, 32] uint8"""
    features = torch.cat([net.features(part.float() / 255) for part in pictures.split(256)])  # [N, 64, 2, 2]
    named = net.out(features.flatten(1)).argmax(1)
    return Seen(named.numpy(), features.double().mean((2, 3)).numpy())


def nearest(pictures: Tensor, among: Tensor) -> FloatArray:
    """The distance of each picture to the nearest of others, root mean square over pixels in [0, 1]. -> [N]"""
    a, b = (each.flatten(1).double() / 255 for each in (pictures, among))
    squares = torch.cdist(a, b).min(1).values
    distances: FloatArray = (squares / a.shape[1] ** 0.5).numpy()
    return distances


def make(card: ModelCard, labels: list[int], steps: int, guidance: float) -> Uint8Array:
    """A picture of each of these labels, of the seeds 0, 1, ... -> [N, 3, H, W]"""
    assert card.labels is not None and card.labels.null is not None
    choice = resolve(card.process, "ddpm", steps)
    guided = guidance != 1
    table = plan(card.process, replace(choice, guidance=guidance) if guided else choice)
    engine, pictures = engine_of(card, choose_dtype("auto", torch.device("cpu")), 16), dict[int, Uint8Array]()
    for seed, label in enumerate(labels):
        told = (label, card.labels.null) if guided else (label,)
        engine.submit(Request(seed, seed, table, labels=told))
    while engine.busy:
        for event in engine.step():
            assert isinstance(event, Finished) and isinstance(event.id, int), event
            pictures[event.id] = event.picture
    return np.stack([pictures[seed] for seed in range(len(labels))]).transpose(0, 3, 1, 2)


def sheet(pictures: Uint8Array, groups: int, scale: int = 2) -> Image.Image:
    """The first pictures of each group, a row for each. pictures: [N, 3, H, W], of the groups 0, 1, ... in turns"""
    rows = [np.concatenate(list(pictures[group::groups][:ACROSS]), axis=2) for group in range(groups)]
    whole = np.concatenate(rows, axis=1).transpose(1, 2, 0)
    return Image.fromarray(whole.repeat(scale, 0).repeat(scale, 1))


def measures(card: ModelCard, made: Uint8Array, wanted: IntArray, data: Path) -> Iterator[Measure]:
    """What the judge sees in the made pictures beside held-out ones, and how near both are to what was trained on. Each
    group counts alike, among real pictures too, more than half of which are people."""
    dataset = load_dataset(data, card.shape)
    assert dataset.labels is not None
    images, labels = torch.from_numpy(dataset.images), dataset.labels
    known, unknown = held_out(len(images))
    net, pictures = train(images[known], torch.from_numpy(labels[known])), torch.from_numpy(made)
    target = Gaussian.of(look(net, images[known]).features, alike(labels[known]))
    for name, some, groups in (("held-out", images[unknown], labels[unknown]), ("made", pictures, wanted)):
        seen, weights = look(net, some), alike(groups)
        right = seen.named == groups
        yield Measure(f"{name} emoji: the group they are of", float(np.average(right, weights=weights)), "share")
        for group, title in enumerate(dataset.names):
            yield Measure(f"{name} emoji: {title}", float(right[groups == group].mean()), "share")
        order = np.random.default_rng(0).permutation(len(groups))
        far = distance(seen.features[order], target, groups[order])
        yield Measure(f"{name} emoji: Fréchet distance to those trained on", far.corrected, f"± {far.error:.3f}")
        apart = nearest(some, images[known])
        low, median, high = np.quantile(apart, (0.1, 0.5, 0.9), weights=weights, method="inverted_cdf")
        title = f"{name} emoji: distance to the nearest that was trained on, median and 10 to 90 %"
        yield Measure(title, float(median), "rms of [0, 1]", (float(low), float(high)))


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=ROOT / "weights" / "emoji", help="(default: emoji)")
    parser.add_argument(
        "--data", type=Path, default=ROOT / "benchmarks" / "emoji.npz", help="(default: the repository's)"
    )
    parser.add_argument("--pictures", type=int, default=900, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="of ddpm (default: %(default)s)")
    parser.add_argument("--guidance", type=float, help="(default: the model's own)")
    parser.add_argument("--sheet", type=Path, help="a PNG to write: some of each group")
    args = parser.parse_args()
    card = read_card(args.model)
    assert card.labels is not None
    guidance, groups = card.labels.guidance if args.guidance is None else args.guidance, len(card.labels.choices)
    if args.pictures < groups:
        raise SystemExit(f"--pictures must be at least one of each group, {groups}, got {args.pictures}")
    print(machine())
    print(json.dumps({"model": {"name": card.name, "digest": card.digest, "guidance": guidance, "steps": args.steps}}))
    wanted = np.arange(args.pictures) % groups
    made = make(card, wanted.tolist(), args.steps, guidance)
    if args.sheet:
        sheet(made, groups).save(args.sheet, optimize=True)
    for measure in measures(card, made, wanted, args.data):
        print(measure.line(), flush=True)


if __name__ == "__main__":
    main()
