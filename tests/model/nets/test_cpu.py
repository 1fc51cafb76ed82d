"""A net on a CPU: OpenVINO computes what torch does, in batches of any size the same bits, or torch takes its place."""

import builtins
import gc
import os
import re
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.checkpoint.card import read_card
from model.checkpoint.load import load_model
from model.nets.activations import sizes_up_to
from model.nets.build import Net, build
from model.nets.config import architecture
from model.nets.cpu import CpuNet, checked_shape, grow_up
from model.nets.lucidrains_config import AnyArchitecture
from tests.model.convert.directories import write_model
from tests.model.tiny import ARCHITECTURE, CPU, LUCIDRAINS
from tests.model.worlds import CIFAR10, relative_error, small

pytestmark = pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is not installed")

WIDE = architecture(small(sample_size=[32, 32], block_out_channels=[32, 64]))
LARGE = CIFAR10 | {
    "sample_size": 256,
    "block_out_channels": [128, 128, 256, 256, 512, 512],
    "down_block_types": [*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4],
}
KINDS: dict[str, AnyArchitecture] = {
    "tiny": ARCHITECTURE,
    "lucidrains": LUCIDRAINS,
    "resized by residual blocks": architecture(
        small(
            down_block_types=["ResnetDownsampleBlock2D", "AttnDownBlock2D"],
            up_block_types=["AttnUpBlock2D", "ResnetUpsampleBlock2D"],
            resnet_time_scale_shift="scale_shift",
            out_channels=6,
        )
    ),
    "padded below": architecture(small(downsample_padding=0, attention_head_dim=4)),
    "without attention": architecture(
        small(down_block_types=["DownBlock2D"] * 2, up_block_types=["UpBlock2D"] * 2, add_attention=False)
    ),
    "pooled and repeated": replace(ARCHITECTURE, downsample_type="pool", upsample_type="repeat"),
    "not square": architecture(small(sample_size=[12, 20])),
    "conditional": replace(ARCHITECTURE, num_class_embeds=5),
    "lucidrains, conditional": replace(
        LUCIDRAINS, num_classes=4, num_mem_kv=0, downsample_kernel=4, dim_mults=(1, 2, 2), full_attn=(False,) * 3
    ),
}


def torch_net(arch: AnyArchitecture = ARCHITECTURE) -> Net:
    """A net with random weights, the same ones every time."""
    torch.manual_seed(0)
    net = build(arch).eval().requires_grad_(False)
    for parameter in net.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter) if parameter.ndim == 1 else 0)
    return net


def table_of(net: Net) -> Tensor:
    """A few rows of embeddings."""
    return net.embed(torch.arange(30))


def cpu_net(arch: AnyArchitecture = ARCHITECTURE, dtype: torch.dtype = torch.float32) -> CpuNet:
    """The same net, as it is served."""
    net = torch_net(arch)
    table = table_of(net)
    net.fuse()
    return CpuNet(net, table, dtype, 5000)


def inputs(net: CpuNet | Net, batch: int) -> tuple[Tensor, Tensor]:
    """Random pictures and embeddings."""
    generator = torch.Generator().manual_seed(batch)
    shapes = (batch, *net.arch.shape), (batch, net.embedding_width)
    x, embedding = (torch.randn(shape, generator=generator) for shape in shapes)
    return x, embedding


def room() -> Any:
    """The module that OpenVINO is imported in."""
    from model.nets import openvino_graph

    return openvino_graph


def openvino_symbols() -> Any:
    """The module of the symbols' operations."""
    from model.nets import openvino_symbols

    return openvino_symbols


def with_compiled(monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor, int], Tensor]) -> None:
    """From now on OpenVINO gives another result: change(result, size of batch)."""
    usual = room().compile_net

    def compile_net(net: Net, shape: Sequence[int], batch: int, dtype: torch.dtype, threads: int) -> Any:
        run = usual(net, shape, batch, dtype, threads)()
        return lambda: lambda x, embedding: change(run(x, embedding), batch)

    monkeypatch.setattr(room(), "compile_net", compile_net)


# Results


@pytest.mark.parametrize("arch", KINDS.values(), ids=KINDS.keys())
@torch.inference_mode()
def test_openvino_computes_the_same_as_torch_for_every_kind_of_net(arch: AnyArchitecture) -> None:
    if arch is KINDS["not square"] and os.environ.get("ONEDNN_MAX_CPU_ISA", "").startswith("AVX2"):
        pytest.skip("OpenVINO's MVN crashes if oneDNN is limited on a processor with AVX-512: benchmarks/README.md")
    net = cpu_net(arch)
    given = inputs(net, 3)

    assert (net.note, net.runtime) == (None, "openvino 2026.4.1")
    assert relative_error(net(*given), torch_net(arch)(*given)) < 2e-6


@torch.inference_mode()
def test_a_convolution_of_a_doubled_picture_reads_it_once() -> None:
    conv = nn.Conv2d(3, 5, 3, padding=1).requires_grad_(False)

    class Doubling(nn.Module):
        embedding_width = 1

        def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
            out: Tensor = conv(nn.functional.interpolate(x, scale_factor=2.0, mode="nearest"))
            return out

    x, net = torch.randn(2, 3, 5, 7), Doubling()
    run = room().compile_net(net, (3, 5, 7), 2, torch.float32, 1)()

    assert torch.allclose(run(x, torch.zeros(2, 1)), net(x, torch.zeros(2, 1)), atol=1e-6)


# Batch sizes


@torch.inference_mode()
def test_pictures_in_a_batch_of_any_size_equal_those_alone_before_and_after_the_net_grows() -> None:
    net = cpu_net()
    x, embedding = inputs(net, 11)
    alone = torch.cat([net(x[i : i + 1], embedding[i : i + 1]) for i in range(11)])
    before = [net(x[:count], embedding[:count]) for count in range(1, 12)]
    grow_up(net, 8)

    assert net.sizes == [1, 2, 4, 8]
    for count, batch in enumerate(before, 1):
        assert torch.equal(batch, alone[:count])
        assert torch.equal(net(x[:count], embedding[:count]), alone[:count])


SIGNALLED = """
import gc, os, signal
from tests.model.nets.test_cpu import cpu_net, grow_up

nets = [cpu_net(), cpu_net()]
for net in nets:
    grow_up(net, 2)
del net
while nets:
    del nets[0]  # in the order they came in
    gc.collect()
signal.signal(signal.SIGTERM, lambda *_: print("told"))
os.kill(os.getpid(), signal.SIGTERM)
print("alive")
"""


def test_a_signal_is_handled_after_nets_were_dropped() -> None:
    root = Path(__file__).parents[3]
    ran = subprocess.run([sys.executable, "-c", SIGNALLED], cwd=root, capture_output=True, text=True)

    assert (ran.returncode, ran.stdout) == (0, "told\nalive\n"), ran.stderr


def test_all_nets_share_one_core_of_openvino() -> None:
    root = Path(__file__).parents[3]
    files = [file for folder in ("model", "server", "benchmarks") for file in (root / folder).rglob("*.py")]

    assert [file.name for file in files if re.search(r"\bCore\(\)", file.read_text())] == ["openvino_graph.py"]


def test_a_net_made_in_inference_mode_may_be_used_outside_of_it() -> None:
    with torch.inference_mode():
        net = cpu_net()
    x, embedding = inputs(net, 1)

    assert net(x, embedding).isfinite().all()


@torch.inference_mode()
def test_the_result_of_a_batch_is_not_overwritten_by_the_next() -> None:
    net = cpu_net()
    first, second = (net(*inputs(net, 1)), net(torch.zeros(1, *net.arch.shape), inputs(net, 1)[1]))

    assert not torch.equal(first, second)


def test_batch_sizes_are_compiled_one_by_one_smallest_first() -> None:
    net = cpu_net()
    seen = [net.sizes]
    while net.grow(6):
        seen.append(net.sizes)

    assert [*seen, net.sizes] == [[1], [1, 2], [1, 2, 4]]
    assert not net.grow(6)


CONFIGURATIONS: list[tuple[dict[str, Any], torch.dtype, list[int]]] = [
    (CIFAR10, torch.float32, [1, 2, 4, 8]),
    (LARGE, torch.float32, [1, 2]),
    (LARGE, torch.bfloat16, [1, 2, 4]),
]


@pytest.mark.parametrize(("config", "dtype", "sizes"), CONFIGURATIONS)
def test_there_are_as_many_batch_sizes_as_the_memory_allows(
    config: dict[str, Any], dtype: torch.dtype, sizes: list[int]
) -> None:
    arch = architecture(config)
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in build(arch).parameters())

    assert sizes_up_to(8, arch, parameters, dtype) == sizes
    assert sizes_up_to(1, arch, parameters, dtype) == sizes_up_to(8, arch, 1 << 30, dtype) == [1]


def test_a_net_grows_in_one_thread_while_another_uses_it() -> None:
    net = cpu_net(WIDE)
    x, embedding = inputs(net, 8)
    with torch.inference_mode():
        expected = net(x, embedding)
    with ThreadPoolExecutor(1) as thread:
        growth, made = thread.submit(grow_up, net, 8), list[Tensor]()
        while not growth.done():
            made.append(net(x, embedding))
        growth.result()

    assert made and net.sizes == [1, 2, 4, 8]
    assert all(torch.equal(batch, expected) for batch in [*made, net(x, embedding)])


@torch.inference_mode()
def test_a_batch_size_in_which_bits_differ_is_not_used_and_a_warning_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with_compiled(monkeypatch, lambda out, batch: out * (1 + 2**-20 * (batch == 2)))
    net = cpu_net()
    with caplog.at_level("WARNING"):
        grow_up(net, 4)

    assert net.sizes == [1, 4]
    assert [record.getMessage() for record in caplog.records] == [
        "batches of 2 are not used: a picture's bits differ in them"
    ]


@torch.inference_mode()
def test_a_batch_size_in_which_the_slot_matters_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(out: Tensor, batch: int) -> Tensor:
        return out * (1 + 2**-20 * (torch.arange(batch) == 3)[:, None, None, None])

    with_compiled(monkeypatch, change)
    net = cpu_net()
    grow_up(net, 4)

    assert net.sizes == [1, 2]


def test_a_batch_size_that_exhausts_the_memory_ends_the_growth(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    usual = room().compile_net

    def compile_net(net: Net, shape: Sequence[int], batch: int, dtype: torch.dtype, threads: int) -> Any:
        if batch == 4:
            raise RuntimeError("Exception from somewhere:\n\nstd::bad_alloc\n")
        return usual(net, shape, batch, dtype, threads)

    monkeypatch.setattr(room(), "compile_net", compile_net)
    net = cpu_net()
    with caplog.at_level("WARNING"):
        grow_up(net, 8)

    assert net.sizes == [1, 2]
    assert "batches of 4 or more are not used, since OpenVINO has no memory for batches of 4" in caplog.text


def test_torchs_weights_are_freed_after_the_last_batch_size() -> None:
    net = torch_net()
    table = table_of(net)
    net.fuse()
    there, compiled = weakref.ref(net), CpuNet(net, table, torch.float32, 5000)
    del net
    gc.collect()
    assert there() is not None
    grow_up(compiled, 2)
    gc.collect()

    assert there() is None


@pytest.mark.parametrize(
    ("size", "checked"),
    [([32, 32], (3, 32, 32)), ([256, 256], (3, 64, 64)), ([64, 128], (3, 64, 64)), ([96, 96], (3, 96, 96))],
)
def test_large_nets_are_compared_with_torch_on_small_pictures(size: list[int], checked: tuple[int, ...]) -> None:
    assert checked_shape(architecture(small(sample_size=size))) == checked


@torch.inference_mode()
def test_a_net_that_is_checked_on_small_pictures_makes_large_ones() -> None:
    arch = architecture(small(sample_size=[128, 128]))
    net = cpu_net(arch)
    given = inputs(net, 1)

    assert net.picture_s > 0
    assert relative_error(net(*given), torch_net(arch)(*given)) < 2e-6


@torch.inference_mode()
def test_a_batch_that_lacks_one_picture_is_run_with_another_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[int]()

    def change(out: Tensor, batch: int) -> Tensor:
        asked.append(batch)
        return out

    with_compiled(monkeypatch, change)
    net = cpu_net()
    grow_up(net, 8)
    runs = list[list[int]]()
    for count in (3, 6, 7, 8, 15):
        asked.clear()
        assert len(net(*inputs(net, count))) == count
        runs.append(list(asked))

    assert runs == [[2, 1], [4, 2], [8], [8], [8, 8]]


def test_a_net_of_many_levels_is_checked_on_a_picture_that_has_a_pixel_on_each() -> None:
    deep = replace(ARCHITECTURE, height=512, width=512, block_out_channels=(8,) * 8)

    assert checked_shape(deep) == (1, 256, 256)


# Nets that torch runs instead


@torch.inference_mode()
def assert_run_by_torch(net: CpuNet, why: str) -> None:
    """This net says so, and computes what it should, in any company."""
    assert net.note == f"run by torch, since OpenVINO {why}"
    assert net.runtime == f"torch {torch.__version__}"
    x, embedding = inputs(net, 5)
    grow_up(net, 4)
    assert net.sizes == [1]
    expected = torch_net()(x, embedding)
    assert relative_error(net(x, embedding), expected) < 2e-6
    alone = torch.cat([net(x[i : i + 1], embedding[i : i + 1]) for i in range(5)])
    assert torch.equal(net(x, embedding), alone)


def test_without_openvino_torch_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "model.nets.openvino_graph")
    monkeypatch.delattr("model.nets.openvino_graph")
    monkeypatch.setitem(sys.modules, "openvino", None)

    assert_run_by_torch(cpu_net(), "cannot be imported: import of openvino halted; None in sys.modules")


@pytest.mark.parametrize(
    "error", [ImportError("undefined symbol: _ZN2ov4CoreC1Ev"), OSError("libtbb.so.12: not found")]
)
def test_torch_runs_the_net_if_openvino_cannot_be_imported(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = builtins.__import__

    def importing(name: str, *rest: Any) -> Any:
        if name == "openvino":
            raise error
        return usual(name, *rest)

    monkeypatch.delitem(sys.modules, "model.nets.openvino_graph")
    monkeypatch.delattr("model.nets.openvino_graph")
    monkeypatch.setattr(builtins, "__import__", importing)

    assert_run_by_torch(cpu_net(), f"cannot be imported: {error}")


def test_a_net_that_openvino_computes_wrongly_is_run_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    with_compiled(monkeypatch, lambda out, batch: out * 1.001)
    net = cpu_net()

    assert_run_by_torch(net, "makes an error of 1.0e-03 beside torch in float32, where 1e-04 is allowed")


def test_a_net_whose_result_is_nan_is_not_run_by_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    with_compiled(monkeypatch, lambda out, batch: out * torch.nan)

    assert_run_by_torch(cpu_net(), "makes an error of nan beside torch in float32, where 1e-04 is allowed")


def test_a_net_that_openvino_refuses_is_run_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_net(*_: object) -> Any:
        raise RuntimeError("Exception from src/core.cpp:117:\n\nno such instruction\n\n")

    monkeypatch.setattr(room(), "compile_net", compile_net)

    assert_run_by_torch(cpu_net(), "refuses it: no such instruction")


def test_a_net_with_an_operation_that_symbols_lack_is_run_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(openvino_symbols().MEANINGS, torch.nn.functional.silu)
    net = cpu_net()

    assert net.note is not None and "OpenVINO refuses it: Symbol does not support <function silu" in net.note


def test_torch_runs_the_net_in_a_dtype_that_the_processor_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room(), "computes_in", lambda dtype: dtype == torch.float32)
    net = cpu_net(dtype=torch.bfloat16)

    assert net.note == "run by torch, since OpenVINO does not compute in bfloat16 on this processor"


def test_torch_uses_the_threads_the_net_was_made_with_and_leaves_the_callers_unchanged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    net, seen = torch_net(), list[int]()
    net.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    on_cpu = CpuNet(net, table_of(net), torch.float32, 5000, "is not wanted")
    torch.set_num_threads(1)
    with torch.inference_mode():
        on_cpu(*inputs(on_cpu, 1))
    after = torch.get_num_threads()
    torch.set_num_threads(before)

    assert (seen[-1], after) == (2, 1)


# The weights file


def test_nothing_of_the_weights_file_stays_mapped(tmp_path: Path) -> None:
    """A later change of the file must not change the net."""
    directory = write_model(tmp_path / "tiny")
    model = load_model(read_card(directory), CPU, torch.float32)
    assert model.parameters > 0

    assert str(directory) not in Path("/proc/self/maps").read_text()
