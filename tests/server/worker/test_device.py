"""The status of a loaded model, and the numbers that an engine computes in."""

import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.checkpoint.card import read_card
from model.engine.runner import Runner, prepared
from model.nets import openvino_graph
from server.worker import device
from server.worker.messages import ModelStatus
from tests.model.convert.directories import write_model
from tests.model.engine.test_runner import Function, different_in
from tests.model.tiny import CPU, function_model, halve


def described(directory: Path, slots: int, net: Function = halve, exact: bool = True) -> tuple[Runner, ModelStatus]:
    """A runner of this net, with the card of a directory, and what is told of it."""
    model = replace(function_model(net), card=read_card(write_model(directory / "tiny")))
    runner = prepared(model, slots, exact)
    return runner, device.describe(runner, model, 0.0, 0)


def test_the_numerics_class_ends_with_a_hash_of_what_was_computed_at_the_start(tmp_path: Path) -> None:
    runner, status = described(tmp_path, 3)

    assert status.numerics.split("; ")[-2:] == ["exact 1-3", f"bits {runner.bits}"]


def test_the_numerics_class_has_no_hash_if_nothing_is_promised(tmp_path: Path) -> None:
    _, status = described(tmp_path, 3, exact=False)

    assert status.numerics.endswith("; float32; exact none")


def test_a_picture_that_is_padded_when_it_is_alone_is_a_note_of_its_model(tmp_path: Path) -> None:
    _, status = described(tmp_path, 4, different_in(1, 2))

    assert status.note == "a picture alone takes a batch of 3, since bits are others in batches of 1-2"
    assert (status.exact, status.admitted) == (True, [3, 4])


# Which numbers


class Core:
    """OpenVINO on a processor that says it can do this much, and compiles some of it."""

    def __init__(self, said: Sequence[str], compiles: Sequence[str]) -> None:
        self.said, self.compiles, self.tried = said, compiles, list[str]()

    def get_property(self, device: str, name: str) -> list[str]:
        """What the processor says of itself."""
        assert (device, name) == ("CPU", "OPTIMIZATION_CAPABILITIES")
        return list(self.said)

    def compile_model(self, model: object, device: str, hints: dict[str, object]) -> None:
        """Raises RuntimeError, as OpenVINO does, if it cannot be done in these numbers."""
        self.tried.append(precision := str(hints["INFERENCE_PRECISION_HINT"]))
        if precision not in self.compiles:
            raise RuntimeError(f"no kernel of {precision}")


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    """What a processor can do is asked once in a process, and by each of these tests."""
    openvino_graph.computes_in.cache_clear()
    yield
    openvino_graph.computes_in.cache_clear()


@pytest.mark.parametrize(
    ("said", "compiles", "chosen", "tried"),
    [
        (["FP32", "BF16"], ["f32", "bf16"], torch.bfloat16, ["bf16"]),
        (["FP32", "BF16"], ["f32"], torch.float32, ["bf16"]),
        (["FP32", "INT8"], ["f32", "bf16"], torch.float32, []),
    ],
    ids=["can", "says that it can", "does not say so"],
)
def test_a_net_is_run_in_bfloat16_where_the_processor_says_it_can_and_openvino_can_compile_it(
    said: list[str], compiles: list[str], chosen: torch.dtype, tried: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    core = Core(said, compiles)
    monkeypatch.setattr(openvino_graph, "CORE", core)

    assert device.choose_dtype("auto", CPU) == chosen
    assert core.tried == tried


@pytest.mark.parametrize("has", [True, False])
def test_without_openvino_torch_is_asked(has: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "model.nets.openvino_graph")
    monkeypatch.delattr("model.nets.openvino_graph")
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)

    assert device.choose_dtype("auto", CPU) == (torch.bfloat16 if has else torch.float32)


def test_an_openvino_that_has_ended_an_engine_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    core = Core(["FP32", "BF16"], ["f32", "bf16"])
    monkeypatch.setattr(openvino_graph, "CORE", core)

    assert device.choose_dtype("auto", CPU, "ended an engine") == torch.float32
    assert core.tried == []


@pytest.mark.parametrize(("wanted", "dtype"), device.DTYPES.items())
def test_numbers_that_the_settings_name_are_taken_whatever_the_processor_can_do(
    wanted: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = Core([], [])
    monkeypatch.setattr(openvino_graph, "CORE", core)

    assert device.choose_dtype(wanted, CPU) == dtype


@pytest.mark.skipif(platform.machine() != "x86_64", reason="oneDNN can be told to do without instructions of x86 only")
def test_a_processor_without_the_instructions_computes_in_float32() -> None:
    """oneDNN is told to do without them; the processor goes on saying that it has them, if it has."""
    asks = (
        "import torch\nfrom server.worker.device import choose_dtype\nprint(choose_dtype('auto', torch.device('cpu')))"
    )
    environ = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, "-c", asks], env=environ, capture_output=True, text=True, check=True)

    assert ran.stdout == "torch.float32\n"


GIB = 1 << 30


@pytest.mark.parametrize(
    ("limit", "used", "available"),
    [
        ("max", "0", 2 * GIB),
        (str(3 * GIB), str(GIB // 2), 2 * GIB),
        (str(GIB), str(GIB // 4), 3 * GIB // 4),
        (None, None, 2 * GIB),
    ],
)
def test_memory_is_what_linux_says_and_a_container_leaves(
    tmp_path: Path, limit: str | None, used: str | None, available: int
) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  8388608 kB\nMemAvailable:  2097152 kB\n")
    for name, text in (("memory.max", limit), ("memory.current", used)):
        if text is not None:
            (tmp_path / name).write_text(text)

    assert device.available_bytes(meminfo, tmp_path) == available


def test_memory_counts_as_enough_if_neither_linux_nor_a_container_tells_it(tmp_path: Path) -> None:
    assert device.available_bytes(tmp_path / "none", tmp_path) > 1 << 50
