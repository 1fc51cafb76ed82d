"""Which models a folder lists, and under which names."""

from pathlib import Path

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


@pytest.mark.parametrize("weights", ["", " ", ",", " , "])
def test_an_empty_list_lists_nothing_not_even_where_the_server_starts(
    weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path / "stray")
    monkeypatch.chdir(tmp_path)

    with pytest.raises(ModelRefused, match="DDPM_WEIGHTS names no model"):
        find_models(weights)
