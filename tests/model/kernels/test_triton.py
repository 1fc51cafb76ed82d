"""The Triton path without a GPU: the kernels under Triton's interpreter, and the launches of a step. Where there is a
GPU, the same kernels run on it.

The interpreter is chosen when Triton is first imported, so each file of cases runs in a process of its own.
"""

import logging
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model.nets.layers
import model.nets.unet
from model.checkpoint.load import Model
from model.engine.engine import Engine
from model.engine.readout import Snapshot, pack, unpack
from model.engine.runner import prepared
from model.engine.slots import SavedState, Seating, Slots
from model.engine.step import denoise
from model.nets.blocks import Attention, Resnet
from model.nets.config import architecture
from model.nets.convolution import Conv
from model.nets.exact import use_libraries
from model.nets.unet import UNet
from model.sampling.schedule import Thresholding
from tests.model.engine.test_capture import META, capturing
from tests.model.tiny import ARCHITECTURE, FunctionNet, T, a_plan, a_request, card, halve, run
from tests.model.worlds import CIFAR10, relative_error, shaken, small, twin

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
HERE = Path(__file__).parent
ROOT = HERE.parents[2]
CASES = ["cases.py", "conv_cases.py", "slot_cases.py"]


def run_cases(files: list[str], *options: str, **environment: str) -> None:
    """Runs the cases of these files in a process with this environment. If TOLD is set, its plugin reports each."""
    plugins = ["-p", "no:cacheprovider", "-p", "tests.model.kernels.world"]
    plugins += ["-p", "benchmarks.gpu.told"] if "TOLD" in os.environ else []
    command = [sys.executable, "-m", "pytest", *plugins, *options, *(str(HERE / file) for file in files)]
    ours = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    result = subprocess.run(command, cwd=ROOT, env=ours | environment, capture_output=True, text=True)

    assert result.returncode == 0, result.stdout[-10_000:] + result.stderr[-2000:]


@pytest.mark.parametrize("which", ["not long", pytest.param("long", marks=pytest.mark.long)])
def test_the_kernels_compute_the_same_as_torch(which: str) -> None:
    run_cases(CASES, "-m", which, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none here")
@pytest.mark.parametrize("file", CASES)
def test_the_kernels_compute_it_on_a_gpu(file: str) -> None:
    side_by_side = ["-n", "4"] if find_spec("xdist") is not None else []  # most of the time goes into compiling
    run_cases([file], "-W", "default", *side_by_side, TRITON_INTERPRET="0")  # what CUDA warns of fails nothing


# What is launched


def meta_world(config: dict[str, Any]) -> tuple[UNet, Tensor, Slots]:
    """A net as the server would load it, its table and slots, on the meta device."""
    with META, torch.inference_mode():
        net: Any = UNet(architecture(config)).eval().requires_grad_(False)
        net.fuse()
        net = net.to(torch.bfloat16).to(memory_format=torch.channels_last)
        use_libraries(net)
        return net, torch.zeros(1000, net.embedding_width, dtype=torch.bfloat16), Slots(4, net.arch.shape, 1000, META)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """What Triton was asked to launch, by name. Nothing is, and the meta device passes for a GPU."""
    from triton.runtime.jit import JITFunction

    counted: Counter[str] = Counter()

    def run(kernel: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **constants: Any) -> None:
        assert all(isinstance(size, int) for size in grid)
        assert {x.device for x in args if isinstance(x, Tensor)} == {META}
        counted[kernel.fn.__name__] += 1

    def conv2d(*args: Any) -> Tensor:
        """Channels-last from channels-last, as on a GPU; on the meta device it is not."""
        return torch.empty_like(usual(*args), memory_format=torch.channels_last)

    usual = F.conv2d
    monkeypatch.setattr(F, "conv2d", conv2d)
    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(model.nets.layers, "TRITON_ON", frozenset({"meta"}))
    model.nets.layers._triton_works.cache_clear()
    assert model.nets.layers._triton_works(META)  # found out before any capture
    counted.clear()
    yield counted
    model.nets.layers._triton_works.cache_clear()


class Operations(TorchDispatchMode):
    """Counts torch's operations that are a kernel on a GPU: all but those that only look at memory in another way."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and not name.startswith("empty") and name != "_unsafe_view":
            self.counted[name] += 1
        return func(*args, **(kwargs or {}))


class OnTheDevice(Operations):
    """Counts those that are done there; a copy from the host is none, nor is what has no numbers."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.numel()]
        if tensors and all(tensor.device == META for tensor in tensors):
            return super().__torch_dispatch__(func, types, args, kwargs)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("thresholding", [None, Thresholding(0.9, 2.0)], ids=["clamped", "thresholded"])
def test_the_step_by_kernels_never_looks_at_the_host(thresholding: Thresholding | None, launches: Counter[str]) -> None:
    net, table, slots = meta_world(small())
    with capturing():
        denoise(net, table, slots, 3, thresholding)

    assert launches["_enter"] == launches["_update"] == 1


def test_a_step_of_the_cifar10_net_is_two_hundred_kernels(
    launches: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        model.nets.layers, "attention", lambda q, k, v: torch.empty_like(q.transpose(1, 2)).transpose(1, 2)
    )
    net, table, slots = meta_world(CIFAR10)
    with torch.no_grad(), Operations() as operations:
        denoise(net, table, slots, 2)

    norms, residuals, rest = 51, 22, 1 + 3 + 3 + 1 + 2 * 6  # conv_in, down, up, conv_out; to and from attention
    assert launches == {
        "_enter": 1,
        "_norm_in_registers": norms,
        "_add_bias": residuals + rest,
        "_update": 1,
    }
    assert operations.counted == {"convolution": 77, "cat": 12, "constant_pad_nd": 3, "upsample_nearest2d": 3}
    assert launches.total() + operations.counted.total() + 6 <= 200  # and six times attention


def test_a_step_by_invariant_convolutions_adds_joins_pads_projects_and_doubles_in_them(
    launches: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        model.nets.layers, "attention", lambda q, k, v: torch.empty_like(q.transpose(1, 2)).transpose(1, 2)
    )
    net, table, slots = meta_world(CIFAR10)
    for module in net.modules():
        if isinstance(module, Conv):
            module.use("invariant")
    with torch.no_grad(), capturing(), Operations() as operations:
        denoise(net, table, slots, 2)

    projections, ranges_for_norms = 13, 12
    split = 12 + 15 - ranges_for_norms  # on 8 x 8 and 4 x 4 pixels
    assert launches == {
        "_enter": 1,
        "_norm_in_registers": 51,
        "_convolve": 77 - projections,
        "_add_up": split,
        "_update": 1,
    }
    assert not operations.counted
    assert launches.total() + 6 <= 140  # and six times attention


def test_the_large_norms_of_a_large_picture_are_two_kernels(launches: Counter[str]) -> None:
    net, table, slots = meta_world(CIFAR10 | {"sample_size": 128})
    with torch.inference_mode():
        denoise(net, table, slots, 2)

    assert launches["_moments"] == launches["_norm_by_moments"] > 0
    assert launches["_moments"] + launches["_norm_in_registers"] == 51


def a_seating(slot: int, brings: bool = False) -> Seating:
    """A picture for this slot; if it brings its x_T, that is on the host."""
    return Seating(slot, 2**40 + slot, PLAN, torch.zeros(3, 8, 8) if brings else None)


PLAN = a_plan(20)
SAVED = SavedState(torch.zeros(3, 3, 8, 8, device=META), torch.zeros(0, 3, 8, 8, device=META))
BETWEEN_STEPS: dict[str, tuple[Callable[[Slots], object], dict[str, int]]] = {
    "seating many": (lambda slots: slots.seat_all([a_seating(i) for i in range(64)]), {"_seat": 1}),
    "seating one that brings its x_T": (lambda slots: slots.seat_all([a_seating(1, brings=True)]), {"_seat": 1}),
    "a move": (lambda slots: slots.move(5, 1), {"_vacate": 1}),
    "a slot that is cleared": (lambda slots: slots.clear(1), {"_vacate": 1}),
    "vacating a slot to which another moves": (lambda slots: slots.vacate(1, 63), {"_vacate": 1}),
    "preempting": (lambda slots: slots.save(1), {"stack": 1}),
    "resuming": (lambda slots: slots.resume(Seating(1, 7, PLAN), 3, SAVED), {"_seat": 1}),
    "frames, floats, and whether all are finite": (lambda slots: pack(slots, [7, 1], [2, 3], True), {"_show": 1}),
}


@pytest.mark.parametrize("doing", BETWEEN_STEPS)
def test_each_operation_between_two_steps_is_one_launch(launches: Counter[str], doing: str) -> None:
    slots, (do, expected) = Slots(64, (3, 8, 8), 1000, META), BETWEEN_STEPS[doing]
    with torch.inference_mode():
        slots.seat(0, 1, PLAN, torch.zeros(3, 8, 8))  # so its rows are there
        launches.clear()
        with OnTheDevice() as operations:
            do(slots)

    assert launches + operations.counted == expected


@pytest.fixture
def arriving(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is on the meta device arrives on the host as ones: black pictures, all finite."""
    monkeypatch.setattr(Snapshot, "frames", lambda self: unpack(np.ones(len(self._host), np.uint8), *self._layout))


def meta_engine(slots: int) -> Engine:
    """An engine around a net of one multiplication, on the meta device."""
    net: Any = FunctionNet(halve, ARCHITECTURE)
    return Engine(prepared(Model(card(), net, torch.zeros(T, 1, device=META)), slots, exact=False))


@pytest.mark.usefixtures("arriving")
def test_a_step_with_one_arrival_and_one_departure_has_three_more_launches(launches: Counter[str]) -> None:
    engine = meta_engine(64)
    for number in range(63):
        engine.submit(a_request(number, 20, seed=number))
    engine.submit(a_request("leaves", 1))
    engine.step()
    engine.submit(a_request("comes and leaves", 1))
    launches.clear()

    assert engine.step()
    assert launches == {"_seat": 1, "_enter": 1, "_update": 1, "_show": 1, "_vacate": 1}


@pytest.mark.usefixtures("arriving", "launches")
def test_an_engine_has_compiled_all_its_kernels_before_the_first_request(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.jit import JITFunction

    seen = set[tuple[object, ...]]()

    def note(kernel: Any, *args: Any, grid: Any, warmup: bool, **constants: Any) -> None:
        """What Triton would compile a kernel of its own for: numbers that are 1, or multiples of 16."""
        free = [p.do_not_specialize for p in kernel.params]
        numbers = [(a == 1, a % 16) for a, any_ in zip(args, free, strict=False) if isinstance(a, int) and not any_]
        seen.add((kernel.fn.__name__, *numbers, *constants.items()))

    monkeypatch.setattr(JITFunction, "run", note)
    engine = meta_engine(2)
    warm = set(seen)
    for number in range(70):
        plan = a_plan(9 - number % 5, noise="torch" if number % 3 else "philox")
        frames = frozenset({0, 2} if number % 2 else ())
        for request in (a_request("long", T), a_request("floats", T - 1, wants_floats=True)):
            engine.submit(request)
        engine.step()
        engine.submit(a_request("other", plan=plan, frames=frames))
        engine.submit(a_request("short", 1))  # one of them has to make room
        engine.step()
        engine.cancel("other")
        run(engine)

    step = {"_enter", "_update"}
    assert {name for name, *_ in seen} == {"_seat", "_show", "_vacate"} | step
    assert {kernel for kernel in seen if kernel[0] not in step} == warm


# Where it is not used


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton is tried on a CPU, where it does not work."""
    monkeypatch.setattr(model.nets.layers, "TRITON_ON", frozenset({"cpu"}))
    model.nets.layers._triton_works.cache_clear()
    yield
    model.nets.layers._triton_works.cache_clear()


@pytest.mark.usefixtures("on_cpu")
@torch.inference_mode()
def test_where_triton_does_not_work_torch_computes_and_one_line_says_so(caplog: pytest.LogCaptureFixture) -> None:
    net = twin(shaken(small()))
    x, embedding = torch.randn(2, 3, 8, 8), net.embed(torch.tensor([1, 2]))
    with caplog.at_level(logging.WARNING):
        use_libraries(net)
        given = net(x.contiguous(memory_format=torch.channels_last), embedding)

    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "no Triton on cpu" in caplog.text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.nets.layers, "TRITON_ON", frozenset())
        use_libraries(net)
        assert torch.equal(given, net(x.contiguous(memory_format=torch.channels_last), embedding))


def test_on_a_cpu_it_is_not_even_imported() -> None:
    code = "import sys, model.engine.engine, model.train.train; sys.exit('triton' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("kind", ["default", "scale_shift"])
@torch.inference_mode()
def test_taking_over_biases_changes_only_the_rounding(kind: str) -> None:
    net = twin(shaken(small(resnet_time_scale_shift=kind)))
    x, embedding = torch.randn(2, 3, 8, 8), net.embed(torch.tensor([1, 800]))
    expected = net(x, embedding)
    for module in list(net.modules()):
        if isinstance(module, Resnet | Attention):
            module.fuse()

    assert relative_error(net(x, embedding), expected) < 2e-6
