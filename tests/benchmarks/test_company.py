"""Whatever is installed beside diffusers, a benchmark runs it as our tests do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import NOT_NEEDED, REPORTS

ROOT = Path(__file__).parent.parent.parent
THEIRS = "from diffusers import DDPMScheduler, UNet2DModel; print(UNet2DModel.__name__, DDPMScheduler.__name__)"


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A folder in which everything that diffusers does not need is installed, and fails when it is imported."""
    for name in (*NOT_NEEDED, *REPORTS):
        (tmp_path / f"{name}-99.0.dist-info").mkdir()
        (tmp_path / f"{name}-99.0.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: 99.0\n")
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise RuntimeError('{name} does not fit')\n")
    return tmp_path


def run(code: str, site: Path) -> subprocess.CompletedProcess[str]:
    """This Python with this code, where these packages are installed too."""
    paths = [str(site), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environ, capture_output=True, text=True)


@pytest.mark.long
def test_diffusers_runs_where_a_package_is_broken_that_it_imports_but_does_not_need(broken: Path) -> None:
    alone, ours = run(THEIRS, broken), run(f"import benchmarks; {THEIRS}", broken)

    assert "does not fit" in alone.stderr
    assert (ours.returncode, ours.stdout) == (0, "UNet2DModel DDPMScheduler\n"), ours.stderr


@pytest.mark.parametrize("name", [*NOT_NEEDED, *REPORTS])
def test_a_package_that_is_not_needed_or_reports_to_its_makers_is_not_found(broken: Path, name: str) -> None:
    code = f"from importlib.util import find_spec; print(find_spec('{name}'))"

    assert "ModuleSpec" in run(code, broken).stdout
    assert run(f"import benchmarks; {code}", broken).stdout == "None\n"
