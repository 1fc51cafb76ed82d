"""What a machine without a network is given along is only what it lacks."""

from pathlib import Path
from zipfile import ZipFile

from benchmarks.unpack import unpack


def wheel(folder: Path, name: str) -> None:
    """A wheel of one empty module."""
    with ZipFile(folder / f"{name}-9.9-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}/__init__.py", "")


def test_a_wheel_of_what_is_installed_stays_packed(tmp_path: Path) -> None:
    for name in ("pytest", "prometheus_client", "surely_not_installed"):
        wheel(tmp_path, name)

    assert unpack(tmp_path, tmp_path / "site") == ["surely_not_installed"]
    assert [path.name for path in (tmp_path / "site").iterdir()] == ["surely_not_installed"]


def test_without_wheels_there_is_an_empty_folder(tmp_path: Path) -> None:
    assert unpack(tmp_path / "none", tmp_path / "site") == []
    assert (tmp_path / "site").is_dir()
