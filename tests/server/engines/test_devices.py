"""Which engines there are, by the setting and by what the machine has."""

import subprocess
import sys
from pathlib import Path

import pytest

from model.errors import NoSuchDevice
from server.engines import devices
from server.engines.devices import choose_devices, count_gpus
from server.errors import SettingsError
from server.settings import Settings
from server.worker.cpus import UNLIMITED, quota


@pytest.mark.parametrize(
    ("wanted", "gpus", "devices"),
    [
        ("cpu", 4, ["cpu"]),
        ("auto", 0, ["auto"]),  # the engine decides: torch may see none where the driver does
        ("auto", 1, ["auto"]),
        ("auto", 2, ["cuda:0", "cuda:1"]),
        ("cuda", 0, ["cuda"]),  # which the engine refuses
        ("cuda", 3, ["cuda:0", "cuda:1", "cuda:2"]),
        ("cuda:1", 3, ["cuda:1"]),
        ("cuda:2,0", 3, ["cuda:2", "cuda:0"]),
        ("cuda:1,1", 3, ["cuda:1"]),
    ],
)
def test_there_is_an_engine_for_each_device(wanted: str, gpus: int, devices: list[str]) -> None:
    assert choose_devices(Settings(device=wanted).device, gpus) == devices


@pytest.mark.parametrize("wanted", ["gpu", "cuda:", "cuda:0,", "cuda:a", "cpu:0", "cuda:0,cuda:1", "auto:1", "cuda:0 "])
def test_a_device_that_is_spelled_otherwise_is_refused(wanted: str) -> None:
    with pytest.raises(SettingsError, match="DDPM_DEVICE"):
        Settings.read({"DDPM_DEVICE": wanted})


@pytest.mark.parametrize(
    ("limit", "processors"),
    [
        ("max 100000\n", UNLIMITED),
        ("200000 100000\n", 2),
        ("150000 100000\n", 2),  # two threads are slowed down less than one would be too slow
        ("5000 100000\n", 1),
        ("", UNLIMITED),
    ],
)
def test_a_container_that_may_take_the_time_of_two_processors_has_two(
    limit: str, processors: int, tmp_path: Path
) -> None:
    (tmp_path / "cpu.max").write_text(limit)

    assert quota(tmp_path / "cpu.max") == processors


def test_without_control_groups_there_is_no_quota(tmp_path: Path) -> None:
    assert quota(tmp_path / "cpu.max") == UNLIMITED


def test_what_asks_the_driver_needs_none_of_our_packages(tmp_path: Path) -> None:
    """In an image, and from source, they lie where an isolated Python does not look."""
    alone = [sys.executable, "-I", "-S", devices.__file__]
    asked = subprocess.run(alone, cwd=tmp_path, capture_output=True, text=True)

    assert asked.stdout.strip().isdigit() or "OSError: libcuda.so.1" in asked.stderr


def test_a_driver_that_does_not_answer_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def hangs(command: list[str], timeout: float, **_: object) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(devices, "version", lambda name: "2.13.0+cu130")
    monkeypatch.setattr(subprocess, "run", hangs)

    with pytest.raises(NoSuchDevice, match="DDPM_DEVICE=cpu"):
        count_gpus()
