"""Which models a folder lists, and under which names."""

import builtins
import errno
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from model.errors import ModelRefused
from server.catalog import find_models
from tests.model.convert.directories import write_model


def test_a_link_has_its_own_name_beside_what_it_leads_to(tmp_path: Path) -> None:
    write_model(tmp_path / "weights" / "digits")
    (tmp_path / "weights" / "latest").symlink_to("digits")
    (tmp_path / "here").symlink_to("weights/digits")

    assert [card.name for card in find_models(tmp_path / "weights").values()] == ["digits", "latest"]
    assert list(find_models(tmp_path / "here")) == ["digits"]


@pytest.mark.parametrize("suffix", ["config.json", ".safetensors"])
def test_a_model_that_cannot_be_read_for_a_moment_is_not_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    for name in "ab":
        write_model(tmp_path / name)
    usual = io.open

    def rarely(path: Any, *more: Any, **named: Any) -> Any:
        if str(path).endswith(suffix) and "/b/" in str(path):
            raise OSError(errno.EMFILE, "Too many open files")
        return usual(path, *more, **named)

    monkeypatch.setattr(io, "open", rarely)
    monkeypatch.setattr(builtins, "open", rarely)
    with pytest.raises(OSError, match="Too many open files"):
        find_models(tmp_path)


def test_a_name_belongs_to_the_first_place_and_the_second_is_told_of(tmp_path: Path) -> None:
    first, second = write_model(tmp_path / "a" / "digits"), write_model(tmp_path / "b" / "digits")
    write_model(tmp_path / "b" / "others")
    found = find_models(f"{first.parent},{second.parent}")

    assert {name: card.directory for name, card in found.items()} == {
        "digits": first,
        "others": second.parent / "others",
    }
    assert found.refused == {
        "digits (2)": f"{second} has the name of {first}, which is listed first; rename one",
    }


def test_a_damaged_model_is_not_replaced_by_another_of_its_name(tmp_path: Path) -> None:
    (tmp_path / "a" / "digits").mkdir(parents=True)
    write_model(tmp_path / "b" / "digits")
    write_model(tmp_path / "b" / "others")
    found = find_models(f"{tmp_path / 'a'},{tmp_path / 'b'}")

    assert list(found) == ["others"]
    assert found.refused["digits"] == "config.json is missing"
    assert found.refused["digits (2)"].startswith(f"{tmp_path / 'b' / 'digits'} has the name of ")


def test_one_directory_that_is_listed_twice_is_one_model(tmp_path: Path) -> None:
    digits = write_model(tmp_path / "weights" / "digits")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "digits").symlink_to(digits)
    found = find_models(f"{digits.parent},{digits},{tmp_path / 'more'}")

    assert (list(found), found.refused) == (["digits"], {})


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("empty", "holds no model directory"),
        ("closed", "could not be read: Permission denied"),
        ("n" * 300, "is not a directory"),
    ],
)
def test_a_place_without_a_model_does_not_keep_the_others_from_being_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: str, said: str
) -> None:
    write_model(tmp_path / "digits")
    for name in ("empty", "closed"):
        (tmp_path / name).mkdir()
    listed = Path.iterdir

    def iterdir(path: Path) -> Iterator[Path]:
        if path.name == "closed":
            raise PermissionError(errno.EACCES, "Permission denied")
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    found = find_models(f"{tmp_path / 'digits'},{tmp_path / bad}")

    assert (list(found), found.refused) == (["digits"], {bad: said})


def test_a_link_that_leads_nowhere_is_told_of(tmp_path: Path) -> None:
    write_model(tmp_path / "digits")
    (tmp_path / "faces").symlink_to("/volume/that/is/missing")
    (tmp_path / "notes.txt").write_text("no model")

    assert find_models(tmp_path).refused == {"faces": "faces is not a directory"}


@pytest.mark.parametrize("weights", ["", " ", ",", " , "])
def test_an_empty_list_lists_nothing_not_even_where_the_server_starts(
    weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path / "stray")
    monkeypatch.chdir(tmp_path)

    with pytest.raises(ModelRefused, match="DDPM_WEIGHTS names no model"):
        find_models(weights)
