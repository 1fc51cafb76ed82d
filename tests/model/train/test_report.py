"""What is told of a training where there is no terminal: a line every ten seconds."""

import pytest

from model.train.report import Lines, Standing, duration

STANDING = Standing(seen=12800, images=640_000, loss=0.03125, images_per_s=41.25, left_s=15204, done=0.02)


def test_a_line_every_ten_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    seconds = 0.0
    lines = Lines(clock=lambda: seconds)
    told = list[float]()
    for seconds in (3.0, 9.9, 10.0, 10.1, 19.9, 20.5, 30.0, 31.0):
        lines.update(STANDING)
        told += [seconds] * len(capsys.readouterr().out.splitlines())

    assert told == [10.0, 20.5, 31.0]


def test_a_line_says_how_far_it_is_how_fast_and_how_long_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert str(STANDING) == "12,800 of 640,000 pictures, loss 0.0312, 41.2 pictures/s, 4 h 13 min left"


def test_where_the_minutes_decide_there_is_no_number_of_pictures() -> None:
    standing = Standing(seen=100, images=None, loss=1.0, images_per_s=10.0, left_s=100.0, done=0.5)

    assert str(standing) == "100 pictures, loss 1.0000, 10.0 pictures/s, 2 min left"


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (5300, "88 min"), (5400, "1 h 30 min")]
)
def test_durations_are_told_in_few_digits(seconds: float, words: str) -> None:
    assert duration(seconds) == words
