"""Where `cases`, `conv_cases` and `slot_cases` run the kernels: on a GPU, or under Triton's
interpreter. A plugin of pytest, so that what it sets up holds for all.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor
from torch.utils._pytree import tree_flatten
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _LangPatchScope

import model.nets.layers

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
DTYPES = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}  # and how exact they are


@pytest.fixture(autouse=True)
def seed() -> None:
    """Random numbers are the same ones in every run."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def inference(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Where the kernels are used. Convolutions keep all digits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with torch.inference_mode():
        yield


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is full of NaN, so that what a kernel forgets to write is seen."""
    for name in ("empty", "empty_like"):
        usual = getattr(torch, name)

        def poisoned(*args: Any, usual: Any = usual, **how: Any) -> Any:
            out = usual(*args, **how)
            return out.fill_(torch.nan) if out.is_floating_point() else out

        monkeypatch.setattr(torch, name, poisoned)


@pytest.fixture
def kernels_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton is used on this device, even if it is a CPU."""
    monkeypatch.setattr(model.nets.layers, "TRITON_ON", frozenset({DEVICE.type}))


def draw(*shape: int, dtype: torch.dtype = torch.float32, mean: float = 0.5) -> Tensor:
    """Random numbers with some mean, of which none is 0. A picture, if there are four dimensions, is channels-last."""
    x = (torch.randn(*shape) + mean).to(DEVICE, dtype)
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def remembered(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function, which is called once for the same numbers: the interpreter takes long, and gives the same bits."""
    known: dict[Any, Tensor] = {}

    def call(*args: Any, **how: Any) -> Tensor:
        leaves, form = tree_flatten((args, how))
        key = (str(form), *(bits(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves))
        if key not in known:
            known[key] = function(*args, **how)
        return known[key].clone()

    return function if DEVICE.type != "cpu" else call


def bits(x: Tensor) -> tuple[Any, ...]:
    """All there is to a tensor."""
    return x.shape, x.stride(), x.dtype, x.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def error(given: Tensor, expected: Tensor) -> float:
    """The largest difference, in standard deviations of what was expected."""
    assert given.isfinite().all()
    return float((given.double() - expected).abs().max() / expected.std())


@pytest.fixture(autouse=True)
def products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter multiplies matrices term by term, in the order of K, as a GPU does.

    By itself it uses numpy, which on some processors gives a row other bits at another place in the matrix, and it
    would multiply the bits of bfloat16 as if they were whole numbers.
    """

    def numbers(x: Any) -> Any:
        return (x.data.astype(np.uint32) << 16).view(np.float32) if x.dtype.scalar == tl.bfloat16 else x.data

    def create_dot(builder: Any, a: Any, b: Any, total: Any, *rest: Any) -> Any:
        out = total.data.copy()
        for column, row in zip(numbers(a).astype(out.dtype).T, numbers(b).astype(out.dtype), strict=True):
            out += column[:, None] * row
        return TensorHandle(out, total.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


@pytest.fixture(autouse=True)
def indices(monkeypatch: pytest.MonkeyPatch) -> None:
    """An index is read from an array of one element, which numpy 2.5 refuses to Triton 3.6's interpreter."""
    usual = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        usual(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch)


@pytest.fixture(autouse=True)
def overflows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sum, difference and product of integers is checked for an overflow, as the interpreter does by itself, but
    by numpy: by Triton's own operations this check takes half of the time."""
    if DEVICE.type != "cpu":
        return  # for a GPU, a kernel is compiled without the check
    operations = {"add": np.add, "sub": np.subtract, "mul": np.multiply}

    def check(semantic: Any, a: Any, b: Any, operation: Any) -> None:
        kind = a.type.scalar
        assert kind == b.type.scalar and kind.is_int()
        if kind.int_bitwidth < 64:
            exact = operations[operation.__name__](a.handle.data, b.handle.data, dtype=np.int64)
            fits = (exact >= kind.get_int_min_value()) & (exact <= kind.get_int_max_value())
            assert fits.all(), f"int{kind.int_bitwidth} overflow detected for operation {operation.__name__}"

    monkeypatch.setattr(TritonSemantic, "binary_op_sanitize_overflow_impl", check)


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch prepares Triton's language once for each module whose functions a kernel calls: the interpreter would
    prepare it anew for each call."""
    prepared, usual, end = set[str](), interpreter._patch_lang, _LangPatchScope.restore

    def patch(function: Any) -> Any:
        if function.__module__ in prepared:
            return _LangPatchScope()
        prepared.add(function.__module__)
        return usual(function)

    def restore(scope: Any) -> None:
        prepared.clear()
        end(scope)

    monkeypatch.setattr(interpreter, "_patch_lang", patch)
    monkeypatch.setattr(_LangPatchScope, "restore", restore)
