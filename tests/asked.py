"""What the documents, the examples and the page ask for: each request with a seed, as the server would read it."""

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from server.cli.fields import FIELDS
from server.cli.generate import PRESET as COMMAND_PRESET
from server.errors import Invalid, Malformed
from server.jobs.request import CHOICES
from server.jobs.schemas import GenerateRequest, parse_object, validate
from tests.test_docs import DOCUMENTS, ROOT

EXAMPLES = ROOT / "examples"
PAGE = ROOT / "server" / "static" / "index.html"
CLIENT = (ROOT / "client" / "README.md", ROOT / "client" / "ddpm_client" / "__init__.py")
PLACES = [*DOCUMENTS, *EXAMPLES.glob("*.py"), *EXAMPLES.glob("*.sh"), *CLIENT, PAGE]

OBJECT = re.compile(r"\{(?:[^{}]|\{[^{}]*\})*\}")
CALL = re.compile(r"\.(?:generate|stream|submit)(\((?:[^()]|\([^()]*\))*\))")
COMMAND = re.compile(r"(?:ddpm generate|--like \S+)((?: [^\s`#]+)+)")
EXAMPLE = re.compile(r"examples/(\w+\.py) (\d+)")
PRESET = re.compile(r'<select name="preset"><option>(\w+)')
FIELD = re.compile(r'<input name="(seed|steps|n|label)"[^>]*? value="(\w+)"')
SEED = re.compile(r'\bseed(?:"?: ?|=|-)(\d+)|--seed (\d+)|name="seed"[^>]*? value="(\d+)"')


def _by_json(text: str) -> Iterator[GenerateRequest]:
    """JSON objects that `POST /generate` takes: others are answers, and what only looks like JSON."""
    for found in OBJECT.findall(text):
        try:
            yield _request(parse_object(found.encode()))
        except (Malformed, Invalid):
            continue


def _by_calls(text: str) -> Iterator[GenerateRequest]:
    """What the Python client is called with, where that is written out."""
    for arguments in CALL.findall(text):
        call = ast.parse(f"call{arguments}", mode="eval").body
        assert isinstance(call, ast.Call)
        values = {word.arg: word.value for word in call.keywords if word.arg in FIELDS}
        if all(isinstance(value, ast.Constant) for value in values.values()):
            yield _request({name: ast.literal_eval(value) for name, value in values.items()})


def _by_commands(text: str) -> Iterator[GenerateRequest]:
    """What `ddpm generate` is told. A picture made like another has as many steps as that: the usual ones."""
    for found in COMMAND.finditer(text):
        words = shlex.split(found[1])
        flags = {word[2:].replace("-", "_"): value for word, value in zip(words, words[1:], strict=False)}
        asked = {name: FIELDS[name](value) for name, value in flags.items() if name in FIELDS}
        usual = {} if asked.keys() & {*CHOICES, "preset"} or "--like" in found[0] else {"preset": COMMAND_PRESET}
        yield _request(usual | asked)


def _by_examples(text: str) -> Iterator[GenerateRequest]:
    """What an example asks for that a document runs with a seed."""
    for name, seed in EXAMPLE.findall(text):
        code = (EXAMPLES / name).read_text()
        yield from requests(code.replace("seed=seed", f"seed={seed}").replace('"seed": seed', f'"seed": {seed}'))


def _by_form(text: str) -> Iterator[GenerateRequest]:
    """What the page asks for if Build is pressed and nothing else."""
    preset = PRESET.search(text)
    yield _request(
        ({"preset": preset[1]} if preset else {})
        | {name: int(value) if value.isdigit() else value for name, value in FIELD.findall(text)}
    )


def _request(fields: dict[str, Any]) -> GenerateRequest:
    return validate(fields, GenerateRequest)


def requests(text: str) -> list[GenerateRequest]:
    """The requests in a text that name a seed, in whatever way they are written."""
    ways = (_by_json, _by_calls, _by_commands, _by_examples, _by_form)
    return [request for way in ways for request in way(text) if request.seed is not None]


def seeds_told(text: str) -> set[int]:
    """The seeds in a text, of requests and of answers."""
    return {int(next(filter(None, found))) for found in SEED.findall(text)}


def name_of(place: Path) -> str:
    """A file's path in the repository."""
    return str(place.relative_to(ROOT))
