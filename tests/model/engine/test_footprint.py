"""What a model takes is known before it is loaded."""

import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model.checkpoint.card import read_card
from model.checkpoint.load import load_model
from model.engine.footprint import footprint, resident_bytes
from model.engine.runner import prepared
from model.engine.step import scales
from model.nets.activations import alive
from model.nets.build import build
from model.nets.config import Architecture
from model.nets.cpu import CpuNet, supports
from model.nets.lucidrains_config import AnyArchitecture
from model.sampling.schedule import Thresholding
from tests.model.convert.directories import write_model
from tests.model.tiny import ARCHITECTURE, CPU, LUCIDRAINS
from tests.model.tiny import card as tiny_card

WIDE = Architecture(
    height=16,
    width=24,
    block_out_channels=(32, 64, 64),
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    norm_num_groups=8,
)


class Counting(TorchDispatchMode):
    """Counts the bytes of tensors that are made and not yet gone."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now, self.most, self.known = 0, 0, set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.known:
                self.come(tensor.untyped_storage())
        return out

    def come(self, storage: torch.UntypedStorage) -> None:
        """A storage that was not there."""
        key, size = storage._cdata, storage.nbytes()
        self.known.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self.go, key, size)

    def go(self, key: int, size: int) -> None:
        """It is gone."""
        self.known.discard(key)
        self.now -= size


@pytest.mark.parametrize("arch", [ARCHITECTURE, WIDE, LUCIDRAINS], ids=["tiny", "wide", "lucidrains"])
def test_the_estimate_of_live_numbers_is_an_upper_bound_and_not_much_more(arch: AnyArchitecture) -> None:
    net, x = build(arch), torch.zeros(2, *arch.shape)
    embedding = torch.zeros(2, net.embedding_width)
    with torch.no_grad(), Counting() as counting:
        net(x, embedding)

    assert counting.most <= 2 * 4 * alive(arch) <= 3 * counting.most


def test_attention_heads_take_the_same_memory_however_they_are_configured() -> None:
    """Of 64 channels, four heads are heads of sixteen."""
    large = replace(WIDE, height=64, width=64)
    by_number, by_width = replace(large, attention_heads=4), replace(large, attention_head_dim=16)

    assert alive(by_number) == alive(by_width) > alive(replace(large, attention_head_dim=None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_model_takes_no_more_than_its_footprint(tmp_path: Path, dtype: torch.dtype) -> None:
    card = read_card(write_model(tmp_path / "tiny"))
    before = footprint(card, 4, CPU, dtype)
    model = load_model(card, CPU, dtype)
    after = resident_bytes(model, prepared(model, 4).slots)

    assert before.parameters == model.parameters
    assert after <= before.size_bytes
    by_torch = isinstance(model.net, CpuNet) and model.net.note is not None  # where OpenVINO lacks this dtype
    assert before.size_bytes <= 2 * after or by_torch  # which takes less: one copy of the weights, for any batch


@pytest.mark.parametrize("ratio", [1e-6, 0.995])
def test_what_a_step_holds_for_thresholding_is_in_the_footprint(ratio: float) -> None:
    """As far as torch's tensors show it: on a GPU a sort holds more."""
    numbers, x0 = Thresholding(ratio, 2.0), torch.zeros(4, *WIDE.shape)
    plain = tiny_card(WIDE)
    with torch.inference_mode(), Counting() as counting:
        scales(x0, torch.ones(4, 1, 1, 1), numbers)
    thresholded = tiny_card(WIDE, replace(plain.process, thresholding=numbers))
    sizes = [footprint(each, 4, torch.device("meta"), torch.bfloat16).size_bytes for each in (plain, thresholded)]

    assert 0 < counting.most < sizes[1] - sizes[0] < 40 * x0.nbytes


DIGITS = Path(__file__).parents[3] / "benchmarks" / "digits"
TAKEN = """
import ctypes, gc, sys, torch
from pathlib import Path
from model.checkpoint.card import read_card
from model.checkpoint.load import load_model
from model.nets.cpu import grow_up
from model.engine.footprint import footprint, resident_bytes
from model.engine.runner import prepared

CPU, dtype, slots = torch.device("cpu"), getattr(torch, sys.argv[1]), 8
torch.set_num_threads(2)

def load(directory):
    model = load_model(read_card(Path(directory)), CPU, dtype)
    runner = prepared(model, slots)
    grow_up(model.net, slots)
    for count in range(1, slots + 1):
        runner.step(count)
    return model, runner

def held():
    gc.collect()
    getattr(ctypes.CDLL(None), "malloc_trim", bool)(0)
    return 1024 * int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0])

first = load(sys.argv[2])  # with it come the libraries, which every model shares
before = held()
model, runner = load(sys.argv[3])
bound = footprint(model.card, slots, CPU, dtype).size_bytes
print(held() - before, resident_bytes(model, runner.slots), bound)
"""


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_process_grows_by_about_the_footprint_of_a_model(tmp_path: Path, dtype: torch.dtype) -> None:
    if not supports(dtype):
        pytest.skip("this processor does not compute in such numbers")
    command = [sys.executable, "-c", TAKEN, str(dtype).removeprefix("torch."), str(write_model(tmp_path / "tiny"))]
    ran = subprocess.run([*command, str(DIGITS)], capture_output=True, text=True, check=True)
    taken, resident, bound = map(int, ran.stdout.split())

    assert taken / 1.5 < resident < 1.5 * taken
    assert resident <= bound
