"""Documents agree with the code: links lead somewhere, commands and files exist, code prints what it is said to print,
and every message that docs/troubleshooting.md explains is one that the code can say."""

import ast
import contextlib
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from PIL import Image

from server.cli import main
from server.jobs.schemas import GenerateRequest, parse_object, validate
from server.settings import PREFIX, Settings
from tests.model.convert.directories import write_model
from tests.server.conftest import Server

ROOT = Path(__file__).parent.parent
FOLDERS = ("docs", "deploy", "benchmarks", "weights", "examples")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md"))])
QUICK_START = ROOT / "docs" / "quick-start.md"
TROUBLESHOOTING = ROOT / "docs" / "troubleshooting.md"
LINK = re.compile(r"\]\(([^)#:\s]*)(?:#([^)\s]+))?\)")
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
EXAMPLE = re.compile(r"^```python\n((?:(?!^```).)*)^```\n\n^```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OURS = {"model", "server", "benchmarks", "tests"}
PATH = re.compile(r"`((?:\.ci|benchmarks|client|deploy|docs|examples|model|server|tests|weights)/[\w./-]+)`")
PAGE = re.compile(r"\bdocs/([\w-]+\.md)(?:#([\w-]+))?")
SOURCES = sorted(
    path
    for folder in (".ci", "benchmarks", "client", "deploy", "examples", "model", "server", "tests")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".js", ".html", ".conf", ".yml", ".yaml") or path.name == "run"
)
FILES = [*SOURCES, *(ROOT / name for name in ("Makefile", "Dockerfile", "docker-compose.yml", "pyproject.toml"))]
GAP = "…"  # a part of a message that varies

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


@cache
def headings(document: Path) -> set[str]:
    """The names by which headings are linked to, as GitHub makes them."""
    found = re.findall(r"^#+ (.+)$", FENCED.sub("", document.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


def commands(document: Path) -> list[list[str]]:
    """The commands in a document, in words: lines of code, without the notes behind them."""
    fenced = [code for language, code in FENCED.findall(document.read_text()) if language in ("", "sh", "bash")]
    indented = re.findall(r"^ {4}(.*\S)$", FENCED.sub("", document.read_text()), re.MULTILINE)
    lines = re.sub(r"\\\n\s*", " ", "\n".join([*fenced, *indented])).splitlines()
    lines = [re.split(r"\s{3,}|\s#\s", line.strip())[0] for line in lines]
    return [
        shlex.split(line) for line in lines if re.match(r"(?:[A-Z_]+=\S+ )*[\w./-]+(?: |$)", line) and _closed(line)
    ]


def _closed(line: str) -> bool:
    try:
        return bool(shlex.split(line))
    except ValueError:  # an apostrophe: it is prose, or a formula
        return False


def wrong_with(words: list[str]) -> str | None:
    """What is wrong with a command, if it is one of ours."""
    variables = [word.partition("=")[0] for word in words if re.match(r"[A-Z_]+=", word)]
    unknown = {v for v in variables if v.startswith(PREFIX)} - {PREFIX + n.upper() for n in Settings.model_fields}
    if unknown:
        return f"no setting {', '.join(unknown)}"
    words = [word for word in words if not re.match(r"[A-Z_]+=", word)]
    program = Path(words[0]).name if words else ""
    if program == "make":
        targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        return ", ".join(f"no target {word}" for word in words[1:] if word not in targets) or None
    if program in ("python", "python3", "torchrun", "sh"):
        return _wrong_with_python(words)
    return _wrong_with_ddpm(words[1:]) if program == "ddpm" and words[1:] else None


def _wrong_with_python(words: list[str]) -> str | None:
    if "-m" in words:
        module = Path(words[words.index("-m") + 1].replace(".", "/"))
        there = [ROOT / module.with_suffix(".py"), ROOT / module / "__main__.py"]
        return None if module.parts[0] not in OURS or any(p.is_file() for p in there) else f"no module {module}"
    files = [word for word in words[1:] if word.endswith((".py", ".sh"))]
    return ", ".join(f"no file {file}" for file in files if not (ROOT / file).is_file()) or None


def _wrong_with_ddpm(words: list[str]) -> str | None:
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        try:
            main.main([words[0], "--help"])
        except SystemExit as end:
            if end.code:
                return f"no command ddpm {words[0]}"
    flags = set(re.findall(r"(?<!\S)--?[a-z][\w-]*", told.getvalue()))
    return ", ".join(f"no flag {word}" for word in words if re.match("--?[a-z]", word) and word not in flags) or None


def messages(document: Path) -> list[str]:
    """The messages that the tables of a document explain: all code in their first column."""
    rows = [line.split("|")[1] for line in document.read_text().splitlines() if line.startswith("| `")]
    return [message for row in rows for message in re.findall(r"`([^`]+)`", row)]


@cache
def said() -> tuple[str, ...]:
    """Every string in the code that ships, with a gap for each part that is filled in."""
    texts = list[str]()
    for path in FILES:
        if path.suffix != ".py":
            texts += re.sub(r"\$\{[^}]*\}", GAP, path.read_text()).splitlines()
        elif path.relative_to(ROOT).parts[0] in ("client", "deploy", "model", "server"):
            texts += [text for node in ast.walk(ast.parse(path.read_text())) if (text := _text(node)) is not None]
    return tuple(texts)


def _text(node: ast.AST) -> str | None:
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) or GAP for part in node.values)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[ds]", GAP, node.value)
    return None


def can_be_said(message: str) -> bool:
    """Whether the code has a string in which the parts of this message follow each other."""
    pattern = re.compile(".*".join(map(re.escape, message.split(GAP))))
    return any(pattern.search(text) for text in said())


def bodies(document: Path) -> list[str]:
    """What requests to `POST /generate` in a document send."""
    found = [words for words in commands(document) if "curl" in words and any(w.endswith("/generate") for w in words)]
    return [words[words.index("-d") + 1] for words in found if "-d" in words]


@each_document
def test_every_link_leads_somewhere(document: Path) -> None:
    links = [link for link, _ in LINK.findall(document.read_text())]

    assert [link for link in links if not (document.parent / link).exists()] == []


@each_document
def test_every_heading_that_is_linked_to_is_there(document: Path) -> None:
    links = [(link, name) for link, name in LINK.findall(document.read_text()) if name]
    targets = [((document.parent / link) if link else document, name) for link, name in links]

    assert [name for path, name in targets if path.suffix == ".md" and name not in headings(path)] == []


@each_document
def test_every_file_that_is_named_is_there(document: Path) -> None:
    history = document.name in ("CHANGELOG.md", "RESULTS.md")  # names what was there then
    named = [] if history else [path for path in PATH.findall(document.read_text()) if "NAME" not in path]

    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("file", [path for path in FILES if PAGE.search(path.read_text())], ids=lambda path: path.name)
def test_every_page_that_the_code_names_is_there(file: Path) -> None:
    named = [(ROOT / "docs" / page, name) for page, name in PAGE.findall(file.read_text())]

    assert [page.name for page, _ in named if not page.is_file()] == []
    assert [name for page, name in named if name and name not in headings(page)] == []


def test_every_message_that_is_explained_is_one_that_the_code_can_say() -> None:
    explained = messages(TROUBLESHOOTING)

    assert len(explained) > 50
    assert [message for message in explained if max(map(len, message.split(GAP))) < 8] == []
    assert [message for message in explained if not can_be_said(message)] == []
    assert not can_be_said("the engine is tired")


@each_document
def test_every_command_exists_with_its_flags(document: Path) -> None:
    assert [(words, wrong) for words in commands(document) if (wrong := wrong_with(words))] == []


@each_document
def test_every_request_is_one_that_the_server_takes(document: Path) -> None:
    assert all(validate(parse_object(body.encode()), GenerateRequest) for body in bodies(document))


@each_document
def test_python_prints_what_the_document_says_it_prints(document: Path) -> None:
    for language, code in FENCED.findall(document.read_text()):
        if language == "python":
            compile(code, document.name, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        elif language == "json":
            json.loads(code)
    for code, expected in EXAMPLE.findall(document.read_text()):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(code, document.name, "exec"), {})
        assert printed.getvalue() == expected


@each_document
def test_no_number_is_left_to_be_filled_in(document: Path) -> None:
    assert re.findall(r"RESULTS_TABLE|\| … |on …|TODO|TBD", document.read_text()) == []


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A server of two tiny models with the names and the labels of the included ones, which can take as many steps, but
    take few unless they are told to."""
    schedule = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02}
    usual = {"default_steps": 20, "guidance": 2.0}
    write_model(tmp_path / "weights" / "digits", scheduler=schedule, labels=11, index=usual | {"null_label": 10})
    groups = {"id2label": {"0": "Smileys & Emotion"}, "null_label": 9}
    write_model(tmp_path / "weights" / "emoji", scheduler=schedule, labels=10, index=usual | groups)
    with Server(tmp_path / "weights") as running:
        yield running


def test_the_animation_of_the_readme_is_made_by_the_example(server: Server, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "building.py"), "film.webp", f"http://127.0.0.1:{server.port}"]
    environ_of = {"PYTHONPATH": f"{ROOT}:{ROOT / 'client'}", "PATH": "/usr/bin:/bin"}
    subprocess.run(command, env=environ_of, cwd=tmp_path, check=True, timeout=120)

    with Image.open(tmp_path / "film.webp") as made, Image.open(ROOT / "docs" / "building.webp") as shipped:
        assert (made.size, made.n_frames) == (shipped.size, shipped.n_frames) == ((640, 256), 10)  # type: ignore[attr-defined]


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_quick_start_works_line_by_line(server: Server, tmp_path: Path) -> None:
    asked = [words for words in commands(QUICK_START) if words[0] == "curl"]
    statuses = []
    for words in asked:
        line = [word.replace("localhost:8000", f"127.0.0.1:{server.port}") for word in words]
        said = subprocess.run([*line, "-sS", "-w", "\n%{http_code}"], cwd=tmp_path, capture_output=True, check=True)
        statuses.append(int(said.stdout.splitlines()[-1]))
        if statuses[-1] == 422:
            assert json.loads(said.stdout.splitlines()[0])["detail"] == "steps must lie in 1..1000, got 5000"
    watch = [sys.executable, str(ROOT / "examples" / "watch.py"), "207", "frames", f"ws://127.0.0.1:{server.port}"]
    subprocess.run(watch, cwd=tmp_path, capture_output=True, check=True, timeout=60)

    assert statuses == [200, 200, 200, 202, 200, 200, 422]
    with (
        Image.open(tmp_path / "out.png") as picture,
        Image.open(tmp_path / "sheet.png") as sheet,
        Image.open(tmp_path / "denoising.gif") as animation,
    ):
        assert (picture.size, sheet.size) == ((8, 8), (32, 24))
        assert getattr(animation, "n_frames", 1) > 10
    assert len(list((tmp_path / "frames").iterdir())) == 10 + 9 + 1
