"""The step can be captured as a CUDA graph, shown without a GPU.

The "meta" device stands for the GPU. Its tensors have no values, so reading one on the host, or making a shape depend
on one, raises; and a mode notices every tensor that is made elsewhere, which a graph would not replay.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model.engine.runner
from model.checkpoint.load import Model
from model.engine.runner import Runner, prepared
from model.engine.slots import Slots
from model.engine.step import denoise
from model.nets.unet import UNet
from model.sampling.schedule import Thresholding
from tests.model.tiny import ARCHITECTURE, CPU, T, a_plan, card, tiny_model

META = torch.device("meta")


class HostTouched(AssertionError):
    """An operation made or read a tensor on the host."""


class NoNumbers(TorchFunctionMode):
    """Raises HostTouched where a tensor is made of Python or numpy numbers: a graph would keep the first ones."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy):
            raise HostTouched(func.__name__)
        return func(*args, **(kwargs or {}))


class NoHost(TorchDispatchMode):
    """Raises HostTouched on any operation whose tensors are not all on the meta device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        elsewhere = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor) and t.device != META]
        if elsewhere:
            raise HostTouched(str(func))
        return result


def meta_world(learned: bool = False) -> tuple[UNet, Tensor, Slots]:
    """A net, its table and three slots on the meta device."""
    with META:
        net = UNet(replace(ARCHITECTURE, out_channels=2 if learned else 1)).eval().requires_grad_(False)
        return net, torch.zeros(T, net.embedding_width), Slots(3, ARCHITECTURE.shape, T, META)


@contextmanager
def capturing() -> Iterator[None]:
    """As in a capture: no host, no gradients."""
    with torch.inference_mode(), NoNumbers(), NoHost():  # type: ignore[no-untyped-call]
        yield


@pytest.mark.parametrize("thresholding", [None, Thresholding(0.9, 2.0)], ids=["clamped", "thresholded"])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_the_step_never_looks_at_the_host(batch: int, learned: bool, thresholding: Thresholding | None) -> None:
    net, table, slots = meta_world(learned)
    with capturing():
        denoise(net, table, slots, batch, thresholding)

    assert slots.ahead_steps == 0  # so its noise was drawn inside the step


SLIPS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "branch": lambda x: 1 if x.any() else 0,
    "list": lambda x: x.tolist(),
    "data-dependent shape": lambda x: x[x > 0],
    "tensor on the host": lambda x: torch.arange(len(x)),
    "numbers from the host": lambda x: torch.tensor([1.0, 2.0], device=META),
    "copy from the host": lambda x: torch.zeros(2, device="cpu").to(META),
    "copy to the host": lambda x: x.cpu(),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_in_the_step_would_be_noticed(slip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, table, slots = meta_world()
    usual = Slots.noise

    def noise(self: Slots, batch: int) -> Any:
        SLIPS[slip](self.x[:batch])
        return usual(self, batch)

    monkeypatch.setattr(Slots, "noise", noise)
    with pytest.raises((HostTouched, RuntimeError, NotImplementedError)), capturing():
        denoise(net, table, slots, 2)


def test_the_step_writes_in_place() -> None:
    runner = prepared(tiny_model(), 3)
    names = ("x", "x0", "given", "history", "rows", "cursor", "last", "seed", "ahead")
    before = {name: getattr(runner.slots, name).data_ptr() for name in names}
    runner.slots.seat(0, 1, a_plan(5), runner.slots.draw_initial([1])[0])
    runner.slots.seat(1, 2, a_plan(3), runner.slots.draw_initial([2])[0])
    for bucket in (1, 2, 3):
        runner.step(bucket)
    runner.slots.move(1, 0)
    runner.slots.clear(1)

    assert {name: getattr(runner.slots, name).data_ptr() for name in names} == before


def test_noise_inside_the_step_is_the_noise_drawn_ahead() -> None:
    model, ahead, inside = tiny_model(), Slots(2, ARCHITECTURE.shape, T, CPU), Slots(2, ARCHITECTURE.shape, T, CPU)
    inside.ahead = torch.zeros(2, 0, *ARCHITECTURE.shape)
    for slot, (seed, steps) in enumerate([(3, 5), (4, 2)]):
        ahead.seat(slot, seed, a_plan(steps), ahead.draw_initial([seed])[0])
        ahead.draw_ahead([slot], seed, 0)
        inside.seat(slot, seed, a_plan(steps), inside.draw_initial([seed])[0])
    with torch.inference_mode():
        for _ in range(5):
            denoise(model.net, model.table, ahead, 2)
            denoise(model.net, model.table, inside, 2)

    assert torch.equal(ahead.x, inside.x)


# Capturing itself, with a torch.cuda that writes down what it is asked


@dataclass
class FakeCuda:
    """A diary in place of a GPU: (what, batch size, stream, pool) in order."""

    diary: list[tuple[str, int, str, str]] = field(default_factory=list)
    prepared: list[tuple[bool, torch.dtype]] = field(default_factory=list)  # what it was set up for
    stream: str = "usual"
    pool: str = ""
    streams: int = 0
    pools: int = 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Puts this in the place of what the runner uses of torch.cuda."""
        cuda = self

        class Stream:
            def __init__(self, device: torch.device | None = None) -> None:
                cuda.streams += 1
                self.name = f"stream {cuda.streams}"

            def wait_stream(self, other: object) -> None:
                cuda.diary.append(("wait", 0, self.name, ""))

        class Graph:
            def __init__(self) -> None:
                self.batch = 0

            def replay(self) -> None:
                cuda.diary.append(("replay", self.batch, cuda.stream, ""))

        usual = Stream()
        cuda.streams, usual.name = 0, "usual"

        @contextmanager
        def stream(chosen: Stream) -> Iterator[None]:
            before, cuda.stream = cuda.stream, chosen.name
            yield
            cuda.stream = before

        @contextmanager
        def graph(target: Graph, pool: str, stream: Stream, capture_error_mode: str) -> Iterator[None]:
            before, cuda.stream, cuda.pool = cuda.stream, stream.name, pool
            yield
            target.batch = cuda.diary[-1][1]
            cuda.stream, cuda.pool = before, ""

        def graph_pool_handle() -> str:
            cuda.pools += 1
            return f"pool {cuda.pools}"

        def record(net: UNet, table: Tensor, slots: Slots, batch: int, thresholding: None) -> None:
            cuda.diary.append(("capture" if cuda.pool else "run", batch, cuda.stream, cuda.pool))

        for name, value in {
            "Stream": Stream,
            "CUDAGraph": Graph,
            "stream": stream,
            "graph": graph,
            "current_stream": lambda device=None: usual,
            "graph_pool_handle": graph_pool_handle,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(model.engine.runner, "warm_up", lambda slots: iter(()))
        monkeypatch.setattr(model.engine.runner, "denoise", record)
        monkeypatch.setattr(model.engine.runner, "prepare_gpu", lambda *how: cuda.prepared.append(how))


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """A torch.cuda that only keeps a diary."""
    fake = FakeCuda()
    fake.install(monkeypatch)
    return fake


def on_a_gpu(net: nn.Module, slots: int) -> Runner:
    """A runner whose tensors say they are on a GPU."""
    with FakeTensorMode():
        return Runner(Model(card(), cast(UNet, net), torch.zeros(T, 1, device="cuda")), slots, exact=False)


def prepare(runner: Runner, cuda: FakeCuda) -> None:
    """Prepares a runner, and writes down when others may make their steps."""
    with FakeTensorMode():
        for _ in runner.prepare():
            cuda.diary.append(("others", 0, cuda.stream, cuda.pool))


def captured_runner(slots: int) -> Runner:
    """A runner on a GPU that is ready."""
    runner = on_a_gpu(tiny_model().module, slots)
    with FakeTensorMode():
        for _ in runner.prepare():
            pass
    return runner


def test_a_gpu_is_set_up_for_the_promise_and_the_type_of_the_net(cuda: FakeCuda) -> None:
    captured_runner(2)

    assert cuda.prepared == [(False, torch.float32)]


def test_every_bucket_is_warm_before_the_first_capture(cuda: FakeCuda) -> None:
    captured_runner(4)
    doings = [what for what, *_ in cuda.diary if what != "wait"]
    first = doings.index("capture")

    assert {batch for what, batch, *_ in cuda.diary if what == "run"} == {1, 2, 3, 4}
    assert set(doings[:first]) == {"run"} and set(doings[first:]) == {"capture"}


def test_graphs_are_captured_from_the_largest_down_on_one_stream_in_one_pool(cuda: FakeCuda) -> None:
    captured_runner(4)

    assert [entry for entry in cuda.diary if entry[0] == "capture"] == [
        ("capture", batch, "stream 1", "pool 1") for batch in (4, 3, 2, 1)
    ]
    assert (cuda.streams, cuda.pools) == (1, 1)


def test_the_warm_up_runs_on_the_stream_of_the_capture_and_is_waited_for(cuda: FakeCuda) -> None:
    captured_runner(2)
    before_capture = cuda.diary[1 : [what for what, *_ in cuda.diary].index("capture")]

    assert cuda.diary[0] == ("run", 1, "usual", "")  # a first step, by which everything is compiled
    assert {stream for what, _, stream, _ in before_capture if what == "run"} == {"stream 1"}
    assert before_capture[0] == ("wait", 0, "stream 1", "")  # for what the slots were made by
    assert before_capture[-1] == ("wait", 0, "usual", "")


def test_from_then_on_every_step_is_a_replay(cuda: FakeCuda) -> None:
    runner = captured_runner(4)
    cuda.diary.clear()
    for bucket in (1, 4, 2, 3):
        runner.step(bucket)

    assert cuda.diary == [("replay", batch, "usual", "") for batch in (1, 4, 2, 3)]


def test_others_make_steps_after_each_batch_size_and_never_on_the_stream_of_the_capture(cuda: FakeCuda) -> None:
    prepare(on_a_gpu(tiny_model().module, 3), cuda)
    doings = [what for what, *_ in cuda.diary if what != "wait"]

    assert doings == ["run", "others"] + ["run", "run", "others"] * 3 + ["capture", "others"] * 3
    assert {(stream, pool) for what, _, stream, pool in cuda.diary if what == "others"} == {("usual", "")}


class Layer(nn.Module):
    """A layer that notes when it is computed. Layers of one name are compiled together."""

    def __init__(self, cuda: FakeCuda, name: str) -> None:
        super().__init__()
        self.gpu, self.name = cuda, name

    def extra_repr(self) -> str:
        return self.name

    def forward(self, x: Tensor) -> Tensor:
        self.gpu.diary.append(("layer", len(x), self.gpu.stream, self.gpu.pool))
        return x


@pytest.fixture
def layers(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A net of four layers of three kinds, two of them in a block, on the GPU that keeps a diary."""

    def denoise(net: nn.Module, table: Tensor, slots: Slots, batch: int, thresholding: None) -> None:
        net(torch.zeros(batch))
        cuda.diary.append(("capture" if cuda.pool else "run", batch, cuda.stream, cuda.pool))

    monkeypatch.setattr(model.engine.runner, "denoise", denoise)
    net: Any = nn.Sequential(Layer(cuda, "a"), nn.Sequential(Layer(cuda, "b"), Layer(cuda, "a")), Layer(cuda, "c"))
    net.arch = ARCHITECTURE
    return net  # type: ignore[no-any-return]


def test_others_make_steps_after_each_kind_of_layer_that_is_compiled(cuda: FakeCuda, layers: nn.Module) -> None:
    prepare(on_a_gpu(layers, 2), cuda)
    doings = [what for what, *_ in cuda.diary if what != "wait"]
    step = ["layer"] * 4

    assert doings == (
        [*step[:1], "others", *step[:3], "others", *step, "run", "others"]
        + [*step, "run", *step, "run", "others"] * 2
        + [*step, "capture", "others"] * 2
    )
    assert {(stream, pool) for what, _, stream, pool in cuda.diary if what == "others"} == {("usual", "")}


@pytest.mark.parametrize("pieces", [1, 2, 3])
@pytest.mark.usefixtures("cuda")
def test_a_start_that_is_given_up_leaves_the_net_as_it_was(layers: nn.Module, pieces: int) -> None:
    with FakeTensorMode():
        preparing = on_a_gpu(layers, 2).prepare()
        for _ in range(pieces):
            next(preparing)

        assert [len(module._forward_pre_hooks) for module in layers.modules()] == [0] * 6
        del preparing
    assert [len(module._forward_pre_hooks) for module in layers.modules()] == [0] * 6


def test_code_that_runs_between_two_pieces_of_a_start_is_not_in_inference_mode(layers: nn.Module) -> None:
    runner = on_a_gpu(layers, 2)
    with FakeTensorMode():
        modes = {torch.is_inference_mode_enabled() for _ in runner.prepare()}

    assert modes == {False}
