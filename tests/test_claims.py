"""Whatever a document says has something that shows it: a test, a run or, for other programs, a source."""

import ast
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.training import OWN
from model.checkpoint.card import read_card
from model.checkpoint.shapes import count, shapes
from model.engine.footprint import footprint
from tests.test_docs import DOCUMENTS, ROOT, headings

CLAIMS = (ROOT / "docs" / "claims.md").read_text()
README, START = (ROOT / "README.md").read_text(), (ROOT / "docs" / "quick-start.md").read_text()
HISTORY = ("CHANGELOG.md", "RESULTS.md")  # which name what was there then
EVIDENCE = re.compile(
    r"(?P<test>\btests/[\w/]+\.py)(?:::(?P<name>\w+))?|`(?P<alone>test_\w+)`"
    r"|(?P<file>\bbenchmarks/[\w./-]+\.\w+)|`make (?P<target>[\w-]+)|\bpython3? -m (?P<module>[\w.]+)"
)
NUMBER = re.compile(r"\d+(?:\.\d+)?")
OURS = ("benchmarks", "model", "server", "tests")
NO_SERVER = "no server"
PAGES = ("operations", "numerics", "watching")


@cache
def named_in(path: Path) -> frozenset[str]:
    """The names of the tests in a file."""
    functions = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef))
    return frozenset(each.name for each in functions if each.name.startswith("test_"))


@cache
def long_in(path: Path) -> frozenset[str]:
    """The names of the tests in a file that CI does without, whatever their parameters."""
    functions = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef))
    return frozenset(f.name for f in functions if "pytest.mark.long" in map(ast.unparse, f.decorator_list))


@cache
def all_tests() -> frozenset[str]:
    """The names of all tests."""
    return frozenset[str]().union(*map(named_in, (ROOT / "tests").rglob("*.py")))


def is_there(found: re.Match[str]) -> bool:
    """Whether a piece of evidence that is named exists."""
    test, name, alone, file, target, module = (found[key] for key in EVIDENCE.groupindex)
    if test:
        return (ROOT / test).is_file() and (not name or name in named_in(ROOT / test))
    if alone:
        return alone in all_tests()
    if file:
        return (ROOT / file).exists()
    if target:
        return re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE) is not None
    path = ROOT / module.rstrip(".").replace(".", "/")
    return not module.startswith(OURS) or path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()


def tables(text: str) -> list[list[list[str]]]:
    """The tables of a text, each as rows of cells, without its line of dashes."""
    found = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    return [[[c.strip() for c in r[1:-1].split("|")] for r in t.splitlines() if set(r) - set("|-")] for t in found]


def section(title: str) -> str:
    """What docs/claims.md has under a heading, by the name of its link."""
    parts = re.split(r"^#+ (.+)\n", CLAIMS, flags=re.MULTILINE)
    named = {
        re.sub(r"[^\w\- ]", "", name.lower()).replace(" ", "-"): text
        for name, text in zip(parts[1::2], parts[2::2], strict=True)
    }
    return named[title]


def measured(kind: str) -> dict[str, list[float]]:
    """What the run that docs/claims.md names, of a kind or of a date too, has measured: the value, then the spread."""
    (file,) = set(re.findall(rf"benchmarks/results/[\w-]*{kind}\.jsonl", CLAIMS))
    lines = map(json.loads, (ROOT / file).read_text().splitlines()[1:])
    return {line["name"]: [line["value"], *line.get("spread", [])] for line in lines}


def as_written(text: str, values: Iterator[float]) -> list[str]:
    """Values with as many decimals as the numbers in a text have."""
    return [
        f"{value:.{len(number.partition('.')[2])}f}" for number, value in zip(NUMBER.findall(text), values, strict=True)
    ]


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if d.name not in HISTORY], ids=lambda d: d.name)
def test_every_test_run_and_command_that_a_document_names_is_there(document: Path) -> None:
    assert [found[0] for found in EVIDENCE.finditer(document.read_text()) if not is_there(found)] == []


def test_what_is_not_there_is_noticed() -> None:
    gone = "tests/test_gone.py `tests/test_docs.py::test_gone` `test_gone` benchmarks/gone.py `make gone` "
    gone += "python -m tests.gone"
    there = (
        "tests/test_docs.py `tests/test_docs.py::test_every_link_leads_somewhere` `make chaos` python -m benchmarks.gpu"
    )

    assert [is_there(found) for found in EVIDENCE.finditer(gone)] == [False] * 6
    assert [is_there(found) for found in EVIDENCE.finditer(there)] == [True] * 4


def test_every_claim_about_ourselves_is_shown_by_something() -> None:
    ((_, *rows),) = tables(section("this-server"))

    assert [claim for claim, shown in rows if EVIDENCE.search(shown) is None] == []


def test_what_the_readme_says_of_us_is_among_the_claims() -> None:
    ((_, *rows),) = tables(section("this-server"))
    claimed = {part for claim, _ in rows for part in claim.split("; ")}
    bullets = re.findall(r"^- \*\*(.+?)\*\*", README, re.MULTILINE)
    comparison = next(table for table in tables(README) if table[0][:2] == ["", "this"])

    assert len(bullets) == 7
    assert {*bullets, *(row[0] for row in comparison[1:])} - claimed == set()


def test_each_cell_about_another_program_has_a_source() -> None:
    (_, _, *peers), *rows = next(table for table in tables(README) if table[0][:2] == ["", "this"])
    for column, peer in enumerate(peers, 2):
        (anchor,) = re.findall(r"\(docs/claims\.md#([\w-]+)\)", peer)
        ((_, *sources),) = tables(section(anchor))
        assert [[row, says] for row, says, _ in sources] == [[row[0], row[column]] for row in rows], peer
        assert [
            row for row, says, source in sources if says != NO_SERVER and not re.search(r"\]\(|`|not found", source)
        ] == []
    assert len(peers) == 7 == len(headings(ROOT / "docs" / "claims.md")) - 3


@pytest.mark.parametrize(("package", "named"), [("litserve", "LitServe"), ("diffusers", "`DDPMPipeline` of diffusers")])
def test_what_we_run_ourselves_is_in_the_version_that_is_pinned(package: str, named: str) -> None:
    (pinned,) = re.findall(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)

    assert re.findall(rf"^### {named} (\S+)$", CLAIMS, re.MULTILINE) == [pinned]


def test_steps_are_as_much_faster_as_was_measured() -> None:
    table = next(table for table in tables(README) if table[0][0].startswith("a step of ours is faster"))
    contenders, values = ["diffusers", "diffusers, bfloat16", "OpenVINO, bfloat16"], measured("2-cores-engine")
    for model, *cells in table[1:]:
        name = "digits" if "digits" in model else "CIFAR-10 configuration"
        for contender, cell in zip(contenders, cells, strict=True):
            ratios = (values[f"{name}, batch {batch}: ours against {contender}"][0] for batch in (1, 2, 8, 16))
            assert NUMBER.findall(cell) == as_written(cell, ratios)


def test_sentences_below_that_table_say_what_was_measured() -> None:
    avx2, busy, text = measured("avx2"), measured("start"), re.sub(r"\s+", " ", README)
    theirs = [avx2[f"digits, batch {batch}: ours against diffusers"][0] for batch in (1, 2, 8, 16)]
    openvino = [avx2[f"digits, batch {batch}: ours against OpenVINO, float32"][0] for batch in (1, 2, 8, 16)]
    beside = [busy[f"digits, batch {b}: {who}, busy against quiet"][0] for who in ("ours", "diffusers") for b in (1, 8)]

    assert "{:.1f}, {:.1f}, {:.1f} and {:.1f} times as fast as diffusers".format(*theirs) in text
    assert f"{min(openvino):.2f} to {max(openvino):.2f} times as OpenVINO" in text
    told = "takes {:.1f} times as long at batch 1 and {:.1f} times at batch 8 (diffusers: {:.1f}, {:.1f})"
    assert told.format(*beside) in text


def test_servers_are_as_fast_as_was_measured_and_none_promises_bytes_that_differed() -> None:
    (_, *rows) = next(table for table in tables(README) if len(table[0]) == 4 and "p50" in table[0][2])
    names = ["ours", "ours, 2 engines", "LitServe's step loop with OpenVINO, 2 workers of 16"]
    names += ["LitServe's step loop, 2 workers of 16", "micro-batcher, 20 ms and 8", "DDPMPipeline, one at a time"]
    values = measured("http")
    (rate,) = {name.partition(",")[0] for name in values if "p50" in name}
    for name, (_, throughput, times, same) in zip(names, rows, strict=True):
        assert throughput == f"{values[f'{name}: saturated'][0]:.0f}"
        assert values[f"{name}: the same bytes in company"] == [1.0] and same != "no"
        if times:
            (median, _, p99) = next(v for n, v in values.items() if n.startswith(f"{rate}, {name}: 50 steps"))
            assert NUMBER.findall(times) == as_written(times, iter([median, p99]))


def test_it_is_said_how_much_is_downloaded_and_how_large_the_model_is() -> None:
    values, text = measured("downloads"), " ".join(README.split())
    sizes = [
        next(v[0] for name, v in values.items() if f"serve, {build} CUDA" in name) for build in ("without", "with")
    ]
    cards = [read_card(ROOT / "weights" / name) for name in ("digits", "emoji")]
    digits, emoji = (f"{count(shapes(card.architecture)) / 1e6:.1f} million parameters" for card in cards)

    assert "downloads {:.1f} GB, with an NVIDIA driver {:.1f} GB".format(*sizes) in text
    assert [f"{size:.1f}" for size in sizes] == re.findall(r"^\|.* ([\d.]+) GB \|$", START, re.MULTILINE)
    assert f"[`digits`](weights/digits/README.md), {digits}" in text
    assert f"[`emoji`](weights/emoji/README.md), {emoji}" in text


@pytest.mark.parametrize("directory", ["weights/digits", "weights/emoji", "benchmarks/digits"])
def test_a_card_is_that_of_the_weights_beside_it(directory: str) -> None:
    card, text = read_card(ROOT / directory), (ROOT / directory / "README.md").read_text()

    assert {*re.findall(r"sha256:[0-9a-f]{64}", text)} == {card.digest}
    assert f"{count(shapes(card.architecture)):,} parameters" in text


@pytest.mark.parametrize("name", OWN)
def test_a_gpu_trains_by_the_recipe_of_the_card(name: str) -> None:
    text = (ROOT / "weights" / name / "README.md").read_text()

    assert OWN[name]
    assert [flag for flag, value in OWN[name].items() if f"--{flag.replace('_', '-')} {value}" not in text] == []


def test_other_pages_say_what_was_measured() -> None:
    operations, numerics, watching = ((ROOT / "docs" / f"{page}.md").read_text() for page in PAGES)
    start, ours = measured("cpu-2-cores-start"), measured("11-28-cpu-2-cores-precision")
    theirs, first, again = measured("11-23-cpu-2-cores-precision"), measured("watched"), measured("watched-again")
    large, psnr = "256 x 256 configuration", "PSNR against float32"
    resident = start[f"{large}, the first time: engine process, all batch sizes there: resident"][0]
    seconds = [start[name][0] for name in ("digits: /readyz, the first time", f"{large}: /readyz, the first time")]
    rests = start[f"{large}: the engine rests, the first time"][0]

    told = "takes {:.1f} s with `benchmarks/digits`, {:.1f} s with a net of 256 x 256 pixels, whose engine "
    told += "has all its sizes after"
    assert told.format(*seconds) + f" {rests:.0f} s and takes {resident * 2**20 / 1e9:.1f} GB" in " ".join(
        operations.split()
    )
    for name, values in (("64 seeds, 1000 steps: ours", ours), ("16 seeds, 1000 steps: diffusers", theirs)):
        median, pooled = (values[f"digits, {name} in bfloat16: {psnr}, {which}"] for which in ("median", "pooled"))
        assert "{:.0f} dB ({:.0f} … {:.0f}) | {:.0f} dB".format(*median, pooled[0]) in numerics
    watched = [run["every job watched, 30 frames each"][0] for run in (again, first)]
    assert "leave {:.2f} and {:.2f} of the throughput".format(*watched) in watching


def test_the_estimate_of_memory_that_is_told_is_the_one_that_is_made() -> None:
    card, device = read_card(ROOT / "benchmarks" / "digits"), torch.device("cpu")
    float32, bfloat16 = (footprint(card, 8, device, t).size_bytes / 1e6 for t in (torch.float32, torch.bfloat16))
    operations = " ".join((ROOT / "docs" / "operations.md").read_text().split())

    told = f"with 8 slots on a CPU the estimate is {float32:.0f} MB in float32, {bfloat16:.0f} MB in bfloat16"
    assert told in operations


def test_each_claim_that_tests_show_has_one_that_ci_runs() -> None:
    shown = [re.findall(r"(tests/[\w/]+\.py)::(\w+)", line) for line in CLAIMS.splitlines()]
    unseen = [some for some in shown if some and all(name in long_in(ROOT / path) for path, name in some)]

    assert unseen == []
    assert long_in(ROOT / "tests/server/jobs/test_stream.py")
