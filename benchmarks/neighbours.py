"""Whether a picture of diffusers' `DDPMPipeline` depends on the batch that it is made in, with a generator of its own.

    python -m benchmarks.neighbours [--steps 10]

Neighbour independence: at one batch size a picture has the same bits, whatever is beside it and wherever it stands.
Batch invariance: it has the same bits at every batch size. Float32 on a CPU, as the pipeline comes; ours, as the server
runs it, is in `exactness.py`.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from numpy.typing import NDArray

from benchmarks.measure import Measure, report
from benchmarks.models import model_directory
from server.worker.cpus import cores

DIGITS = Path(__file__).parent / "digits"
BATCH = 8
Pictures = NDArray[np.float32]  # [N, H, W, C] in [0, 1]


def pictures(pipe: Any, seeds: Sequence[int], steps: int) -> Pictures:
    """One batch of the pipeline, with a generator for each seed."""
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    made = pipe(len(seeds), generators, num_inference_steps=steps, output_type="np").images
    return np.asarray(made, np.float32)


def compared(name: str, given: Pictures, expected: Pictures) -> Iterator[Measure]:
    """How much of some pictures differs from the same ones made otherwise."""
    given_bytes, expected_bytes = ((255 * each).round().astype(np.uint8) for each in (given, expected))
    yield Measure(f"{name}: floats that differ", 100 * float((given != expected).mean()), "%")
    yield Measure(f"{name}: furthest apart", 255 * float(np.abs(given - expected).max()), "grey levels")
    yield Measure(f"{name}: bytes that differ", int((given_bytes != expected_bytes).sum()), f"of {given.size}")


def measures(digits: Path, steps: int) -> Iterator[Measure]:
    """Everything this file measures."""
    for name in ("digits", "CIFAR-10 configuration"):
        with model_directory(name, digits) as directory:
            net = UNet2DModel.from_pretrained(directory, low_cpu_mem_usage=False)
            pipe: Any = DDPMPipeline(net, DDPMScheduler.from_pretrained(directory))
        pipe.set_progress_bar_config(disable=True)
        seeds = range(BATCH)
        batch = pictures(pipe, seeds, steps)
        name = f"{name}, {BATCH} pictures of {steps} steps"
        yield from compared(f"{name}: alone again", pictures(pipe, [0], steps), pictures(pipe, [0], steps))
        moved = pictures(pipe, [*range(100, 100 + BATCH // 2), *seeds[: BATCH // 2]], steps)[BATCH // 2 :]
        yield from compared(f"{name}: other neighbours and places", moved, batch[: BATCH // 2])
        yield from compared(f"{name}: alone", np.concatenate([pictures(pipe, [s], steps) for s in seeds]), batch)


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("build/neighbours.jsonl"), help="(default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(cores())
    report(measures(DIGITS, args.steps), args.out)


if __name__ == "__main__":
    main()
