"""What is told of an error of Python or of the operating system."""

import json

import pytest

from model.errors import reason


def raised(text: str) -> Exception:
    with pytest.raises((ValueError, RecursionError)) as caught:
        json.loads(text)
    return caught.value


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (raised('{"a": }'), "Expecting value: line 1 column 7 (char 6)"),
        (raised("[" * 200_000), "it is nested too deeply"),
        (PermissionError(13, "Permission denied", "/etc/shadow"), "Permission denied"),
        (ValueError("a \x1b[31mred\u2028line\nand another"), r"a \x1b[31mred"),
        (ValueError("x" * 1000), "x" * 200),
        (ValueError("\x1b" * 1000), r"\x1b" * 50),
        (raised("1" * 5000), "Exceeds the limit (4300 digits) for integer string conversion: value has 5000 digits"),
        (MemoryError(), "MemoryError"),
        (KeyError(101), "KeyError"),
    ],
    ids=["position", "nested", "system", "one clean line", "short", "short, too", "digits", "silent", "a key"],
)
def test_a_reason_is_a_line_for_people(error: Exception, said: str) -> None:
    assert reason(error) == said
