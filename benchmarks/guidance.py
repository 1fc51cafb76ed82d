"""What labels and guidance cost: pictures of a conditional net beside those of the same net without labels.

    python -m benchmarks.guidance [MODEL] [--gpu] [--steps 50] [--rounds 15]

One picture alone, and a full batch: in turns, in one process. A guided picture takes two slots.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file

from benchmarks.measure import Measure, interleaved, median_ratio, report
from benchmarks.models import grow_up
from model.checkpoint.card import WEIGHTS, read_card
from model.checkpoint.load import load_model
from model.engine.engine import Engine
from model.engine.events import Request
from model.engine.runner import prepared
from model.sampling.plan import plan, resolve
from server.worker.cpus import cores
from server.worker.device import choose_dtype

DIGITS = Path(__file__).parent.parent / "weights" / "digits"
SLOTS = 8


def without_labels(model: Path, out: Path) -> Path:
    """The same net as an unconditional one."""
    config = json.loads((model / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"num_class_embeds": None, "class_embed_type": None}))
    (out / "scheduler_config.json").write_text((model / "scheduler_config.json").read_text())
    kept = {name: each for name, each in load_file(model / WEIGHTS).items() if not name.startswith("class_embedding.")}
    save_file(kept, out / WEIGHTS)
    return out


@dataclass(frozen=True, slots=True)
class World:
    """An engine, and how to ask it for pictures."""

    engine: Engine
    steps: int

    @classmethod
    def of(cls, directory: Path, device: torch.device, steps: int) -> "World":
        """An engine for this model, with all its batch sizes."""
        torch.set_num_threads(cores())
        model = load_model(read_card(directory), device, choose_dtype("auto", device))
        grow_up(model, SLOTS)
        torch.set_num_threads(1)
        return cls(Engine(prepared(model, SLOTS)), steps)

    def make(self, count: int, labels: tuple[int, ...] = ()) -> None:
        """So many pictures at once. labels: what the net is told of each, in each of its slots"""
        process = self.engine.runner.model.card.process
        choice = resolve(process, "ddpm", self.steps)
        table = plan(process, replace(choice, guidance=2.0) if len(labels) > 1 else choice)
        for seed in range(count):
            self.engine.submit(Request(seed, seed, table, labels=labels))
        while self.engine.busy:
            self.engine.step()


def measures(model: Path, device: torch.device, steps: int, rounds: int) -> Iterator[Measure]:
    """The cost of a label, and of guidance, for one picture and in a full batch."""
    labels = read_card(model).labels
    assert labels is not None and labels.null is not None
    with TemporaryDirectory() as folder:
        plain = World.of(without_labels(model, Path(folder)), device, steps)
    conditional, label, null = World.of(model, device, steps), labels.choices[0], labels.null
    for count in (1, SLOTS):
        contenders = {
            "unconditional": partial(plain.make, count),
            "labelled": partial(conditional.make, count, (label,)),
            "guided": partial(conditional.make, max(1, count // 2), (label, null)),
        }
        seconds = interleaved(contenders, rounds)
        taken = f"{model.name}, {steps} steps of ddpm, {'alone' if count == 1 else f'{count} slots'}"
        ratio, spread = median_ratio(seconds["labelled"], seconds["unconditional"])
        yield Measure(f"{taken}: a picture with a label / of the net without labels", ratio, "x", spread)
        pictures = count / max(1, count // 2)
        each = [second * pictures for second in seconds["guided"]]
        ratio, spread = median_ratio(each, seconds["labelled"])
        yield Measure(f"{taken}: a guided picture / one with a label", ratio, "x", spread)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=DIGITS, help="a conditional model (default: digits)")
    parser.add_argument("--gpu", action="store_true", help="on the first GPU (default: on the CPU)")
    parser.add_argument("--steps", type=int, default=50, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("build/guidance.jsonl"), help="(default: %(default)s)")
    args = parser.parse_args()
    device = torch.device("cuda" if args.gpu else "cpu")
    report(measures(args.model, device, args.steps, args.rounds), args.out)


if __name__ == "__main__":
    main()
