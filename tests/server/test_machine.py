"""What an engine tells the world of a model that it has loaded."""

from dataclasses import replace
from pathlib import Path

from model.card import read_card
from model.runner import Runner
from server import machine
from server.backend import Served
from tests.model.directories import write_model
from tests.model.test_runner import Function, different_in
from tests.model.tiny import function_model, halve


def described(directory: Path, slots: int, net: Function = halve, exact: bool = True) -> tuple[Runner, Served]:
    """A runner of this net, with the card of a directory, and what is told of it."""
    model = replace(function_model(net), card=read_card(write_model(directory / "tiny")))
    runner = Runner(model, slots, exact)
    return runner, machine.describe(runner, model, 0.0, 0)


def test_the_numerics_class_ends_with_a_hash_of_what_was_computed_at_the_start(tmp_path: Path) -> None:
    runner, served = described(tmp_path, 3)

    assert served.numerics.split("; ")[-2:] == ["exact 1-3", f"bits {runner.bits}"]


def test_where_nothing_is_promised_nothing_was_computed(tmp_path: Path) -> None:
    _, served = described(tmp_path, 3, exact=False)

    assert served.numerics.endswith("; float32; exact none")


def test_a_picture_that_is_padded_when_it_is_alone_is_a_note_of_its_model(tmp_path: Path) -> None:
    _, served = described(tmp_path, 4, different_in(1, 2))

    assert served.note == "a picture alone takes a batch of 3, since bits are others in batches of 1-2"
    assert (served.exact, served.admitted) == (True, [3, 4])
