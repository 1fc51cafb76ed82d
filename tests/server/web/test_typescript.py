"""A TypeScript client generated from /openapi.json."""

import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.server.conftest import Server

ROOT = Path(__file__).parents[3]
SOURCES = ROOT / "tests" / "typescript"
NODE = 20  # the oldest version that runs the tools

VAGUE = re.compile(r"\b(unknown|any)\b|Record<string, never>|\{\s*\}")


def node_version() -> int:
    """The major version of Node.js; 0 without one."""
    if shutil.which("npm") is None or shutil.which("node") is None:
        return 0
    said = subprocess.run(["node", "--version"], capture_output=True, text=True).stdout
    return int(found[1]) if (found := re.match(r"v(\d+)\.", said)) else 0


def run(folder: Path, *command: str) -> str:
    """What a tool wrote to stdout. Fails with what it said if it failed."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tools() -> Path:
    """The folder `build/typescript`, in which the pinned versions of the tools are installed."""
    if node_version() < NODE:
        pytest.skip(f"needs Node.js {NODE} or later, with npm")
    lock = hashlib.sha256((SOURCES / "package-lock.json").read_bytes()).hexdigest()[:12]
    folder = ROOT / "build" / f"typescript-{lock}"
    if not (folder / "installed").exists():
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("package.json", "package-lock.json"):
            shutil.copy(SOURCES / name, folder)
        install = ["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts", "--fetch-retries=0"]
        done = subprocess.run(install, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"npm could not install openapi-typescript: {done.stderr.strip()[-200:]}")
        (folder / "installed").touch()
    return folder


@pytest.mark.long
def test_a_generated_client_compiles_strictly_runs_and_knows_every_answer(server: Server, tools: Path) -> None:
    for name in ("client.ts", "tsconfig.json"):
        shutil.copy(SOURCES / name, tools)
    (tools / "openapi.json").write_text(server.client.get("/openapi.json").text)
    run(tools, "npx", "openapi-typescript", "openapi.json", "--output", "api.ts")
    run(tools, "npx", "tsc")
    result = json.loads(run(tools, "node", "client.js", f"http://127.0.0.1:{server.port}"))

    api = re.sub(
        r"/\*.*?\*/|export type (webhooks|\$defs) = Record<string, never>;",
        "",
        (tools / "api.ts").read_text(),
        flags=re.DOTALL,
    )
    left = [line for line in api.splitlines() if VAGUE.search(line)]
    assert set(map(str.strip, left)) == {"[name: string]: unknown;"}  # other headers than those that are described
    told = result.pop("told")
    assert result == {"T": 30, "exact": True, "seed": 42, "sha256": True, "refused": "/seed"}
    kept = [message for message in told if " of " not in message]  # progress may come at any moment
    assert (kept[-2:], "5 steps" in told) == (["image/png", "succeeded"], True)
