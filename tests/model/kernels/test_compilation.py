"""The Triton kernels compiled for GPUs that are not there: they fit, do not spill, and use what the GPU has."""

import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import pytest
import torch
from torch import Tensor

from model.sampling.table import COLUMNS
from tests.model.engine.test_capture import META

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

STACK = 64  # bytes: the sine of float64 has 48; an accumulator that is spilled would be hundreds
TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}


def stack(cubin: bytes) -> int:
    """Bytes of memory that a thread has for what finds no room in its registers."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        result = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return sum(int(size) for size in re.findall(r"(?:STACK|LOCAL):(\d+)", result.stdout))


@pytest.fixture(params=[pytest.param(89, id="ada", marks=pytest.mark.long), pytest.param(90, id="hopper")])
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Counter[str]]:
    """What was compiled for a GPU of this kind, by name, in place of being launched."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    from benchmarks.absent_gpu import SHARED_BYTES
    from model.kernels import conv, launch

    counted: Counter[str] = Counter()
    names = ("num_warps", "num_stages", "enable_fp_fusion", "launch_pdl")

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **constants: Any) -> None:
        options = {name: constants.pop(name) for name in names if name in constants}
        given = dict(zip([p.name for p in kernel.params], args, strict=False)) | constants
        signature, fixed, known = {}, {}, {}
        for i, p in enumerate(kernel.params):
            value = given[p.name]
            number = type(value) is int and not p.do_not_specialize
            if p.is_constexpr or value is None or (number and value == 1):
                fixed[i,], signature[p.name] = value, "constexpr"
            elif isinstance(value, Tensor):
                known[i,], signature[p.name] = [["tt.divisibility", 16]], TYPES[value.dtype]
            else:
                signature[p.name] = "fp32" if isinstance(value, float) else "i32"
                known |= {(i,): [["tt.divisibility", 16]]} if number and value % 16 == 0 else {}
        source = ASTSource(kernel, signature, fixed, known)
        result = triton.compile(source, target=GPUTarget("cuda", request.param, 32), options=options)
        assert result.asm["cubin"] and not re.search(r"\b(atom|red)\.global", result.asm["ptx"])
        tensor_cores = kernel.fn.__name__ == "_convolve" and args[0].element_size() == 2
        assert ("wgmma" in result.asm["ptx"]) == (tensor_cores and request.param == 90)
        assert result.metadata.shared <= SHARED_BYTES[request.param] and stack(result.asm["cubin"]) <= STACK
        touched, waits, _ = result.asm["ptx"].partition("griddepcontrol.wait")
        assert result.metadata.launch_pdl == bool(waits) == constants.get("DEPENDENT", False)
        assert constants.get("DEPENDENT", request.param == 90) == (request.param == 90)
        assert not (waits and re.search(r"\b(ld|st|cp)\S*\.global", touched))  # before it waits, it touches no memory
        counted[kernel.fn.__name__] += 1

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(launch, "_supported", lambda device: request.param >= 90)
    monkeypatch.setattr(conv, "shared_bytes", lambda device: SHARED_BYTES[request.param])
    yield counted


def test_every_kernel_compiles_and_has_no_atomics(compiled: Counter[str]) -> None:
    from model.kernels import norm, step

    x = torch.zeros(2, 12, 64, 48, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    channels, cursor = torch.zeros(24, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.int64)
    joins: dict[str, Any]
    for groups in (12, 2):
        for time, silu in ((None, False), (channels[None, :12], True), (channels[None], True)):
            affine = (channels[:12], channels[:12], 1e-6)
            joins = {"beside": None, "before": channels[:12], "time": time}
            norm.group_norm(x, groups, *affine, **joins, silu=silu)
        own, beside = (part.contiguous(memory_format=torch.channels_last) for part in x.split([8, 4], dim=1))
        norm.group_norm(own, groups, *affine, beside=beside, before=None, time=None, silu=True)
    wide = torch.zeros(128, dtype=torch.bfloat16)
    for terms in (torch.zeros(2, 128, 32, 32, dtype=torch.bfloat16), torch.zeros(4, 2, 128, 8, 8)):
        last = terms.transpose(-1, -2).transpose(-1, -3).contiguous().movedim(-1, -3)
        norm.group_norm(last, 32, wide, wide, 1e-6, beside=None, before=None, time=None, silu=True)
    norm.add_bias(x, channels, x)
    state, rows, table = (
        torch.zeros(2, 3, 8, 8),
        torch.zeros(2, 5, len(COLUMNS)),
        torch.zeros(9, 40, dtype=torch.bfloat16),
    )
    step.enter(state, rows, cursor, table, 16)
    at: dict[str, Any] = {"rows": rows, "now": cursor, "cursor": cursor, "last": cursor, "seed": cursor}
    for out, scale in ((3, None), (6, None), (3, torch.ones(2, 1, 1, 1))):
        step.update(torch.zeros(2, out, 8, 8), state, state, state, state, scale, **at)

    assert compiled == {
        "_norm_in_registers": 6,
        "_moments": 4,
        "_norm_by_moments": 4,
        "_add_bias": 1,
        "_enter": 1,
        "_update": 3,
    }


def test_kernels_between_two_steps_compile_without_spilling(compiled: Counter[str]) -> None:
    from model.kernels import slots

    for shape, rows in (((3, 256, 256), 1001), ((3, 28, 28), 1001), ((1, 1, 1), 31)):
        pictures = [torch.empty(4, *shape, device=META) for _ in range(3)]
        history = torch.empty(4, 3, *shape, device=META)
        state = (*pictures, history, torch.empty(4, rows, len(COLUMNS), device=META))
        numbers = torch.empty(4, dtype=torch.int64, device=META)
        columns, orders = (numbers,) * 6, torch.empty(2, slots.ORDER, dtype=torch.int64, device=META)
        for brought in (None, pictures[0][:2, None], torch.empty(1, 6, *shape, device=META)):
            slots.seat(orders, brought, state[4][0], state, columns)
        slots.vacate(state, columns, 3, 1, clears=True)
        slots.vacate(state, columns, 3, 1, clears=False)
        slots.vacate(state, columns, 1, None, clears=True)
        for floats in (False, True):
            slots.show(pictures[0], pictures[1], numbers[:3], 2, floats)

    assert compiled == {"_seat": 9, "_vacate": 9, "_show": 6}


# (from channels, to channels, side of the picture, what else) as in nets for 32 x 32 and 256 x 256: each reduction once
CONVOLUTIONS: list[tuple[int, int, int, dict[str, Any]]] = [
    (16, 128, 32, {}),
    (128, 128, 32, {}),
    (128, 3, 32, {}),
    (128, 128, 32, {"stride": 2, "padding": 0, "below": 1}),
    (384, 128, 32, {"size": 1}),
    (128, 128, 32, {"sources": (128, 256)}),
    (256, 256, 16, {"sources": (128,)}),
    (256, 256, 8, {"sources": (256, 256)}),
    (512, 256, 8, {}),
    (256, 256, 8, {"times": 2}),
    (128, 128, 256, {}),
    (512, 512, 8, {}),
    (32, 1, 32, {}),  # Triton makes a constant of a 1
    (40, 24, 1, {"size": 1}),
    (24, 24, 8, {"sources": (24, 12)}),  # and these fill no step
]


@pytest.mark.parametrize(
    ("dtype", "layers", "batches"),
    [
        (torch.bfloat16, CONVOLUTIONS[5:7], (8,)),
        (torch.float32, CONVOLUTIONS[5:7], (8,)),
        pytest.param(torch.bfloat16, CONVOLUTIONS[:5] + CONVOLUTIONS[7:], (8,), marks=pytest.mark.long),
        pytest.param(torch.bfloat16, CONVOLUTIONS, (1, 64), marks=pytest.mark.long),
        pytest.param(torch.float32, CONVOLUTIONS[5:7], (1, 64), marks=pytest.mark.long),
    ],
    ids=["bfloat16", "float32", "other layers", "bfloat16 in other batches", "float32 in other batches"],
)
def test_convolutions_of_real_nets_compile_without_spilling(
    compiled: Counter[str],
    dtype: torch.dtype,
    layers: list[tuple[int, int, int, dict[str, Any]]],
    batches: tuple[int, ...],
) -> None:
    from model.kernels import conv

    for (channels, outs, side, other), batch in product(layers, batches):
        shape: dict[str, Any] = {"size": 3, "stride": 1} | other
        size, sources = shape.pop("size"), shape.pop("sources", ())

        def picture(channels: int, batch: int = batch, side: int = side) -> Tensor:
            x = torch.empty(batch, channels, side, side, dtype=dtype, device=META)
            return x.to(memory_format=torch.channels_last)

        weight = torch.empty(outs, channels, size, size, dtype=dtype, device=META)
        bias = torch.empty(outs, dtype=dtype, device=META)
        if sources:
            projection = torch.empty(outs, sum(sources), 1, 1, dtype=dtype, device=META)
            shape |= {"projection": projection, "sources": [picture(each) for each in sources]}
        add = None if sources else picture(outs)
        conv.convolve(picture(channels), weight, bias, add, **({"padding": size // 2} | shape))

    assert compiled["_convolve"] == len(layers) * len(batches)
