"""Every kind of convolution of a net on a GPU, by cuDNN and by the invariant kernel: whether cuDNN's bits depend on the
batch, and what either takes, inside a CUDA graph as in a step. Attention, free and pinned to one kernel, stands beside.

    python -m benchmarks.convolutions MODEL_DIRECTORY
"""

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks.measure import Measure, machine, seconds_of
from model.checkpoint.card import read_card
from model.checkpoint.load import Model, load_layers
from model.engine.runner import usual_buckets
from model.engine.slots import Slots
from model.engine.step import denoise
from model.kernels.gpu import prepare_gpu
from model.nets.convolution import Conv
from model.nets.exact import Kind, agrees, kinds
from model.nets.layers import SelfAttention
from server.worker.device import choose_dtype

BATCHES = (1, 8, 64)
CALLS, ROUNDS = 20, 9  # calls to a graph, and replays that are timed


def microseconds(call: Callable[[], object], device: torch.device) -> float:
    """One call among many in a graph: the median of all replays. The weights stay in the cache, unlike in a step."""
    call()
    if device.type == "cpu":
        return 1e6 * seconds_of(call, device, CALLS)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    took: list[float] = []
    for _ in range(ROUNDS + 1):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        took.append(start.elapsed_time(stop) * 1000 / CALLS)
    return statistics.median(took[1:])


def name_of(kind: Kind) -> str:
    """What a kind of layer is, in words and numbers."""
    layer, given, (channels, height, width) = kind.layers[0], kind.given, kind.given.x.shape[1:]
    if not isinstance(layer, Conv):
        return f"attention of {channels // 3} on {height} x {width}, {layer.extra_repr()}"
    how = {"stride 2": layer.stride[0] == 2, "doubled": layer.doubled, "below": layer.below}
    how |= {"adds a picture": bool(given.added) and given.shortcut is None, "context for a norm": not given.whole}
    words = "".join(f", {word}" for word, holds in how.items() if holds)
    if given.shortcut is not None:
        words += f", adds a projection of {' and '.join(str(each.shape[1]) for each in given.added)}"
    kernel = " x ".join(map(str, layer.kernel_size))
    return f"{kernel} from {channels} to {layer.out_channels} on {height} x {width}{words}"


def kinds_of(model: Model) -> list[Kind]:
    """All kinds of layers of a net, as they are called if all that can be are computed by our kernels."""
    device = model.table.device
    if device.type == "cuda":
        prepare_gpu(True, model.table.dtype)  # or the library would be judged by what a server never does
    slots = Slots(1, model.card.shape, model.card.process.schedule.T, device)
    layers = [module for module in model.module.modules() if isinstance(module, Conv | SelfAttention)]
    for layer in layers:
        layer.use("invariant")
    try:
        return kinds(model.module, lambda: denoise(model.net, model.table, slots, 1))
    finally:
        for layer in layers:
            layer.use("library")


def same_bits(kind: Kind, buckets: Sequence[int], invariant: bool = False) -> bool:
    """Whether a picture's bits are the same in all of these buckets, by the library or by the invariant kernel."""
    layer, generator = kind.layers[0], torch.Generator(kind.given.x.device).manual_seed(0)
    given = kind.inputs(max(buckets), generator)
    layer.use("invariant" if invariant else "library")
    try:
        return agrees(kind, given, kind.call(given), buckets, generator)
    finally:
        layer.use("library")


def times(kind: Kind, batches: Sequence[int], invariant: bool) -> list[float]:
    """Microseconds in each of these batches, by the library or by the invariant kernel."""
    layer, device = kind.layers[0], kind.given.x.device
    inputs = [kind.inputs(batch, torch.Generator(device).manual_seed(0)) for batch in batches]
    layer.use("invariant" if invariant else "library")
    try:
        return [microseconds(partial(kind.call, given), device) for given in inputs]
    finally:
        layer.use("library")


def measures(directory: Path) -> Iterator[Measure]:
    """Prints a line for every kind of layer; gives what they sum up to in the whole net."""
    device = torch.device("cuda", torch.cuda.current_device())
    model = load_layers(read_card(directory), device, choose_dtype("auto", device))
    sums = {name: [0.0] * len(BATCHES) for name in ("library", "invariant", "chosen")}
    print(f"microseconds by library / invariant kernel, in batches of {BATCHES}")
    for kind in kinds_of(model):
        same = same_bits(kind, usual_buckets(max(BATCHES)))
        took = {invariant: times(kind, BATCHES, invariant) for invariant in (False, True)}
        pairs = "  ".join(f"{a:.1f} / {b:.1f}" for a, b in zip(took[False], took[True], strict=True))
        bits = "same" if same else "differ"
        print(f"{bits:7}{len(kind.layers):3} x  {pairs:48}{name_of(kind)}", flush=True)
        for which, each in (("library", took[False]), ("invariant", took[True]), ("chosen", took[not same])):
            sums[which] = [a + len(kind.layers) * b for a, b in zip(sums[which], each, strict=True)]
    for which, each in sums.items():
        for batch, time in zip(BATCHES, each, strict=True):
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
