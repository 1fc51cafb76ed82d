"""A model serves as soon as it can make one picture; larger batches are compiled in the background."""

import gc
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from model.checkpoint.card import ModelCard, read_card
from model.checkpoint.load import load_layers
from model.engine.runner import prepared
from model.errors import ModelRefused
from model.nets import openvino_graph
from model.nets.build import Net
from model.nets.cpu import CpuNet
from model.nets.openvino_graph import Run
from model.nets.unet import UNet
from server.engines.build import _starts
from server.settings import Settings
from server.worker import device, loader
from server.worker.loader import Loaded, Loader
from server.worker.messages import Start
from tests.model.convert.directories import weights, write_model, write_plan
from tests.model.tiny import a_request as request
from tests.model.tiny import pictures, run
from tests.server.conftest import Server

PATIENCE_S = 60.0


class Gate:
    """Holds up the compilation of batches of two or more until it is opened. `compiled`: the batch sizes, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.compiled, self.reached, self.opened = list[int](), threading.Event(), threading.Event()
        usual = openvino_graph.compile_net

        def compile_net(
            net: Net, shape: Sequence[int], batch: int, dtype: torch.dtype, threads: int
        ) -> Callable[[], Run]:
            self.compiled.append(batch)
            if batch > 1:
                self.reached.set()
                assert self.opened.wait(PATIENCE_S)
            return usual(net, shape, batch, dtype, threads)

        monkeypatch.setattr(openvino_graph, "compile_net", compile_net)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """A gate, which the end of the test opens; torch's threads are as before then."""
    before, made = torch.get_num_threads(), Gate(monkeypatch)
    yield made
    made.opened.set()
    torch.set_num_threads(before)


def load(directory: Path) -> Loaded:
    """A model with eight slots, as an engine process loads it."""
    card = read_card(write_model(directory / "tiny"))
    start = Start(
        models=(("tiny", card.directory),),
        device="cpu",
        dtype="float32",
        slots=8,
        threads=1,
        exact=True,
        log_level="warning",
    )
    return driven(Loader(start).load(card, card.digest))


def start_of(directory: Path, **options: Any) -> Start:
    """What an engine is told that serves this directory alone."""
    numbers: dict[str, Any] = {"device": "cpu", "dtype": "float32", "slots": 1, "threads": 1, "exact": True}
    return Start(models=(("tiny", directory),), log_level="warning", **numbers | options)


def driven(load: Generator[float, None, Loaded]) -> Loaded:
    """What a load comes to, if nothing else is to be done meanwhile."""
    while True:
        try:
            time.sleep(next(load))
        except StopIteration as end:
            loaded: Loaded = end.value
            return loaded


def growing() -> list[threading.Thread]:
    """The threads that go on to compile larger batch sizes."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


def wait_until_grown() -> None:
    """Waits until larger batch sizes are there, or never will be."""
    for thread in growing():
        thread.join(PATIENCE_S)


def net(loaded: Loaded) -> CpuNet:
    """What computes its steps."""
    made = loaded.engine.runner.model.net
    assert isinstance(made, CpuNet)
    return made


def test_a_model_is_served_before_the_larger_batches_are_compiled(tmp_path: Path, gate: Gate) -> None:
    loaded = load(tmp_path)
    assert gate.reached.wait(PATIENCE_S)

    assert net(loaded).sizes == [1]
    assert (loaded.status.loaded, loaded.status.admitted) == (True, [1, 2, 3, 4, 5, 6, 7, 8])
    early = run(loaded.engine, *(request(seed, seed=seed) for seed in range(3)))
    assert net(loaded).sizes == [1]

    gate.opened.set()
    wait_until_grown()
    assert net(loaded).sizes == [1, 2, 4, 8]
    late = run(loaded.engine, *(request(seed, seed=seed) for seed in range(3)))
    assert pictures(early) == pictures(late)


def test_a_model_that_has_been_unloaded_grows_no_further(tmp_path: Path, gate: Gate) -> None:
    loaded = load(tmp_path)
    assert gate.reached.wait(PATIENCE_S)
    del loaded
    gc.collect()
    gate.opened.set()
    wait_until_grown()

    assert gate.compiled[-1] == 2


def test_the_thread_of_a_load_ends_once_all_sizes_are_there(tmp_path: Path, gate: Gate) -> None:
    loaded = load(tmp_path)
    assert len(growing()) == 1
    gate.opened.set()
    wait_until_grown()

    assert net(loaded).sizes == [1, 2, 4, 8]
    assert growing() == []


def test_an_engine_has_no_weights_file_mapped(server: Server, weights: Path) -> None:
    """A write to the file must not change what is served."""
    maps = Path(f"/proc/{server.engine_pid}/maps").read_text()

    assert "libtorch" in maps
    assert (str(weights) in maps, ".safetensors" in maps) == (False, False)


def test_a_machine_short_of_memory_serves_one_picture_at_a_time_and_says_so(
    gate: Gate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(device, "available_bytes", lambda *_: 0)
    with caplog.at_level("WARNING"):
        loaded = load(tmp_path)
        wait_until_grown()
    net = loaded.engine.runner.model.net
    assert isinstance(net, CpuNet)

    assert net.sizes == [1] and gate.compiled == [1]
    assert [record.getMessage().partition(" the next")[0] for record in caplog.records] == [
        "tiny: larger batch sizes are not compiled:"
    ]
    assert len(pictures(run(loaded.engine, *(request(i, 3, seed=i) for i in range(3))))) == 3


def test_weights_that_change_between_their_check_and_their_use_are_not_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card, before = read_card(write_model(tmp_path / "tiny")), torch.get_num_threads()
    digest = card.digest

    def read_then_change(directory: Path, name: str, plans: Any) -> ModelCard:
        read = read_card(directory, name, plans)
        assert read.digest == digest
        write_model(directory, tensors={name: tensor + 1 for name, tensor in weights().items()})
        return read

    monkeypatch.setattr(loader, "read_card", read_then_change)
    with pytest.raises(ModelRefused, match="changed while they were served"):
        driven(Loader(start_of(tmp_path / "tiny")).load(card, digest))
    torch.set_num_threads(before)


def test_an_engine_serves_no_other_configuration_than_the_api_process_has_read(tmp_path: Path) -> None:
    card, before = read_card(write_model(tmp_path / "tiny")), torch.get_num_threads()
    made = Loader(start_of(tmp_path / "tiny", configs={"tiny": card.configs}))
    assert made.announce("tiny", card.directory)[1].digest == card.digest

    write_model(tmp_path / "tiny", scheduler={"beta_end": 0.2})
    with pytest.raises(ModelRefused, match="changed while they were served"):
        made.announce("tiny", card.directory)
    torch.set_num_threads(before)


def test_an_engine_has_the_plans_that_the_api_process_has_read_whatever_is_there_now(tmp_path: Path) -> None:
    write_plan(write_model(tmp_path / "tiny"))
    card, before = read_card(tmp_path / "tiny"), torch.get_num_threads()
    (start,) = _starts(Settings(weights=tmp_path, device="cpu", dtype="float32", slots=1), {"tiny": card})
    write_plan(tmp_path / "tiny", b"")
    made = Loader(start)
    announced, status = made.announce("tiny", card.directory)
    loaded = driven(made.load(announced, status.digest)).engine.runner.model.card

    assert [*card.process.plans] == ["fast"]
    assert [each.process.plans for each in (announced, loaded)] == [card.process.plans] * 2
    torch.set_num_threads(before)


def test_every_load_runs_the_net_so_that_a_broken_device_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: UNet, *given: torch.Tensor) -> torch.Tensor:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    before = torch.get_num_threads()
    load(tmp_path)
    wait_until_grown()
    monkeypatch.setattr(UNet, "forward", broken)
    for _ in range(2):
        with pytest.raises(torch.AcceleratorError):
            load(tmp_path)
    torch.set_num_threads(before)


def test_a_load_onto_a_gpu_makes_whole_steps_of_the_smallest_and_the_largest_batch(
    tmp_path: Path,
) -> None:
    """Over the layers that a GPU runs, here on a CPU."""
    card = read_card(write_model(tmp_path / "tiny"))
    runner = prepared(load_layers(card, torch.device("cpu"), torch.float32), 4, exact=False)
    with mock.patch.object(runner, "step", wraps=runner.step) as steps:
        assert [step.bucket for step in loader._time_steps("tiny", runner)] == [1, 4]

    assert {call.args for call in steps.mock_calls} == {(1,), (4,)}
