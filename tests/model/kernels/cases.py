"""Triton's kernels beside float64 and beside the algebra; convolutions are in `conv_cases`. Not collected
by its name: `test_triton` runs it, under Triton's interpreter on any machine, and on a GPU where there is one.
"""

from dataclasses import replace
from typing import Any, cast

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

import model.nets.layers
from model.engine.slots import Slots
from model.engine.step import algebra, denoise, denoise_by_kernels
from model.kernels import norm, step
from model.kernels.launch import dependent
from model.nets.blocks import Attention, Resnet
from model.nets.build import Net
from model.nets.exact import use_libraries
from model.nets.lucidrains import LucidrainsUNet
from model.nets.lucidrains_config import LucidrainsArchitecture
from model.nets.unet import UNet
from model.sampling.noise import STEP, gaussian, philox
from model.sampling.schedule import Thresholding
from model.sampling.table import C, K, R, S, W
from tests.model.kernels.world import DEVICE, DTYPES, draw, error
from tests.model.sampling.test_noise import KNOWN_ANSWERS
from tests.model.tiny import ARCHITECTURE, FunctionNet, T, a_plan

# Group normalisation


def in_float64(
    x: Tensor, groups: int, time: Tensor | None, before: Tensor | None, affine: Tensor, silu: bool
) -> Tensor:
    """What `group_norm` must give."""
    x, C = x.double(), x.shape[1]
    x = x if before is None else x + before.double()[:, None, None]
    x = x + time.double()[:, :, None, None] if time is not None and time.shape[1] == C else x
    out = F.group_norm(x, groups, affine[0].double(), affine[1].double(), 1e-5)
    if time is not None and time.shape[1] == 2 * C:
        scale, shift = time.double()[:, :, None, None].chunk(2, dim=1)
        out = out * (1 + scale) + shift
    return F.silu(out) if silu else out


def normed(
    x: Tensor,
    groups: int,
    time: Tensor | None,
    before: Tensor | None,
    affine: Tensor,
    silu: bool,
    beside: Tensor | None = None,
) -> Tensor:
    """What it gives."""
    joins: dict[str, Any] = {"beside": beside, "before": before, "time": time}
    return norm.group_norm(x, groups, affine[0], affine[1], 1e-5, **joins, silu=silu)


def a_case(
    shape: tuple[int, int, int, int], groups: int, dtype: torch.dtype, columns: int = 1, silu: bool = True
) -> dict[str, Any]:
    """Arguments of the norm; `columns` as in a table's share: 0 none, 1 an addition, 2 a modulation."""
    B, C, H, W = shape
    table = draw(B, columns * C + 7, dtype=dtype)
    time = table[:, 3 : 3 + columns * C] if columns else None
    before, affine = (draw(C, dtype=dtype) if columns else None), draw(2, C, dtype=dtype)
    return dict(x=draw(B, C, H, W, dtype=dtype), groups=groups, time=time, before=before, affine=affine, silu=silu)


SHAPES = {
    "groups of three channels": ((3, 12, 5, 7), 4),
    "one group": ((2, 11, 3, 3), 1),
    "one channel to a group": ((5, 6, 4, 3), 6),
    "one pixel": ((2, 8, 1, 1), 2),
}


@pytest.mark.parametrize("columns", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("large", [False, True], ids=["in registers", "by moments"])
def test_a_norm_is_that_of_float64(
    large: bool, shape: str, dtype: torch.dtype, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:  # than these: several tiles to a range of pixels, ranges of other lengths than their tiles, empty ranges
        for name, value in {"IN_REGISTERS": 0, "SPLITS": 4, "TILE": 64, "LINE": 6}.items():
            monkeypatch.setattr(norm, name, value)
    case = a_case(*SHAPES[shape], dtype, columns, silu=columns != 1)

    assert error(normed(**case), in_float64(**case)) < 8 * DTYPES[dtype]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((1, 12, 63, 67), torch.bfloat16), ((1, 2200, 3, 5), torch.float16)],
    ids=["many pixels", "fewer pixels than ranges of them"],
)
def test_a_large_norm_is_that_of_float64(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    case = a_case(shape, 2, dtype)

    assert error(normed(**case), in_float64(**case)) < 8 * DTYPES[dtype]


@pytest.mark.parametrize("large", [False, True], ids=["in registers", "by moments"])
def test_a_mean_that_is_large_beside_the_deviation_costs_no_digits(
    large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:
        monkeypatch.setattr(norm, "IN_REGISTERS", 0)
        monkeypatch.setattr(norm, "SPLITS", 4)
    case = a_case((1, 8, 9, 11), 2, torch.float32, columns=0, silu=False)
    case["x"] = draw(1, 8, 9, 11, mean=3000.0)

    assert error(normed(**case), in_float64(**case)) < 1e-3  # E x^2 - (E x)^2 would leave one digit


@pytest.mark.parametrize("large", [False, True], ids=["in registers", "by moments"])
def test_a_norm_does_not_depend_on_other_pictures(large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if large:
        monkeypatch.setattr(norm, "IN_REGISTERS", 0)
        monkeypatch.setattr(norm, "SPLITS", 4)
    case = a_case((4, 12, 5, 7), 4, torch.bfloat16)
    together = normed(**case)
    for i in range(4):
        alone = normed(**case | {"x": case["x"][i : i + 1], "time": case["time"][i : i + 1]})
        assert torch.equal(alone[0], together[i])

    case["x"][2] = torch.nan
    beside_nan = normed(**case)
    assert torch.equal(beside_nan[[0, 1, 3]], together[[0, 1, 3]])
    assert beside_nan[2].isnan().all()


@pytest.mark.parametrize("large", [False, True], ids=["in registers", "by moments"])
@pytest.mark.parametrize("own", [1, 5, 11])
def test_the_channels_of_two_pictures_are_normed_as_those_of_one(
    own: int, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:
        monkeypatch.setattr(norm, "IN_REGISTERS", 0)
        monkeypatch.setattr(norm, "SPLITS", 4)
    case = a_case((3, 12, 5, 7), 4, torch.bfloat16)  # groups of three channels, so that one belongs to both
    together = normed(**case)
    parts = [part.contiguous(memory_format=torch.channels_last) for part in case["x"].split([own, 12 - own], dim=1)]

    assert torch.equal(normed(**case | {"x": parts[0], "beside": parts[1]}), together)


def test_the_terms_of_a_sum_are_added_before_they_are_normed() -> None:
    case = a_case((3, 12, 5, 7), 4, torch.bfloat16)
    terms = [draw(3, 12, 5, 7) for _ in range(4)]
    whole = case | {"x": ((terms[0] + terms[1]) + terms[2]) + terms[3]}

    assert error(normed(**case | {"x": torch.stack(terms)}), in_float64(**whole)) < 8 * DTYPES[torch.bfloat16]


@pytest.mark.parametrize(("dtype", "together"), [(torch.bfloat16, 4), (torch.float32, 2)])
def test_narrow_groups_are_read_side_by_side(
    dtype: torch.dtype, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four channels are 8 or 16 bytes; a fetch is 32 at least."""
    case = a_case((2, 24, 5, 3), 6, dtype)
    dependent(DEVICE)  # so that its trial is over
    grids: list[tuple[int, ...]] = []
    launcher = type(norm._norm_in_registers)
    usual = launcher.__getitem__

    def noted(kernel: Any, grid: tuple[int, ...]) -> Any:
        grids.append(grid)
        return usual(kernel, grid)

    monkeypatch.setattr(launcher, "__getitem__", noted)

    assert error(normed(**case), in_float64(**case)) < 8 * DTYPES[dtype]
    assert grids == [(-(-6 // together), 2)]


# What is added to a convolution


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("with_bias", "with_other"), [(True, False), (False, True), (True, True)])
def test_a_bias_and_a_residual_are_added_in_place(with_bias: bool, with_other: bool, dtype: torch.dtype) -> None:
    x, bias, other = draw(3, 11, 13, 9, dtype=dtype), draw(11, dtype=dtype), draw(3, 11, 13, 9, dtype=dtype)
    expected = x.double() + with_bias * bias.double()[:, None, None] + with_other * other.double()
    out = norm.add_bias(x, bias if with_bias else None, other if with_other else None)

    assert error(out, expected) < 8 * DTYPES[dtype]
    assert out.data_ptr() == x.data_ptr()


# The check of integers


@triton.jit
def _doubled(x, out):
    tl.store(out, 2 * tl.load(x))


@pytest.mark.skipif(DEVICE.type != "cpu", reason="for a GPU, a kernel is compiled without the check")
def test_an_integer_that_overflows_is_noticed() -> None:
    numbers, out = torch.tensor([2**29, 2**30], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    _doubled[(1,)](numbers, out)
    assert out.item() == 2**30

    with pytest.raises(Exception, match="overflow detected"):
        _doubled[(1,)](numbers[1:], out)


# The sampler


@triton.jit
def _words(seed, c0, c1, c2, c3, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    words = tl.philox(tl.load(seed), tl.load(c0 + at), tl.load(c1 + at), tl.load(c2 + at), tl.load(c3 + at))
    for i in tl.static_range(4):
        tl.store(out + i * SIZE + at, words[i].to(tl.int64))


def words(seed: int, counter: Tensor) -> Tensor:
    """Triton's Philox words for one key. counter: [4, N] words in int64 -> [4, N]"""
    signed = counter.to(torch.int32).to(DEVICE)  # keeps the bits
    key = torch.tensor([seed - 2**64 if seed >= 2**63 else seed], device=DEVICE)
    out = torch.zeros_like(counter, device=DEVICE)
    _words[(1,)](key, *signed, out, SIZE=counter.shape[1])
    return out.cpu()


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_triton_philox_gives_the_published_answers(counter: str, key: str, result: str) -> None:
    low, high = (int(word, 16) for word in key.split())
    given = words(low + (high << 32), torch.tensor([[int(word, 16)] for word in counter.split()]))

    assert [f"{int(word):08x}" for word in given[:, 0]] == result.split()


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1, 2**32, 0x1234567890ABCDEF, 2**63 - 1])
def test_the_words_are_those_of_our_noise(seed: int) -> None:
    counter = torch.randint(2**32, (4, 64))
    expected = philox(
        (counter[0], counter[1], counter[2], counter[3]),
        (torch.tensor([seed & 0xFFFFFFFF]), torch.tensor([seed >> 32])),
    )

    assert torch.equal(words(seed, counter), torch.stack(expected))


def a_world(
    shape: tuple[int, int, int],
    learned: bool = False,
    slots: int = 5,
    dtype: torch.dtype = torch.float32,
    labels: int = 0,
) -> tuple[UNet, Tensor, Slots]:
    """Slots full of random numbers and rows, and a net of one multiplication that takes its pictures as they come. With
    labels, the first two slots hold a guided picture."""
    table = torch.cat([torch.arange(T), 3 * torch.arange(labels)])[:, None].to(DEVICE, dtype) / 10
    world = Slots(slots, shape, T, DEVICE)
    world.ahead = torch.zeros(slots, 0, *shape, device=DEVICE)  # so that the algebra, too, draws inside the step
    for tensor in (world.x, world.x0, world.given, world.history):
        tensor.copy_(torch.randn(tensor.shape).to(dtype))  # Triton's interpreter cuts bfloat16 where a GPU rounds
    world.rows.copy_(torch.rand(world.rows.shape) + 0.1)
    world.rows[..., K] = torch.randint(T, world.rows.shape[:2]).to(DEVICE).float()
    world.rows[..., W] = 0.3 if learned else 0.0
    world.rows[::2, :, C] = torch.inf
    world.cursor.copy_(torch.randint(T, (slots,)))
    world.last[:] = T
    world.seed.copy_(torch.randint(2**62, (slots,)))
    world.label.copy_(torch.randint(max(1, labels), (slots,)))
    if labels and slots > 1:
        world.join(1, 0)

    def function(x: Tensor, k: Tensor) -> Tensor:
        assert x.is_contiguous(memory_format=torch.channels_last) and x.dtype == dtype
        out = x * (0.5 + k[:, None, None, None])
        return torch.cat([out, out.flip(2)], dim=1) if learned else out

    architecture = replace(ARCHITECTURE, in_channels=shape[0], out_channels=shape[0] * (1 + learned))
    return cast(UNet, FunctionNet(function, architecture, labels)), table, world


STATE = ("x", "x0", "given", "history", "rows")
COLUMNS_OF_SLOTS = ("cursor", "last", "seed", "label", "labelled", "unlabelled")


def twin(slots: Slots) -> Slots:
    """The same numbers in other memory."""
    copy = Slots(slots.capacity, slots.shape, T, DEVICE)
    copy.ahead = slots.ahead
    for name in (*STATE, *COLUMNS_OF_SLOTS):
        getattr(copy, name).copy_(getattr(slots, name))
    return copy


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize(("learned", "dtype"), [(False, torch.float32), (True, torch.float32), (True, torch.bfloat16)])
@pytest.mark.parametrize(("shape", "labels"), [((1, 8, 8), 0), ((3, 5, 7), 0), ((3, 29, 31), 0), ((3, 5, 7), 4)])
def test_the_sampler_is_the_algebra(
    shape: tuple[int, int, int], labels: int, learned: bool, dtype: torch.dtype, batch: int
) -> None:
    net, table, slots = a_world(shape, learned, dtype=dtype, labels=labels if batch > 1 else 0)
    expected, before = twin(slots), twin(slots)
    algebra(net, table, expected, batch)
    denoise_by_kernels(net, table, slots, batch)

    assert error(slots.x, expected.x.double()) < 1e-5
    assert error(slots.x0, expected.x0.double()) < 1e-5
    assert error(slots.history, expected.history.double()) < 1e-5
    assert torch.equal(slots.cursor, expected.cursor)
    for name in ("x", "x0", "history", "cursor"):
        assert torch.equal(getattr(slots, name)[batch:], getattr(before, name)[batch:])  # of no other slot


THRESHOLDING = Thresholding(0.9, 2.0)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize(("learned", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 29, 31)])
def test_the_sampler_thresholds_as_the_algebra(
    shape: tuple[int, int, int], learned: bool, dtype: torch.dtype, batch: int
) -> None:
    net, table, slots = a_world(shape, learned, dtype=dtype)  # of which every other one is neither clamped nor scaled
    slots.x *= 2
    slots.rows[1::2, :, C] = 1
    expected, clamped = twin(slots), twin(slots)
    algebra(net, table, expected, batch, THRESHOLDING)
    denoise_by_kernels(net, table, clamped, batch)
    denoise_by_kernels(net, table, slots, batch, THRESHOLDING)

    for name in ("x", "x0", "history"):
        assert error(getattr(slots, name), getattr(expected, name).double()) < 1e-5
    assert torch.equal(slots.cursor, expected.cursor)
    assert torch.equal(slots.x0[::2], clamped.x0[::2])
    scaled = [not torch.equal(*pair) for pair in zip(slots.x0[1:batch:2], clamped.x0[1:batch:2], strict=True)]
    assert any(scaled) == (batch > 1 and shape != (1, 1, 1))


def test_a_thresholded_step_depends_neither_on_other_pictures_nor_on_the_slot() -> None:
    net, table, slots = a_world((3, 5, 7), dtype=torch.bfloat16)
    slots.rows[1::2, :, C] = 1
    reversed_, alone = twin(slots), [twin(slots) for _ in range(5)]
    for name in (*STATE, *COLUMNS_OF_SLOTS):
        getattr(reversed_, name).copy_(getattr(slots, name).flip(0))
        for i, one in enumerate(alone):
            getattr(one, name)[0].copy_(getattr(slots, name)[i])
    reversed_.x[1, 0, 2, 3] = torch.nan  # of the fourth
    for world, batch in ((slots, 5), (reversed_, 5), *((one, 1) for one in alone)):
        denoise_by_kernels(net, table, world, batch, THRESHOLDING)
    for i, one in enumerate(alone):
        for name in ("x", "x0", "history"):
            assert torch.equal(getattr(one, name)[0], getattr(slots, name)[i])
            assert i == 3 or torch.equal(getattr(reversed_, name)[4 - i], getattr(slots, name)[i])
    assert reversed_.x[1].isnan().any()


def test_channels_that_a_picture_lacks_are_zeros() -> None:
    _, table, slots = a_world((3, 5, 7), dtype=torch.bfloat16)
    picture, embedding, now = step.enter(slots.x[:4], slots.rows, slots.cursor[:4], table, 16)
    k = slots.rows[torch.arange(4), slots.cursor[:4], K].long()

    assert torch.equal(picture[:, :3].float(), slots.x[:4]) and not picture[:, 3:].any()
    assert picture.shape == (4, 16, 5, 7) and picture.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(embedding, table[k]) and torch.equal(now, slots.cursor[:4])


def test_the_noise_of_a_step_is_ours() -> None:
    net, table, slots = a_world((3, 5, 7), slots=3)
    slots.rows.zero_()
    slots.rows[..., S] = 1.0
    expected = gaussian(slots.seed, slots.cursor, (3, 5, 7), STEP)
    denoise_by_kernels(net, table, slots, 3)

    assert error(slots.x, expected.double()) < 1e-6


def test_a_step_depends_neither_on_other_pictures_nor_on_the_slot() -> None:
    net, table, slots = a_world((3, 5, 7), dtype=torch.bfloat16)
    before, elsewhere = twin(slots), Slots(5, (3, 5, 7), T, DEVICE)
    denoise_by_kernels(net, table, slots, 5)
    for i in range(5):
        for name in (*STATE, *COLUMNS_OF_SLOTS):
            getattr(elsewhere, name)[4 - i].copy_(getattr(before, name)[i])
            getattr(elsewhere, name)[(7 - i) % 5].copy_(getattr(before, name)[i])
        elsewhere.x[(6 - i) % 5] = torch.nan
        denoise_by_kernels(net, table, elsewhere, 5)
        assert torch.equal(elsewhere.x[4 - i], slots.x[i])
        assert torch.equal(elsewhere.x0[4 - i], slots.x0[i])
        assert torch.equal(elsewhere.history[4 - i], slots.history[i])


def test_a_nan_stays_in_its_own_picture() -> None:
    net, table, slots = a_world((1, 8, 8))
    slots.x[1, 0, 2, 3] = torch.nan
    denoise_by_kernels(net, table, slots, 5)

    assert slots.x.isnan().nonzero().tolist() == slots.x0.isnan().nonzero().tolist() == [[1, 0, 2, 3]]


def test_a_cursor_stops_on_the_row_of_zeros() -> None:
    net, table, slots = a_world((1, 8, 8), slots=3)
    slots.cursor[:] = torch.tensor([0, T - 1, T])
    slots.rows[:, T] = 0
    denoise_by_kernels(net, table, slots, 3)

    assert slots.cursor.tolist() == [1, T, T]
    assert not slots.x[2].any() and slots.x[:2].all()


# All of it


CHOICES: list[dict[str, Any]] = [
    {"sampler": "ddpm"},
    {"sampler": "ddim", "eta": 0.7},
    {"sampler": "dpmpp_2m"},
    {"sampler": "greedy"},
    {"sampler": "ddpm", "clip": False, "noise": "torch"},
]


@pytest.mark.usefixtures("kernels_on")
@pytest.mark.parametrize(
    "kind", [pytest.param("default", marks=pytest.mark.long), "scale_shift", "learned", "conditional"]
)
def test_steps_of_a_real_net_by_kernels_are_those_of_the_algebra(kind: str) -> None:
    """All samplers at once; with kernels, biases are where a GPU has them."""
    torch.manual_seed(0)
    learned = kind == "learned"
    shift = "scale_shift" if kind == "scale_shift" else "default"
    labels = 4 if kind == "conditional" else None
    with torch.inference_mode(False):
        net: Any = UNet(
            replace(ARCHITECTURE, out_channels=1 + learned, resnet_time_scale_shift=shift, num_class_embeds=labels)
        )
        for parameter in net.parameters():
            parameter.requires_grad_(False).add_(0.1 * torch.randn_like(parameter))
        net = net.eval().to(DEVICE, memory_format=torch.channels_last)
    table = net.embed(torch.arange(T, device=DEVICE))
    table = torch.cat([table, net.embed_labels()]) if labels else table
    slots = Slots(5, ARCHITECTURE.shape, T, DEVICE)
    slots.ahead = torch.zeros(5, 0, *ARCHITECTURE.shape, device=DEVICE)
    for slot, choice in enumerate(CHOICES):
        slots.seat(slot, 2**60 + slot, a_plan(5, **choice), slots.draw_initial([slot])[0])
        slots.rows[slot, :5, W] = 0.3 * learned
        slots.label[slot] = slot % 4
    if labels:
        slots.rows[:, :5, R] = 0.5
        slots.join(0, 3)
    slots.given.copy_(torch.randn(slots.given.shape))
    expected = twin(slots)
    for _ in range(2):
        algebra_without_kernels(net, table, expected)
    for module in list(net.modules()):
        if isinstance(module, Resnet | Attention):
            module.fuse()
    if labels:
        net.fuse_labels()
    use_libraries(net)
    for _ in range(2):
        denoise(net, table, slots, 5)

    assert error(slots.x, expected.x.double()) < 1e-5
    assert error(slots.x0, expected.x0.double()) < 1e-5


@pytest.mark.usefixtures("kernels_on")
def test_steps_of_lucidrains_net_by_kernels_are_those_of_the_algebra() -> None:
    """Its norms are torch's own; what a convolution adds, and the sampler, are kernels."""
    torch.manual_seed(0)
    arch = LucidrainsArchitecture(
        height=8,
        width=8,
        in_channels=1,
        out_channels=2,
        dim=8,
        init_dim=8,
        dim_mults=(1, 2),
        full_attn=(False, True),
        attn_heads=(1, 1),
        attn_dim_head=(4, 4),
        num_mem_kv=2,
    )
    with torch.inference_mode(False):
        net: Any = LucidrainsUNet(arch)
        for parameter in net.parameters():
            parameter.requires_grad_(False).add_(0.1 * torch.randn_like(parameter))
        net = net.eval().to(DEVICE, memory_format=torch.channels_last)
    table = net.embed(torch.arange(T, device=DEVICE))
    slots = Slots(3, arch.shape, T, DEVICE)
    slots.ahead = torch.zeros(3, 0, *arch.shape, device=DEVICE)
    for slot, choice in enumerate(CHOICES[:3]):
        slots.seat(slot, slot, a_plan(5, **choice), slots.draw_initial([slot])[0])
    expected = twin(slots)
    algebra_without_kernels(net, table, expected)
    use_libraries(net)
    denoise(net, table, slots, 3)

    assert error(slots.x, expected.x.double()) < 1e-5


def algebra_without_kernels(net: Net, table: Tensor, slots: Slots) -> None:
    """The same step in torch alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.nets.layers, "TRITON_ON", frozenset())
        algebra(net, table, slots, slots.capacity)
