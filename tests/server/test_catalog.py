"""Which models a folder lists, and under which names."""

from pathlib import Path

from server.catalog import find_models
from tests.model.convert.directories import write_model


def test_a_link_has_its_own_name_beside_what_it_leads_to(tmp_path: Path) -> None:
    write_model(tmp_path / "weights" / "digits")
    (tmp_path / "weights" / "latest").symlink_to("digits")
    (tmp_path / "here").symlink_to("weights/digits")

    assert [card.name for card in find_models(tmp_path / "weights").values()] == ["digits", "latest"]
    assert list(find_models(tmp_path / "here")) == ["digits"]
