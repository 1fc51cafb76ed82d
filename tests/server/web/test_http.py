"""Content negotiation by the Accept header."""

import pytest

from server.errors import NotAcceptable
from server.web.http import negotiate

OFFERS = ("image/png", "application/json", "application/zip")


@pytest.mark.parametrize(
    ("accept", "answer"),
    [
        (None, "image/png"),
        ("*/*", "image/png"),
        ("", "image/png"),
        ("application/json", "application/json"),
        ("application/*", "application/json"),
        ("text/html, application/zip", "application/zip"),
        ("image/png;q=0.1, application/json;q=0.5", "application/json"),
        ("*/*;q=0.1, application/zip", "application/zip"),
        ("image/png;q=0, */*", "application/json"),
        ("IMAGE/PNG", "image/png"),
        ("image/png;q=nonsense, application/zip", "application/zip"),
    ],
)
def test_the_most_specific_range_decides(accept: str | None, answer: str) -> None:
    assert negotiate(accept, OFFERS) == answer


def test_an_unknown_media_type_is_not_acceptable() -> None:
    with pytest.raises(NotAcceptable, match="application/zip"):
        negotiate("text/html", OFFERS)
