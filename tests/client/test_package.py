"""The distribution: one source for both clients, the version, its names, and what importing it costs."""

import ast
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import ddpm_client
import pytest

import server

ROOT = Path(__file__).parents[2] / "client"
PACKAGE = ROOT / "ddpm_client"
FILES = sorted(ROOT.rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run(code: str, cwd: Path) -> str:
    """What this code prints in a process of its own, started in a folder."""
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.path.insert(0, ''); {code}"]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True).stdout


def test_the_client_for_threads_is_generated_from_the_one_for_asyncio() -> None:
    unasync = runpy.run_path(str(ROOT / "unasync.py"))["unasync"]

    assert (PACKAGE / "threads.py").read_text() == unasync((PACKAGE / "asyncio.py").read_text())
    assert (PACKAGE / "threads.py").read_text().startswith("# Generated from asyncio.py by client/unasync.py.")


def test_client_and_server_have_the_same_version() -> None:
    assert ddpm_client.__version__ == server.__version__
    dependencies = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["project"]["dependencies"]
    assert f"ddpm-client=={server.__version__}" in dependencies


def test_every_name_that_type_checkers_see_can_be_imported() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module != "typing"]
    names = {alias.asname for node in imported for alias in node.names if alias.asname}

    assert {"AsyncClient", "Client", "Event", "Invalid", "Request"} <= names
    assert [name for name in names if not hasattr(ddpm_client, name)] == []
    with pytest.raises(AttributeError, match="module 'ddpm_client' has no attribute 'Cleint'"):
        ddpm_client.Cleint  # type: ignore[attr-defined]  # noqa: B018


def test_the_server_imports_the_wire_format_without_the_libraries_of_a_client(tmp_path: Path) -> None:
    code = "import ddpm_client.errors, ddpm_client.wire; print(*{'httpx', 'websockets', 'PIL'} & sys.modules.keys())"

    assert run(code, tmp_path) == "\n"


def test_the_client_works_in_a_folder_with_a_server_and_a_model_of_ones_own(tmp_path: Path) -> None:
    for name in ("server.py", "model.py"):
        (tmp_path / name).write_text("raise AssertionError('the client imports its own modules only')")
    code = "from ddpm_client import AsyncClient, Client; Client('http://127.0.0.1:9').close(); print(Client.__module__)"

    assert run(code, tmp_path) == "ddpm_client.threads\n"


def test_it_requires_three_libraries_and_what_python_3_10_lacks() -> None:
    assert [line.partition(">=")[0] for line in PROJECT["dependencies"]] == [
        "httpx",
        "pillow",
        "typing-extensions",
        "websockets",
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_its_syntax_is_that_of_the_oldest_python_it_promises(path: Path) -> None:
    minor = int(PROJECT["requires-python"].removeprefix(">=3."))

    ast.parse(path.read_text(), feature_version=(3, minor))


def test_it_stays_small() -> None:
    assert sum(len(path.read_text().splitlines()) for path in FILES) <= 1200
