"""What tests of conversion share."""

import pytest

from model.convert import sources
from model.convert.pickles import extract


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has pickles read in this process, for tests of what is found in them: one of its own imports torch each time.

    That the process finds the same, that it has limits, and what becomes of a pickle that wants more, are tested in
    test_convert.py.
    """
    monkeypatch.setattr(sources, "unpickle", extract)
