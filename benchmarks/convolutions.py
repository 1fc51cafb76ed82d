"""Every kind of convolution of a net on a GPU, by cuDNN and by the invariant kernel: whether cuDNN's bits depend on the
batch, and what either takes, inside a CUDA graph as in a step. Attention, free and pinned to one kernel, stands beside.

    python -m benchmarks.convolutions MODEL_DIRECTORY
"""

import argparse
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.measure import Measure, machine
from model.card import read_card
from model.checkpoint import load_model
from model.exact_kernels import Kind, Layer, agrees, kinds
from model.kernels import Conv
from model.runner import denoise, usual_buckets
from model.slots import Slots

BATCHES = (1, 8, 64)
CALLS, ROUNDS = 20, 9  # calls to a graph, and replays that are timed


def microseconds(layer: Layer, x: Tensor) -> float:
    """One call among many in a graph: the median of all replays. The weights stay in the cache, unlike in a step."""
    layer(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            layer(x)
    took: list[float] = []
    for _ in range(ROUNDS + 1):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        took.append(start.elapsed_time(stop) * 1000 / CALLS)
    return statistics.median(took[1:])


def compare(kind: Kind, buckets: list[int]) -> tuple[bool, dict[bool, list[float]]]:
    """Whether the library's bits are the same in all buckets, and microseconds in each of BATCHES, by either kernel."""
    layer, generator = kind.layers[0], torch.Generator(kind.like.device).manual_seed(0)
    x = kind.inputs(max(buckets), generator)
    layer.invariant = False
    same = agrees(layer, x, layer(x), buckets, generator)
    took = {}
    for invariant in (False, True):
        layer.invariant = invariant
        took[invariant] = [microseconds(layer, kind.inputs(batch, generator)) for batch in BATCHES]
    layer.invariant = False
    return same, took


def measures(directory: Path) -> Iterator[Measure]:
    """Prints a line for every kind of layer; gives what they sum up to in the whole net."""
    device = torch.device("cuda", torch.cuda.current_device())
    dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    model = load_model(read_card(directory), device, dtype)
    slots = Slots(1, model.card.architecture.shape, model.card.process.schedule.T, device)
    sums = {name: [0.0] * len(BATCHES) for name in ("library", "invariant", "chosen")}
    print(f"microseconds by library / invariant kernel, in batches of {BATCHES}")
    for kind in kinds(model.net, lambda: denoise(model.net, model.table, slots, 1)):
        same, took = compare(kind, usual_buckets(max(BATCHES)))
        name = f"{'Conv' if isinstance(kind.layers[0], Conv) else 'Attention'}({kind.layers[0].extra_repr()})"
        pairs = "  ".join(f"{a:.1f} / {b:.1f}" for a, b in zip(took[False], took[True], strict=True))
        bits = "same" if same else "differ"
        print(f"{bits:7}{len(kind.layers):3} x  {pairs:48}{list(kind.like.shape[1:])} {name}", flush=True)
        for which, times in (("library", took[False]), ("invariant", took[True]), ("chosen", took[not same])):
            sums[which] = [a + len(kind.layers) * b for a, b in zip(sums[which], times, strict=True)]
    for which, times in sums.items():
        for batch, time in zip(BATCHES, times, strict=True):
            yield Measure(f"convolutions and attention of a step, batch {batch}, {which}", time, "us")


def main() -> None:
    """Compares all layers of a model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="a model directory")
    args = parser.parse_args()
    print(machine())
    with torch.inference_mode():
        for measure in measures(args.directory):
            print(measure.line())


if __name__ == "__main__":
    main()
