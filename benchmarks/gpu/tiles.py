"""Stage tiles: what tiles of each shape and reductions in so many ranges cost, layer by layer, and what is gained by
kernels that start early: the numbers that `model.kernels.conv` should choose by.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from unittest.mock import patch

import torch

from benchmarks.convolutions import kinds_of, microseconds, name_of
from benchmarks.gpu.facts import Fact, Setting
from benchmarks.gpu.stage import Part
from benchmarks.gpu.worlds import device_of, large, small
from model.checkpoint.card import read_card
from model.checkpoint.load import Model, load_layers
from model.engine.runner import Runner, prepared
from model.nets.convolution import Conv
from model.nets.exact import Kind
from server.worker.device import choose_dtype

MOST_OF = 3  # a kind of convolution is tried if the net has so many of it
SPLITS = (1, 2, 4, 8)
SPLIT_PIXELS = 256  # up to which more than one is tried
REPLAYS = 200
KEPT_S = 5.0  # before the end of the stage no more is begun


def parts(setting: Setting) -> list[Part]:
    """What is chosen today, and, on a GPU, what would have been."""
    if find_spec("triton") is None:
        return [without_triton]
    if setting.dry:
        return [partial(choices, setting, small, (1, 2))]
    return [
        partial(choices, setting, small, (1, 8, 64)),
        partial(starting_early, setting, (1, 8, 64)),
        partial(each_way, setting, small, (1, 8, 64)),
        partial(each_way, setting, large, (1, 8)),
    ]


def without_triton() -> Iterator[Fact]:
    """There is nothing to choose."""
    yield Fact("tiles", "Triton is not installed")


def _model(setting: Setting, net: Callable[[Setting], Path]) -> Model:
    device = device_of(setting)
    return load_layers(read_card(net(setting)), device, choose_dtype("auto", device))


def _convolutions(model: Model) -> list[tuple[Kind, Conv]]:
    return [(kind, layer) for kind in kinds_of(model) if isinstance(layer := kind.layers[0], Conv)]


def _sources(kind: Kind, conv: Conv) -> tuple[int, ...]:
    """The channels that its reduction goes through, source by source."""
    projected = kind.given.added if kind.given.shortcut is not None else ()
    return (conv.in_channels, *(each.shape[1] for each in projected))


def _pixels(kind: Kind, conv: Conv) -> int:
    """Of the result, for one picture."""
    height, width = kind.given.x.shape[2:]
    return height * width * (1 + 3 * conv.doubled) // conv.stride[0] ** 2


def choices(setting: Setting, net: Callable[[Setting], Path], batches: Sequence[int]) -> Iterator[Fact]:
    """How each kind of convolution is cut up, and in how many programs, by batch."""
    from model.kernels import conv as kernels
    from model.kernels.launch import shared_bytes

    model = _model(setting, net)
    for kind, conv in _convolutions(model):
        pixels, number_bytes = _pixels(kind, conv), model.table.element_size()
        order = kernels.reduction(_sources(kind, conv), conv.out_channels, pixels, conv.kernel_size[0], number_bytes)
        for batch in batches:
            rows, room = batch * pixels, shared_bytes(model.table.device)
            cut = kernels.tile(rows, conv.out_channels, order, number_bytes, room)
            programs = -(-rows // cut.pixels) * -(-conv.out_channels // cut.channels) * order.splits
            more = {"tile": f"{cut.pixels} x {cut.channels}", "splits": order.splits, "depth": order.depth}
            yield Fact(f"{name_of(kind)}, batch {batch}", programs, "programs", more=more)


@torch.inference_mode()
def starting_early(setting: Setting, batches: Sequence[int]) -> Iterator[Fact]:
    """A step of our convolutions alone, by kernels that start before the one in front has ended, and by others."""
    from model.kernels import launch

    model, took = _model(setting, small), dict[tuple[int, bool], float]()
    for early in (True, False):
        with patch.object(launch, "WANTED", early):
            runner = prepared(model, max(batches), exact=False, buckets=batches)
            for module in model.module.modules():
                if isinstance(module, Conv):
                    module.use("invariant")
            for _ in runner.capture():
                pass
            for batch in batches:
                took[batch, early] = _replay_ms(runner, batch)
    for batch in batches:
        more = {"ms otherwise": round(took[batch, False], 4)}
        yield Fact(
            f"our convolutions, starting early, batch {batch}", took[batch, True], "ms/step", more=more, main=True
        )


def _replay_ms(runner: Runner, batch: int) -> float:
    """The least of five times that many replays take, one behind another."""
    blocks: list[float] = []
    for _ in range(5):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        for _ in range(REPLAYS):
            runner.step(batch)
        ended.record()
        ended.synchronize()
        blocks.append(began.elapsed_time(ended) / REPLAYS)
    return min(blocks)


@torch.inference_mode()
def each_way(setting: Setting, net: Callable[[Setting], Path], batches: Sequence[int]) -> Iterator[Fact]:
    """Microseconds of each kind of convolution in every tile and, of few pixels, in several numbers of ranges."""
    from model.kernels import conv as kernels

    for kind, conv in _convolutions(_model(setting, net)):
        if len(kind.layers) < MOST_OF or setting.left_s < KEPT_S:
            continue
        pixels = _pixels(kind, conv)
        conv.use("invariant")
        splits = SPLITS if pixels <= SPLIT_PIXELS and conv.kernel_size[0] == 3 else (1,)
        device = kind.given.x.device
        given = [kind.inputs(batch, torch.Generator(device).manual_seed(0)) for batch in batches]
        for shape, ranges in product(kernels.HALF, splits):
            if shape.channels > max(16, conv.out_channels) or setting.left_s < KEPT_S:
                continue
            order = kernels.Reduction(64, ranges)
            with patch.multiple(kernels, reduction=lambda *_, o=order: o, tile=lambda *_, s=shape: s):
                began = time.perf_counter()
                took = [round(microseconds(partial(kind.call, each), device), 2) for each in given]
            how = f"{shape.pixels} x {shape.channels}, {ranges} ranges"
            more = {"us": took, "batches": list(batches), "s": round(time.perf_counter() - began, 2)}
            yield Fact(f"{name_of(kind)}: {how}", took[0], "us", more=more)
        conv.use("library")
