"""Who is measured beside us computes what diffusers does, and who cannot take part is named."""

import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import busy, engine, http, peers, runtimes
from benchmarks.contenders import ALL, ON_CPU, Setup
from benchmarks.engine import Trial, growth, ratios, started
from benchmarks.http import OTHERS, OURS
from benchmarks.models import TINY, random_model
from benchmarks.peers import Asked, Diffusers, make_net
from benchmarks.remote import Remote
from benchmarks.runtimes import Unet, native_dtype, why_not
from server.worker.device import choose_dtype
from tests.model.tiny import CPU

BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in diffusers' layout."""
    return random_model(tmp_path_factory.mktemp("tiny") / "model", TINY)


def computes_in(name: str) -> torch.dtype:
    """What a contender's numbers are."""
    if name.startswith("ours"):
        return choose_dtype("auto", CPU)
    return BF16 if name.endswith("bfloat16") else torch.float32


@pytest.mark.parametrize("name", ON_CPU)
def test_every_contender_predicts_what_diffusers_predicts_in_float64(directory: Path, name: str) -> None:
    if reason := why_not(name, CPU):
        pytest.skip(f"{name}: {reason}")
    contender = ALL[name](Setup(directory, CPU, most=3, buckets=(1, 3), threads=1))
    x, t = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 500, 998])
    with torch.no_grad():
        exact = Unet(directory).double()(x.double(), t)

    for batch in (1, 3):
        error = (contender.predict(x[:batch], t[:batch]) - exact[:batch]).norm() / exact[:batch].norm()
        assert error < (0.1 if computes_in(name) is BF16 else 1e-5)
    contender.run(3, 2)


def test_openvino_is_told_how_many_threads_it_has_and_one_model_is_compiled_for_each_batch(directory: Path) -> None:
    pytest.importorskip("openvino")
    net = runtimes.OpenVino(directory, "f32", 1)
    for batch in (2, 1, 2):
        net(torch.zeros(batch, 3, 8, 8), torch.zeros(batch, dtype=torch.int64))

    assert list(net.requests) == [2, 1]
    for batch, request in net.requests.items():
        compiled = request.get_compiled_model()
        assert compiled.get_property("INFERENCE_NUM_THREADS") == 1
        assert list(compiled.input(0).shape) == [batch, 3, 8, 8]  # static


# Who takes part


def test_a_contender_whose_package_is_missing_is_left_out_and_named(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = list[str]()

    def start(name: str, setup: Setup) -> Remote:
        begun.append(name)
        raise StopIteration

    monkeypatch.setattr(runtimes, "find_spec", lambda name: None)
    monkeypatch.setattr(Remote, "start", start)
    with pytest.raises(RuntimeError):
        next(started(Trial("tiny", directory, (1,), 0.1), ["onnxruntime, float32", "OpenVINO, float32", "ours"], CPU))

    assert begun == ["ours"]
    assert capsys.readouterr().out.splitlines() == [
        "left out: onnxruntime, float32: onnxruntime and onnx cannot be found",
        "left out: OpenVINO, float32: openvino cannot be found",
    ]


@pytest.mark.parametrize(
    ("avx512", "amx", "allowed", "dtype"),
    [
        (True, False, True, BF16),
        (False, True, True, BF16),
        (False, False, True, torch.float32),
        (True, False, False, torch.float32),
    ],
)
def test_bfloat16_takes_part_where_there_are_instructions_for_it_that_may_be_used(
    avx512: bool, amx: bool, allowed: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: allowed)

    assert native_dtype(CPU) is dtype
    assert (why_not("diffusers, bfloat16", CPU) == "") == (dtype is BF16)
    assert why_not("diffusers", CPU) == ""


@pytest.mark.parametrize("missing", ["litserve", "openvino"])
def test_a_server_whose_package_is_missing_is_left_out(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "find_spec", lambda name: None if name == missing else find_spec("json"))
    left_out = [contender.name for contender in (*OURS, *OTHERS) if contender.why_not(CPU)]

    assert left_out == [contender.name for contender in OTHERS if missing in contender.peer]
    assert len(left_out) == {"litserve": 6, "openvino": 3}[missing]


# What is said of them


def test_ours_is_held_against_each_and_against_the_best_of_the_others() -> None:
    took = {
        "ours": [1.0, 2.0, 4.0],
        "ours, the bare net": [0.5, 1.0, 2.0],
        "diffusers": [4.0, 8.0, 16.0],
        "onnxruntime, float32": [2.0, 6.0, 8.0],
    }

    assert [(measure.name, measure.value, measure.unit) for measure in ratios("net", took)] == [
        ("net: ours against ours, the bare net", 0.5, "of its speed"),
        ("net: ours against diffusers", 4.0, "times faster"),
        ("net: ours against onnxruntime, float32", 2.0, "times faster"),
        ("net: ours against the best of the others (onnxruntime, float32)", 2.0, "times faster"),
    ]


class Steady:
    """Passes for a remote contender: a step takes 1 s, and 0.75 s more for each further picture."""

    def ask(self, verb: str, batch: int, steps: int) -> float:
        return steps * (0.25 + 0.75 * batch)


def test_a_step_of_many_is_held_against_as_many_steps_of_one() -> None:
    found = growth(Trial("net", Path(), (1, 2), 0.1, 2, (2, 4)), Steady())  # type: ignore[arg-type]

    assert [(measure.name, measure.value, measure.spread) for measure in found] == [
        ("net: ours, a step of 2", 1.75, (1.75, 1.75)),
        ("net: ours, a step of 2 against 2 of 1", 0.875, (0.875, 0.875)),
        ("net: ours, a step of 4 against 4 of 1", 0.8125, (0.8125, 0.8125)),
    ]


def test_only_the_best_server_of_a_kind_is_held_against_ours() -> None:
    speeds = iter([100.0, 120.0, 50.0, 60.0, 40.0, 80.0, 75.0, 70.0, 20.0, 10.0])
    capacity = {contender: next(speeds) for contender in (*OURS, *OTHERS)}
    mine = [measure for measure in http.against_the_best(capacity) if measure.name.startswith("ours, against")]

    assert [(measure.name.removeprefix("ours, against "), measure.value) for measure in mine] == [
        ("LitServe's step loop, batch 32", 100 / 60),
        ("LitServe's step loop with OpenVINO, batch 8", 100 / 80),
        ("micro-batcher, 20 ms and 8", 5.0),
        ("DDPMPipeline, one at a time", 10.0),
    ]


def test_a_step_that_fills_a_block_is_not_repeated() -> None:
    asked = list[int]()

    class Slow(Steady):
        def ask(self, verb: str, batch: int, steps: int) -> float:
            asked.append(steps)
            return super().ask(verb, batch, steps)

    assert [engine.steps_in(block_s, Slow(), 1) for block_s in (0.5, 3.0)] == [1, 3]  # type: ignore[arg-type]
    assert asked == [1, 1, 4]


# Servers


@pytest.fixture(params=["torch", "openvino"])
def core(request: pytest.FixtureRequest, directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Diffusers]:
    """What a peer steps its requests by, in float32."""
    if request.param == "openvino":
        pytest.importorskip("openvino")
    monkeypatch.setattr(peers, "native_dtype", lambda device: torch.float32)
    yield Diffusers(directory, CPU, make_net(request.param, directory, CPU, most=2, threads=1))


def test_a_peer_makes_the_picture_that_diffusers_makes(core: Diffusers, directory: Path) -> None:
    from diffusers import DDPMScheduler

    net, scheduler = Unet(directory), DDPMScheduler.from_pretrained(directory)
    scheduler.set_timesteps(5)
    generator = torch.Generator().manual_seed(3)
    x: Tensor = torch.randn(1, 3, 8, 8, generator=generator)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(net(x, t[None]), t, x, generator=generator).prev_sample
    picture, other = core.begin(Asked(seed=3, steps=5)), core.begin(Asked(seed=4, steps=7))
    while not picture.ended:
        core.step([other, picture])

    assert (picture.step, other.step) == (5, 5)
    assert torch.allclose(picture.x, x, atol=1e-5)


def test_busy_programs_are_gone_when_they_are_needed_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, usual = list[int](), subprocess.Popen

    def popen(*arguments: Any, **options: Any) -> Any:
        program = usual(*arguments, **options)
        begun.append(program.pid)
        return program

    monkeypatch.setattr(subprocess, "Popen", popen)
    with busy.busy_programs(2):
        states = [Path(f"/proc/{pid}/stat").read_text().split()[2] for pid in begun]

    assert states == ["R", "R"]
    assert [pid for pid in begun if Path(f"/proc/{pid}").exists()] == []
