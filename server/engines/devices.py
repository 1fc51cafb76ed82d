"""Which devices engines can have. Knows no torch: the API process holds no device."""

import ctypes
import subprocess
import sys
from importlib.metadata import version

ANSWER_S = 30.0


def count_gpus() -> int:
    """How many GPUs torch will see. The driver is asked by a process of its own, which leaves nothing behind.

    Raises NoSuchDevice if the driver does not answer.
    """
    if version("torch").endswith("+cpu"):
        return 0
    try:
        asked = subprocess.run([sys.executable, "-I", __file__], capture_output=True, text=True, timeout=ANSWER_S)
    except subprocess.TimeoutExpired:
        from model.errors import NoSuchDevice  # not above: what asks the driver finds none of our packages

        raise NoSuchDevice(
            f"the driver of the GPUs said nothing for {ANSWER_S:g} s; DDPM_DEVICE=cpu needs none"
        ) from None
    return int(asked.stdout) if asked.returncode == 0 else 0


def _ask_driver() -> int:
    """As `CUDA_VISIBLE_DEVICES` has it. Raises OSError where there is no driver."""
    driver, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
    sound = driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0
    return count.value if sound else 0


def choose_devices(wanted: str, gpus: int) -> list[str]:
    """One name for each engine, of those in the settings, on a machine with so many GPUs."""
    kind, _, numbers = wanted.partition(":")
    if numbers:
        return [f"{kind}:{number}" for number in dict.fromkeys(map(int, numbers.split(",")))]
    if gpus > 1 and kind != "cpu":
        return [f"cuda:{number}" for number in range(gpus)]
    return [wanted]


if __name__ == "__main__":
    print(_ask_driver())
