"""Facts: on disk the moment they are known, read as they come, and the most important in a table."""

from pathlib import Path

from benchmarks.gpu.facts import Fact, Reader, Setting, table, tell


def setting(out: Path) -> Setting:
    """Of a stage that nobody ends."""
    return Setting(stage="s", work="", out=str(out), scratch="", dry=True, began_s=0.0, until_s=1e12)


def test_the_table_has_forty_lines_and_what_matters_most_comes_first(tmp_path: Path) -> None:
    reader = Reader(tmp_path / "facts.jsonl")
    for i in range(60):
        tell(setting(tmp_path), Fact(f"number {i}", i, main=i > 40))
    lines = table([*reader.news()])

    assert len(lines) == 40
    assert [line.split()[2] for line in lines[:20]] == [str(i) for i in [*range(41, 60), 0]]


def test_half_a_line_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "facts.jsonl"
    reader = Reader(path)
    path.write_text('{"name": "whole"}\n{"name": ')
    first = [*reader.news()]
    with path.open("a") as file:
        file.write('"late"}\n')

    assert (first, [*reader.news()]) == ([{"name": "whole"}], [{"name": "late"}])
