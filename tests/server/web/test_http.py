"""Content negotiation by the Accept header."""

import pytest

from server.errors import NotAcceptable
from server.web.http import negotiate

NO_WEIGHTS = ("0_9", "+1", "1e0", "nan", "inf", "", ".", "-0", "1.1", "٠.٩", "0.9.", "0x1")
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
        *((f"image/png;q={weight}, application/zip;q=0.1", "application/zip") for weight in NO_WEIGHTS),
        ("text/html, *; q=.2, application/zip; q=.2", "application/zip"),  # of Java
        ("image/png;q=1.000, application/zip;q=0.999", "image/png"),
    ],
)
def test_the_most_specific_range_decides(accept: str | None, answer: str) -> None:
    assert negotiate(accept, OFFERS) == answer


def test_an_unknown_media_type_is_not_acceptable() -> None:
    with pytest.raises(NotAcceptable, match="application/zip"):
        negotiate("text/html", OFFERS)
