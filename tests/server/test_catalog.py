"""Which models a folder lists, and under which names."""

import builtins
import errno
import io
from pathlib import Path
from typing import Any

import pytest

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
