"""What a machine with a GPU is given along is complete, and no more than it lacks."""

import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from zipfile import ZipFile

import pytest

from benchmarks import closure
from benchmarks.closure import THERE, Unresolved, installed, lacking, listed, pack, present

ROOT = Path(__file__).parent.parent
TESTS = sorted(f"tests.model.{path.stem}" for path in (ROOT / "tests" / "model").glob("test_*.py"))
MEASURED = [f"benchmarks.{name}" for name in ("__main__", "contenders", "convolutions", "exactness", "streams")]
STAGES = sorted(f"benchmarks.gpu.{path.stem}" for path in (ROOT / "benchmarks" / "gpu").glob("[!_]*.py"))
SERVER = ["server.web.app", "server.cli.serve", "server.worker.main", "server.hub"]
IMPORT = """
import importlib.util, sys
from importlib.metadata import packages_distributions
from packaging.utils import canonicalize_name
here, modules = (set(words.split()) for words in sys.argv[1:])
owners = {top: {canonicalize_name(owner) for owner in owners} for top, owners in packages_distributions().items()}
class Finder:
    def find_spec(self, name, path=None, target=None):
        if not owners.get(top := name.partition(".")[0], here) & here:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
def find_spec(name, package=None, find=importlib.util.find_spec):
    try:
        return find(name, package)
    except ModuleNotFoundError:  # of what is not installed it says None
        return None
importlib.util.find_spec = find_spec
for module in {"packaging"} | owners.keys() & sys.modules.keys():
    sys.modules.pop(module)
sys.meta_path.insert(0, Finder())
for module in sorted(modules):
    importlib.import_module(module)
"""


def import_with(packages: Iterable[str], modules: Sequence[str]) -> str:
    """What goes wrong when these modules are imported where no other packages are installed than these."""
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        IMPORT,
        " ".join([*packages, "ddpm-client", "ddpm-server"]),
        " ".join(modules),
    ]
    environ = os.environ | {"HYPOTHESIS_NO_PLUGINS": "1"}  # those of packages that are hidden
    result = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    return (result.stderr.splitlines() or [""])[-1] if result.returncode else ""


def test_server_benchmarks_and_tests_import_nothing_but_what_is_given_along_and_torch() -> None:
    packages = lacking([*listed(), *THERE], installed, present(None)) + list(present(None))

    assert import_with(packages, [*SERVER, *MEASURED, *STAGES, *TESTS, "pytest_timeout", "xdist.plugin"]) == ""


def test_a_package_that_only_another_one_imports_is_missed() -> None:
    packages = {*lacking([*listed(), *THERE], installed, present(None)), *present(None)}

    assert (
        import_with(packages - {"opentelemetry-api"}, SERVER) == "ModuleNotFoundError: No module named 'opentelemetry'"
    )


def test_everything_that_is_given_along_has_its_version() -> None:
    pins = {
        line.partition("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().split()
    }

    assert set(lacking(listed(), installed, {})) <= pins


# What is lacking

PACKAGES = {
    "server": ["web >= 2", "words; python_version < '3'", "fast; extra == 'fast'"],
    "web": ["core == 2.1"],
    "core": [],
    "fast": ["Core_"],
    "core-": [],
}


def wanted(names: Sequence[str], has: Mapping[str, str | None]) -> list[str]:
    """What of these packages is lacking."""
    return lacking(names, PACKAGES.__getitem__, has)


def test_what_is_required_is_followed_to_the_end_and_what_another_python_requires_is_not() -> None:
    assert wanted(["server"], {}) == ["core", "server", "web"]


def test_extras_are_followed_where_they_are_asked_for() -> None:
    assert wanted(["server", "server[fast]"], {}) == ["core", "core-", "fast", "server", "web"]


def test_what_is_there_in_a_version_that_will_do_is_not_brought_nor_is_what_it_needs() -> None:
    assert wanted(["server"], {"web": "2.7"}) == ["server"]
    assert wanted(["server"], {"web": None}) == ["server"]
    assert wanted(["server"], {"server": "0.1"}) == []


def test_what_is_there_in_a_version_that_will_not_do_is_brought_with_what_it_needs() -> None:
    assert wanted(["server"], {"web": "1.9", "core": "2.1"}) == ["server", "web"]
    assert wanted(["server"], {"web": "1.9", "core": "2.2"}) == ["core", "server", "web"]


def test_a_package_that_is_required_and_not_installed_is_named() -> None:
    with pytest.raises(Unresolved, match="surely-not-installed is required"):
        lacking(["surely-not-installed"], installed, {})


# The wheels


def wheel(folder: Path, name: str, *requires: str) -> None:
    """A wheel that holds nothing but what it requires."""
    folder.mkdir(exist_ok=True)
    lines = ["Metadata-Version: 2.4", f"Name: {name}", *(f"Requires-Dist: {line}" for line in requires)]
    with ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}-1.0.dist-info/METADATA", "\n".join(lines))


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels, of which one is needed for its own sake."""
    (tmp_path / "list.txt").write_text("# why\nweb\n")
    monkeypatch.setattr(closure, "LIST", tmp_path / "list.txt")
    wheel(tmp_path / "source", "web", "core_ >= 1", "torch")
    wheel(tmp_path / "source", "core_")
    wheel(tmp_path / "source", "other")
    return tmp_path / "source"


def test_the_wheels_that_a_machine_lacks_are_copied(source: Path, tmp_path: Path) -> None:
    assert pack(source, tmp_path / "bare", present(None)) == ["core-", "web"]
    assert pack(source, tmp_path / "some", present("core_==1.3\n-e somewhere\n")) == ["web"]
    assert [path.name for path in (tmp_path / "some").iterdir()] == ["web-1.0-py3-none-any.whl"]


def test_a_wheel_too_few_is_named_and_nothing_is_copied(source: Path, tmp_path: Path) -> None:
    (source / "core_-1.0-py3-none-any.whl").unlink()

    with pytest.raises(Unresolved, match=f"core- is required, and {source} has no wheel of it"):
        pack(source, tmp_path / "bare", present(None))
    assert not (tmp_path / "bare").exists()


@pytest.mark.parametrize("text", [None, "numpy==two"], ids=["no file", "no version"])
def test_a_list_that_cannot_be_read_is_refused_in_one_line(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "has.txt").write_text(text)
    command = [sys.executable, "-m", "benchmarks.closure", "--has", str(tmp_path / "has.txt")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    assert (result.returncode, result.stdout, len(result.stderr.splitlines())) == (2, "", 1)
