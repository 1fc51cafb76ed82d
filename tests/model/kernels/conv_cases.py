"""The invariant convolution beside float64, and the choice of the layers that use it. Not collected by its
name: `test_triton` runs it, under Triton's interpreter on any machine, and on a GPU where there is one.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.checkpoint.load import Model
from model.engine.runner import Runner, prepared
from model.kernels import conv, norm
from model.kernels.conv import Tile
from model.nets.blocks import Attention, Resnet
from model.nets.config import architecture
from model.nets.convolution import Conv, Projection
from model.nets.exact import Chosen
from model.nets.layers import How, SelfAttention, upsample
from model.nets.unet import UNet
from tests.model.kernels.world import DEVICE, DTYPES, draw, error, remembered
from tests.model.tiny import ARCHITECTURE, T, card
from tests.model.worlds import small


@dataclass(frozen=True)
class Layer:
    """A convolution, and the picture it is given."""

    channels: int
    outs: int
    height: int
    width: int
    size: int = 3
    stride: int = 1
    below: bool = False
    doubled: bool = False

    def conv(self, dtype: torch.dtype) -> Conv:
        """The layer with random weights."""
        padding = 0 if self.below else (self.size - 1) // 2
        conv: Any = Conv(self.channels, self.outs, self.size, stride=self.stride, padding=padding).to(DEVICE)
        conv = conv.requires_grad_(False).to(dtype).to(memory_format=torch.channels_last)
        conv.below, conv.doubled = self.below, self.doubled
        conv.use("invariant")
        return conv  # type: ignore[no-any-return]

    def picture(self, batch: int, dtype: torch.dtype) -> Tensor:
        return draw(batch, self.channels, self.height, self.width, dtype=dtype)


LAYERS = {
    "colours in, several tiles": Layer(3, 70, 9, 11),
    "one channel out": Layer(20, 1, 8, 8),
    "three channels out": Layer(24, 3, 7, 5),
    "channels that fill no step": Layer(35, 33, 5, 6),
    "one pixel": Layer(40, 24, 1, 1),
    "1 x 1": Layer(100, 130, 5, 3, size=1),
    "stride 2": Layer(16, 20, 7, 8, stride=2),
    "stride 2, padded below": Layer(16, 20, 9, 6, stride=2, below=True),
    "4 x 4, stride 2": Layer(16, 20, 6, 8, size=4, stride=2),
    "doubled": Layer(17, 24, 5, 3, doubled=True),
}


def in_float64(conv: Conv, x: Tensor) -> Tensor:
    """What `conv` must give."""
    x = upsample(x.double()) if conv.doubled else x.double()
    x = F.pad(x, (0, 1, 0, 1)) if conv.below else x
    bias = None if conv.bias is None else conv.bias.double()
    return F.conv2d(x, conv.weight.double(), bias, conv.stride, conv.padding)


LARGE, SMALL, NARROW = Tile(128, 128, 8, 3), Tile(64, 64, 4, 4), Tile(64, 32, 4, 6)
CUTS: dict[str, dict[str, Any]] = {
    "large tiles": {"HALF": (LARGE,), "FULL": (LARGE,)},
    "small tiles": {"HALF": (SMALL,), "FULL": (SMALL,), "FEW_PIXELS": 0},
    "split": {"HALF": (SMALL,), "FULL": (SMALL,), "FEW_PIXELS": 10**6, "PROGRAMS": 10**6, "DEEP": 1, "MOST_SPLITS": 4},
}


@contextmanager
def cut_up(**how: Any) -> Iterator[None]:
    """Layers of any shape are cut up in this way."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in how.items():
            patch.setattr(conv, name, value)
        for decided in (conv.reduction, conv.tile):
            decided.cache_clear()
        yield
    for decided in (conv.reduction, conv.tile):
        decided.cache_clear()


@pytest.fixture
def cut(request: pytest.FixtureRequest) -> Iterator[None]:
    """One of CUTS."""
    with cut_up(**CUTS[request.param]):
        yield


@pytest.mark.usefixtures("cut", "kernels_on")
@pytest.mark.parametrize(
    ("cut", "dtype"),
    [
        ("split", torch.float16),
        pytest.param("small tiles", torch.float32, marks=pytest.mark.long),
        pytest.param("large tiles", torch.bfloat16, marks=pytest.mark.long),
    ],
    indirect=["cut"],
)
@pytest.mark.parametrize("layer", LAYERS)
def test_a_convolution_is_that_of_float64(layer: str, dtype: torch.dtype) -> None:
    conv, x = LAYERS[layer].conv(dtype), LAYERS[layer].picture(2, dtype)
    expected = in_float64(conv, x)
    add = draw(*expected.shape, dtype=dtype)
    out = conv(x)

    assert out.is_contiguous(memory_format=torch.channels_last) and out.dtype == dtype
    assert error(out, expected) < 8 * DTYPES[dtype]
    assert error(conv(x, add=add), expected + add.double()) < 8 * DTYPES[dtype]


@pytest.mark.usefixtures("cut", "kernels_on")
@pytest.mark.parametrize("cut", ["small tiles", "split"], indirect=True)
def test_a_bias_that_was_taken_over_is_not_added() -> None:
    conv, x = Layer(70, 20, 4, 4).conv(torch.float32), draw(2, 70, 4, 4)
    conv.bias = None

    assert error(conv(x), in_float64(conv, x)) < 1e-5


@pytest.mark.usefixtures("cut", "kernels_on")
@pytest.mark.parametrize(
    ("cut", "dtype"), [("large tiles", torch.bfloat16), ("split", torch.float32)], indirect=["cut"]
)
@pytest.mark.parametrize("layer", ["channels that fill no step", "one pixel", "stride 2, padded below"])
def test_a_convolution_depends_neither_on_other_pictures_nor_on_the_slot(layer: str, dtype: torch.dtype) -> None:
    conv, x = LAYERS[layer].conv(dtype), LAYERS[layer].picture(5, dtype)
    add = draw(*in_float64(conv, x).shape, dtype=dtype)
    together = conv(x, add=add)
    for i in range(5):
        assert torch.equal(conv(x[i : i + 1], add=add[i : i + 1])[0], together[i])
    assert torch.equal(conv(x.flip(0), add=add.flip(0)), together.flip(0))

    x[2] = torch.nan
    beside_nan = conv(x, add=add)
    assert torch.equal(beside_nan[[0, 1, 3, 4]], together[[0, 1, 3, 4]])
    assert beside_nan[2].isnan().any()


@pytest.mark.usefixtures("kernels_on")
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.long)])
@pytest.mark.parametrize("layer", ["colours in, several tiles", "channels that fill no step", "1 x 1"])
def test_a_tile_of_any_size_gives_the_same_bits(layer: str, dtype: torch.dtype) -> None:
    conv, x, results = LAYERS[layer].conv(dtype), LAYERS[layer].picture(3, dtype), []
    for shape in (LARGE, SMALL, NARROW):
        with cut_up(HALF=(shape,), FULL=(shape,)):
            results.append(conv(x))

    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def projections(conv: Conv, sources: list[int], dtype: torch.dtype, x: Tensor) -> Projection:
    """One of pictures of so many channels, to be added to what `conv` gives for x."""
    shortcut = Layer(sum(sources), conv.out_channels, x.shape[2], x.shape[3], size=1).conv(dtype)
    shortcut.bias = None
    return Projection(shortcut, tuple(draw(len(x), each, *x.shape[2:], dtype=dtype) for each in sources))


@pytest.mark.usefixtures("cut", "kernels_on")
@pytest.mark.parametrize(
    ("cut", "dtype"),
    [("large tiles", torch.bfloat16), ("small tiles", torch.float32), ("split", torch.bfloat16)],
    indirect=["cut"],
)
@pytest.mark.parametrize(
    "sources", [[64, 24], *(pytest.param(each, marks=pytest.mark.long) for each in ([40], [19, 70]))]
)
def test_a_projection_of_one_or_two_pictures_joins_the_reduction(sources: list[int], dtype: torch.dtype) -> None:
    layer = Layer(35, 70, 5, 6)
    conv, x = layer.conv(dtype), layer.picture(3, dtype)
    add = projections(conv, sources, dtype, x)
    expected = in_float64(conv, x) + F.conv2d(torch.cat(add.sources, dim=1).double(), add.conv.weight.double())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Projection, "compute", lambda _: pytest.fail("it was computed by itself"))
        together = conv(x, add=add)

        assert error(together, expected) < 8 * DTYPES[dtype]
        for i in range(3):
            alone = Projection(add.conv, tuple(source[i : i + 1] for source in add.sources))
            assert torch.equal(conv(x[i : i + 1], add=alone)[0], together[i])


@pytest.mark.usefixtures("kernels_on")
def test_a_projection_with_a_bias_is_computed_by_itself() -> None:
    layer = Layer(35, 20, 5, 6)
    conv, x = layer.conv(torch.float32), layer.picture(2, torch.float32)
    add = projections(conv, [8], torch.float32, x)
    add.conv.bias = nn.Parameter(draw(20), requires_grad=False)
    expected = in_float64(conv, x) + F.conv2d(add.sources[0].double(), add.conv.weight.double(), add.conv.bias.double())

    assert error(conv(x, add=add), expected) < 1e-5


@pytest.mark.usefixtures("cut", "kernels_on")
@pytest.mark.parametrize("cut", ["split"], indirect=True)
def test_the_reader_of_a_split_convolution_may_add_its_ranges_up() -> None:
    layer = Layer(70, 20, 4, 4)
    conv, x = layer.conv(torch.bfloat16), layer.picture(2, torch.bfloat16)

    assert conv(x, whole=False).ndim == 4  # since there is a bias to be added
    conv.bias = None
    parts = conv(x, whole=False)
    assert parts.shape == (4, 2, 20, 4, 4) and parts.dtype == torch.float32
    assert error(parts.sum(0), in_float64(conv, x)) < 1e-5


@pytest.mark.usefixtures("kernels_on")
def test_a_convolution_that_was_widened_reads_zeros_beside_the_colours() -> None:
    layer = Layer(3, 20, 5, 6)
    conv, x = layer.conv(torch.float32), layer.picture(2, torch.float32)
    expected = in_float64(conv, x)
    conv.widen(16)
    widened = F.pad(x, (0, 0, 0, 0, 0, 13)).contiguous(memory_format=torch.channels_last)

    for how in get_args(How):
        conv.use(how)
        assert error(conv(widened), expected) < 1e-5
        assert error(conv(x), expected) < 1e-5  # who brings the colours alone is served as well


@pytest.mark.parametrize(
    ("channels", "outs", "side", "programs"),
    [
        (128, 128, 32, {1: 64, 8: 128, 64: 256}),
        (128, 3, 32, {1: 16, 8: 128, 64: 1024}),
        (256, 256, 16, {1: 32, 8: 128, 64: 128}),
        (256, 256, 8, {1: 32, 8: 128, 64: 128}),
        (256, 256, 4, {1: 32, 8: 64, 64: 128}),
        (128, 128, 256, {1: 256, 8: 2048, 64: 16384}),
    ],
)
def test_a_small_batch_makes_programs_enough(channels: int, outs: int, side: int, programs: dict[int, int]) -> None:
    order, made = conv.reduction((channels,), outs, side * side, 3, 2), {}
    for batch in programs:
        cut = conv.tile(batch * side * side, outs, order, 2, 227 << 10)
        made[batch] = -(-batch * side * side // cut.pixels) * -(-outs // cut.channels) * order.splits

    assert made == programs


def test_a_tile_takes_no_more_shared_memory_than_there_is() -> None:
    order = conv.reduction((256,), 256, 1024, 3, 2)
    tiles = [conv.tile(10**6, 256, order, 2, room << 10) for room in (227, 192, 99, 64, 0)]

    assert [(each.pixels, each.channels) for each in tiles] == [(128, 256), (128, 256), (128, 128), (64, 64), (64, 32)]


# The choice of layers


class Layers(nn.Module):
    """Four layers that pass for a net: 1 to 20 channels and to 12, attention within 4, and back to 1."""

    def __init__(self) -> None:
        super().__init__()
        self.arch, self.reads, self.labels = ARCHITECTURE, 1, 0
        self.one, self.two = Layer(1, 20, 8, 8).conv(torch.float32), Layer(20, 12, 8, 8, size=1).conv(torch.float32)
        self.attend, self.back = SelfAttention(2), Layer(4, 1, 8, 8).conv(torch.float32)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        out: Tensor = self.back(self.attend(self.two(F.silu(self.one(x)))))
        return out

    @property
    def invariant(self) -> list[str]:
        """Names of the layers that have the invariant kernel."""
        return [name for name, layer in self.named_children() if getattr(layer, "invariant", False)]


class Library:
    """Another library of convolutions and attention: which other bits it gives, in batches of which size."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.convolution, self.attention = F.conv2d, F.scaled_dot_product_attention
        self.differs: dict[int | str, set[int]] = {}  # of how many channels, or attention: in which batches
        monkeypatch.setattr(F, "conv2d", self.conv2d)
        monkeypatch.setattr(F, "scaled_dot_product_attention", self.attend)

    def conv2d(self, x: Tensor, *rest: Any) -> Tensor:
        alone = [self.convolution(one, *rest) for one in x.split(1)]  # for a CPU's depends on the batch as well
        return torch.cat(alone) * (1 + 2**-14 * (len(x) in self.differs.get(x.shape[1], ())))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        alone = [self.attention(*one) for one in zip(q.split(1), k.split(1), v.split(1), strict=True)]
        pinned = not torch.backends.cuda.flash_sdp_enabled()
        return torch.cat(alone) * (1 + 2**-14 * (not pinned and len(q) in self.differs.get("attention", ())))


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch, kernels_on: None) -> Library:
    """A library that gives the same bits in every batch, unless `differs` says otherwise."""
    monkeypatch.setattr(conv, "convolve", remembered(conv.convolve))
    monkeypatch.setattr(norm, "group_norm", remembered(norm.group_norm))
    return Library(monkeypatch)


def started(net: Layers, slots: int = 4, exact: bool = True) -> Runner:
    """A runner of this net."""
    table = torch.zeros(T, 1, device=DEVICE)
    return prepared(Model(card(), cast(UNet, net), table), slots, exact)


def test_a_library_that_gives_the_same_bits_in_every_batch_keeps_its_layers(library: Library) -> None:
    net = Layers()
    runner = started(net)

    assert (net.invariant, runner.chosen) == ([], Chosen(cudnn=3, triton=0, free=1, fixed=0))
    assert runner.exact_buckets == [1, 2, 3, 4]


def test_a_layer_whose_bits_differ_in_some_batch_gets_the_invariant_kernel(library: Library) -> None:
    library.differs = {20: {1, 3}}
    net = Layers()
    runner = started(net)

    assert (net.invariant, runner.chosen) == (["two"], Chosen(cudnn=2, triton=1, free=1, fixed=0))
    assert runner.exact_buckets == [1, 2, 3, 4]


def test_attention_whose_bits_differ_is_pinned_to_one_kernel(library: Library) -> None:
    library.differs = {"attention": {2}}
    net = Layers()
    runner = started(net)

    assert (net.invariant, runner.chosen) == (["attend"], Chosen(cudnn=3, triton=0, free=0, fixed=1))
    assert runner.exact_buckets == [1, 2, 3, 4]


@pytest.mark.long
def test_without_the_promise_all_layers_keep_the_librarys_kernels(library: Library) -> None:
    library.differs = {20: {1, 3}, "attention": {2}}
    net = Layers()
    started(net)
    assert net.invariant == ["two", "attend"]

    assert started(net, exact=False).chosen is None
    assert net.invariant == []


def a_unet() -> UNet:
    """A small net as it is loaded: with shortcuts, pictures that stand beside others, and residuals."""
    arch = architecture(small(in_channels=1, out_channels=1, sample_size=4))
    with torch.inference_mode(False):
        net: Any = UNet(arch).eval().requires_grad_(False).to(DEVICE)
        for module in list(net.modules()):
            if isinstance(module, Resnet | Attention):
                module.fuse()
        net.conv_in.widen(16)
    return net.to(memory_format=torch.channels_last)  # type: ignore[no-any-return]


def runner_of(net: UNet) -> Runner:
    """A runner of this net, that promises something."""
    table = net.embed(torch.arange(T, device=DEVICE))
    return prepared(Model(replace(card(), architecture=net.arch), net, table), 2)


def chosen_in(net: UNet) -> list[str]:
    """Names of the convolutions that have the invariant kernel."""
    return [name for name, layer in net.named_modules() if isinstance(layer, Conv) and layer.invariant]


@pytest.mark.long
def test_layers_are_tried_as_a_step_calls_them(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    called: dict[str, set[tuple[object, ...]]] = {"trial": set(), "step": set()}
    now, usual = ["trial"], conv.convolve

    def noted(x: Tensor, weight: Tensor, bias: Tensor | None, add: Tensor | None, **how: Any) -> Tensor:
        sources = tuple(source.shape[1] for source in how["sources"])
        kind = (*x.shape[1:], len(weight), bias is None, add is None, how["times"], sources, how["whole"])
        called[now[0]].add(kind)
        return usual(x, weight, bias, add, **how)

    monkeypatch.setattr(conv, "convolve", noted)
    library.differs = {channels: {1} for channels in (8, 16, 24, 32)}
    net = a_unet()
    with cut_up(DEEP=1, PROGRAMS=10**6, MOST_SPLITS=2):
        runner = runner_of(net)
        now[0] = "step"
        runner.step(2)

    assert called["step"] <= called["trial"]
    assert {sources for *_, sources, _ in called["step"]} >= {(), (8,), (16, 8)}
    assert {whole for *_, whole in called["step"]} == {True, False}
    assert runner.exact_buckets == [1, 2]
    shortcuts = [name for name, _ in net.named_modules() if name.endswith("conv_shortcut")]
    assert not set(shortcuts) & set(chosen_in(net))  # each joins a reduction, and does not count
    convolutions = [layer for layer in net.modules() if isinstance(layer, Conv)]
    assert runner.chosen is not None and runner.chosen.cudnn == 0
    assert runner.chosen.triton == len(convolutions) - len(shortcuts)


@pytest.mark.long
def test_a_shortcut_is_tried_by_itself_where_it_joins_no_reduction(
    library: Library, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    usual = conv.convolve

    def faulty(x: Tensor, *rest: Any, **how: Any) -> Tensor:
        if how["sources"]:
            raise RuntimeError("too little shared memory")
        return usual(x, *rest, **how)

    monkeypatch.setattr(conv, "convolve", faulty)
    library.differs = {24: {1}}
    net = a_unet()
    with caplog.at_level(logging.WARNING):
        runner = runner_of(net)

    both = ["up_blocks.0.resnets.1", "up_blocks.1.resnets.0"]  # that read 24 channels
    assert chosen_in(net) == [f"{block}.{name}" for block in both for name in ("conv1", "conv_shortcut")]
    assert runner.exact_buckets == [1, 2]


@pytest.mark.long
def test_where_a_step_by_our_kernels_fails_the_one_that_fails_is_found_out(
    library: Library, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    usual = conv.convolve

    def faulty(x: Tensor, *rest: Any, **how: Any) -> Tensor:
        if x.shape[1] == 12:
            raise RuntimeError("too little shared memory")
        return usual(x, *rest, **how)

    monkeypatch.setattr(conv, "convolve", faulty)
    library.differs = {20: {1}, 12: {2}, 4: {2}}
    net = Layers()
    with caplog.at_level(logging.WARNING):
        runner = started(net)

    assert runner.chosen is not None
    assert net.invariant == ["two", "back"]


@pytest.mark.long
def test_where_the_size_of_a_tile_costs_bits_all_batches_have_one(
    library: Library, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    usual = conv.convolve

    def faulty(x: Tensor, *rest: Any, **how: Any) -> Tensor:
        return usual(x, *rest, **how) * (1 if how["pinned"] else 1 + 2**-14 * (len(x) < 3))

    monkeypatch.setattr(conv, "convolve", faulty)
    library.differs = {20: {1}}
    net = Layers()
    with caplog.at_level(logging.WARNING):
        runner = started(net)

    assert (net.invariant, net.two.how) == (["two"], "pinned")
    assert runner.chosen == Chosen(cudnn=2, triton=1, free=1, fixed=0, pinned=1)
    assert runner.exact_buckets == [1, 2, 3, 4]
    assert [record.getMessage()[:31] for record in caplog.records] == ["no invariant kernel for Conv(20"]
    assert str(runner.chosen) == "convolutions 2 cudnn 1 triton (1 in tiles of one size), attention 1 free 0 fixed"


@pytest.mark.parametrize(
    "fault", ["not invariant", *(pytest.param(fault, marks=pytest.mark.long) for fault in ("wrong", "does not run"))]
)
def test_a_kernel_that_cannot_be_trusted_is_not_used_and_the_log_says_so(
    fault: str, library: Library, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    usual = conv.convolve

    def faulty(x: Tensor, *rest: Any, **how: Any) -> Tensor:
        if fault == "does not run":
            raise RuntimeError("too little shared memory")
        out = usual(x, *rest, **how)
        out[..., 0] *= 1.5 if fault == "wrong" else 1 + 2**-20 * len(x)
        return out

    monkeypatch.setattr(conv, "convolve", faulty)
    library.differs = {20: {1}}
    net = Layers()
    with caplog.at_level(logging.WARNING):
        runner = started(net)

    assert runner.exact_buckets == [2, 3, 4]
    assert net.invariant == []
    said = [record.getMessage().partition("(")[0] for record in caplog.records]
    assert said == [
        "no invariant kernel for Conv",
        "no pinned kernel for Conv",
        "tiny: a picture alone takes a batch of 2, since bits are others in batches of 1",
    ]
