"""Schemathesis against the OpenAPI that is served: `python -m tests.fuzz.api --cases 5000`. Needs the extra `fuzz`."""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.model.convert.directories import write_model
from tests.server.conftest import Server

SETTINGS = Path(__file__).parent / "schemathesis.toml"
CASES_PER_EXAMPLE = 20  # a little less than what came of `--max-examples 1`


def run(server: Server, cases: int, seed: int | None = None) -> tuple[int, int, str]:
    """At least about so many cases. -> exit code, how many there were, what was said"""
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(SETTINGS), "run"]
    command += [f"http://127.0.0.1:{server.port}/openapi.json", "--checks", "all", "--no-color"]
    # 1.0 for an integer, a field of another sampler; DELETE cancels a job, which is still there
    command += ["--exclude-checks", "positive_data_acceptance,use_after_free"]
    command += ["--max-examples", str(max(1, cases // CASES_PER_EXAMPLE)), "--request-timeout", "30"]
    command += ["--max-response-time", "30"]  # how fast the machine is, is not what is asked here
    command += ["--seed", str(seed)] if seed is not None else []
    environ = os.environ | {"SCHEMATHESIS_HOOKS": "tests.fuzz.hooks", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tempfile.gettempdir(), env=environ)
    said = done.stdout + done.stderr
    counted = re.search(r"(\d+) generated", said)
    return done.returncode, int(counted[1]) if counted else 0, said


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=5000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder) / "tiny")
        server = Server(Path(folder)).wait_until_ready()
        try:
            code, cases, said = run(server, arguments.cases)
            assert server.client.get("/healthz").status_code == 200
        finally:
            server.stop()
    if code or cases < arguments.cases:
        sys.exit(f"{said}\n{cases} cases of {arguments.cases}")
    print(json.dumps({"cases": cases}))


if __name__ == "__main__":
    main()
