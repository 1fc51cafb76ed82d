"""Models come and go between the steps of others."""

import errno
import os
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from model.checkpoint.card import ModelCard, read_card
from model.checkpoint.load import load_model
from model.engine.events import Event, Finished
from model.engine.footprint import footprint
from model.errors import ModelRefused
from model.sampling.plan import resolve
from server.worker import loader
from server.worker.loader import Loaded, Loader
from server.worker.messages import Cancel, Changed, Loading, Spec, Start, Submit
from server.worker.models import Models
from tests.model.convert.directories import weights, write_model
from tests.model.tiny import CPU, PROCESS

SAMPLING = resolve(PROCESS, steps=30)


@pytest.fixture(autouse=True)
def threads_of_torch() -> Iterator[None]:
    """Torch's threads, which an engine process sets, are as before."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Played:
    """Three models with room for two, and the loop that drives them. `told`: what the API process would be told."""

    def __init__(self, folder: Path) -> None:
        directories = tuple((name, write_model(folder / name)) for name in "abc")
        size_bytes = footprint(read_card(folder / "a"), 4, CPU, torch.float32).size_bytes
        start = Start(
            models=directories,
            device="cpu",
            dtype="float32",
            slots=4,
            threads=1,
            exact=True,
            log_level="warning",
            memory_bytes=size_bytes * 5 // 2,
        )
        self.told: list[Loading | Changed] = []
        self.models = Models(start, self.told.append)
        for pause_s in self.models.start():
            time.sleep(pause_s)

    def submit(self, model: str, first: int, n: int = 1) -> None:
        """Asks for samples, whose ids are their seeds."""
        seeds = tuple(range(first, first + n))
        self.models.handle(Submit(seeds, Spec(model=model, seeds=seeds, sampling=SAMPLING)))

    def turn(self) -> list[Event]:
        """One turn of the loop."""
        self.models.distribute()
        busy = self.models.busy
        self.models.seat(busy)
        self.models.arrange()
        return self.models.step(busy)

    @property
    def loaded(self) -> set[str]:
        """The models in memory."""
        return {name for name, status in self.models.statuses.items() if status.loaded}


def test_a_model_is_loaded_while_another_makes_its_steps(tmp_path: Path) -> None:
    played = Played(tmp_path)
    assert (played.loaded, played.told) == ({"a", "b"}, [])
    played.submit("a", 0, 64)
    played.turn()
    played.submit("c", 100)
    steps = 0
    while "c" not in played.loaded:
        before = played.models.stats.steps
        played.turn()
        steps += played.models.stats.steps - before

    assert steps > 1
    assert [(type(message), message.model) for message in played.told] == [
        (Changed, "b"),
        (Loading, "c"),
        (Changed, "c"),
    ]
    assert played.loaded == {"a", "c"}


def test_a_sample_that_is_held_for_a_model_waits_and_is_made_once_it_is_loaded(tmp_path: Path) -> None:
    played = Played(tmp_path)
    played.submit("c", 100)
    assert played.models.stats.waiting == 1

    ended = list[Event]()
    while not ended:
        ended += played.turn()

    assert [(type(event), event.id) for event in ended] == [(Finished, 100)]
    assert (played.models.stats.waiting, played.models.stats.seated) == (0, 0)


def test_a_model_is_not_loaded_for_samples_that_were_given_up_before(tmp_path: Path) -> None:
    played = Played(tmp_path)
    played.submit("c", 100)
    played.models.handle(Cancel((100,)))
    played.turn()

    assert (played.loaded, played.told) == ({"a", "b"}, [])


def start(folder: Path, default: str = "", gone: Path | None = None) -> Models:
    """The models of a folder, of which `bad` has weights that are not numbers, as far as they start."""
    bad = {name: tensor.log() for name, tensor in weights().items()}
    good = write_model(folder / "good")
    directories = (("bad", write_model(folder / "bad", tensors=bad)), ("good", good), ("gone", gone or folder / "gone"))
    numbers: dict[str, Any] = {"device": "cpu", "dtype": "float32", "slots": 1, "threads": 1, "exact": True}
    models = Models(Start(models=directories, default=default, log_level="warning", **numbers), print)
    for pause_s in models.start():
        time.sleep(pause_s)
    return models


def test_a_model_that_is_refused_at_the_first_start_is_left_out(tmp_path: Path) -> None:
    troubles = {name: status.trouble for name, status in start(tmp_path).statuses.items()}

    assert troubles.keys() == {"bad", "good", "gone"}
    assert troubles["good"] is None
    assert str(troubles["bad"]).endswith("holds numbers that are not finite")
    assert troubles["gone"] == "gone is not a directory"


@pytest.mark.parametrize("default", ["bad", "gone"])
def test_nothing_starts_without_the_default_model(tmp_path: Path, default: str) -> None:
    with pytest.raises(ModelRefused):
        start(tmp_path, default)


def test_a_model_that_the_memory_is_too_small_for_is_left_out_if_there_are_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = Loader.load

    def load(self: Loader, card: ModelCard, digest: str) -> Generator[float, None, Loaded]:
        if card.name == "good":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate " + "more, " * 100)
        loaded = yield from usual(self, card, digest)
        return loaded

    monkeypatch.setattr(Loader, "load", load)
    with pytest.raises(ModelRefused, match="not finite"):  # the first of those that are left out: none is left
        start(tmp_path)
    statuses = start(tmp_path, gone=write_model(tmp_path / "other")).statuses
    assert (statuses["good"].trouble, statuses["gone"].loaded) == ("the memory of the device is too small for it", True)
    with pytest.raises(torch.OutOfMemoryError):
        start(tmp_path, default="good")


@pytest.mark.parametrize(
    "number", [errno.ENFILE, *(pytest.param(each, marks=pytest.mark.long) for each in (errno.ESTALE, errno.EIO))]
)
def test_a_file_that_cannot_be_read_for_a_moment_refuses_no_model_and_ends_no_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    played, reads, usual = Played(tmp_path), list[int](), load_model
    played.submit("a", 0, 64)
    played.submit("c", 100)

    def read(*given: Any) -> Any:
        reads.append(played.models.stats.steps)
        if len(reads) < 4:
            try:
                raise OSError(number, os.strerror(number))
            except OSError as error:
                raise ModelRefused("it could not be read") from error
        return usual(*given)

    monkeypatch.setattr(loader, "RETRY_S", 0.01)
    monkeypatch.setattr(loader, "load_model", read)
    with caplog.at_level("INFO", "server.troubles"):
        while played.models.statuses["c"].trouble is None and "c" not in played.loaded:
            played.turn()

    lasts = number == errno.EIO
    assert played.models.statuses["c"].trouble == ("it could not be read" if lasts else None)
    assert [record.getMessage() for record in caplog.records] == (
        [] if lasts else ["a resource is short", "a resource is no longer short"]
    )
    assert lasts or reads[0] < reads[3]  # others make their steps meanwhile


@pytest.mark.parametrize("lack", [OSError(errno.EMFILE, ""), MemoryError(), RuntimeError("can't start new thread")])
def test_a_start_that_finds_too_little_leaves_no_model_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lack: Exception
) -> None:
    failures = {"announce": [lack, lack], "_read": [lack, lack]}

    def rarely(name: str) -> None:
        usual = getattr(Loader, name)

        def work(self: Loader, *given: Any) -> Any:
            if failures[name]:
                raise failures[name].pop()
            return usual(self, *given)

        monkeypatch.setattr(Loader, name, work)

    monkeypatch.setattr(loader, "RETRY_S", 0.01)
    for name in failures:
        rarely(name)
    troubles = {name: status.trouble for name, status in start(tmp_path).statuses.items()}

    assert troubles["good"] is None
    assert str(troubles["bad"]).endswith("holds numbers that are not finite")
    assert failures == {"announce": [], "_read": []}
