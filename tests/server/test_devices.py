"""Which engines there are, by the setting and by what the machine has."""

import pytest

from server.devices import choose_devices
from server.errors import SettingsError
from server.settings import Settings


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
