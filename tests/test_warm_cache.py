"""Kernels that are compiled where there is no GPU are found where there is one, as far as that can be seen without."""

import os
import platform
import subprocess
import sys
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import warm_cache
from benchmarks.unpack import unpack_kernels
from model.checkpoint.card import read_card
from model.engine.slots import Slots
from model.nets.config import architecture
from tests.model.worlds import small

ROOT = Path(__file__).parent.parent
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


@dataclass(frozen=True, slots=True)
class Made:
    """What was compiled for a net, and where it lies."""

    used: list[Any]
    cache: Path
    kernels: list[Any]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The kernels of the smallest net, in batches of 1 and of 3."""
    from benchmarks.kernels_used import Use, compiled

    config = small(block_out_channels=[8], down_block_types=["DownBlock2D"], up_block_types=["UpBlock2D"])
    card = replace(read_card(ROOT / "weights" / "digits"), architecture=architecture(config))
    used, cache = [Use(card, (1, 3))], tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(cache))
        return Made(used, cache, compiled(90, used))


@pytest.mark.long
@needs_triton
def test_a_kernel_has_the_key_that_a_launch_with_memory_asks_for(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.kernels_used import compiled

    monkeypatch.setenv("TRITON_CACHE_DIR", str(made.cache))
    monkeypatch.setattr(Slots, "ahead_steps", 0)  # as on a GPU
    on_meta = {kernel.hash: kernel.name for kernel in made.kernels}
    with_memory = {kernel.hash: kernel.name for kernel in compiled(90, made.used, torch.device("cpu"))}

    assert on_meta == with_memory
    around = {"_seat", "_enter", "_update", "_show", "_vacate"}
    assert around | {"_norm_in_registers", "_add_bias", "_convolve"} <= set(on_meta.values())


@pytest.mark.long
@needs_triton
def test_what_is_packed_is_all_that_is_needed_elsewhere(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.compiler import ASTSource

    from benchmarks.kernels_used import compiled

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "found"))
    monkeypatch.setattr(ASTSource, "make_ir", lambda *_: pytest.fail("it was compiled again"))
    warm_cache.pack(made.cache, tmp_path / "kernels.tar.xz")

    assert unpack_kernels(tmp_path / "kernels.tar.xz", tmp_path / "found") == len(made.kernels)
    found = compiled(90, made.used)
    assert [kernel.hash for kernel in found] == [kernel.hash for kernel in made.kernels]
    assert all(one.kernel == other.kernel for one, other in zip(found, made.kernels, strict=True))
    assert {Path(path).parents[1] for kernel in found for path in kernel.metadata_group.values()} == {
        tmp_path / "found"
    }


def test_a_python_that_would_compile_for_nobody_says_so_in_one_line(tmp_path: Path) -> None:
    code = "from benchmarks import warm_cache as w; w.TRITON = '0.0'; raise SystemExit(w.main())"
    command = [sys.executable, "-c", code, "--out", str(tmp_path / "kernels.tar.xz")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    assert (result.returncode, result.stdout, len(result.stderr.splitlines())) == (2, "", 1)
    assert f"this is Python {platform.python_version()}" in result.stderr
    assert os.listdir(tmp_path) == []
