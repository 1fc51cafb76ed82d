"""Linear attention in any batch, beside a library whose products have other bits in batches of another size."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from model.nets.exact import choose_kernels, use_libraries
from model.nets.lucidrains import TOGETHER, LinearAttention, LucidrainsUNet
from model.nets.lucidrains_config import LucidrainsArchitecture

CHANNELS, HEADS, D, SIDE = 12, 2, 8, 6
ROUNDING = 2e-5  # a CPU's convolutions depend on the batch a little, too


class Library(TorchFunctionMode):
    """A library whose products' bits depend on the batch. It keeps the shapes and the layouts that it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.products: set[tuple[tuple[int, ...], tuple[int, ...], bool]] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in (torch.Tensor.__matmul__, torch.Tensor.matmul, torch.matmul):
            return result
        left, right = args
        self.products.add((left.shape, right.shape, left.is_contiguous()))
        return result + 2**-6 * len(left)


def layer(invariant: bool) -> LinearAttention:
    """One layer with random weights, the same ones every time."""
    torch.manual_seed(0)
    attention: Any = LinearAttention(CHANNELS, HEADS, D, memories=4).requires_grad_(False)
    attention.mem_kv.normal_()
    attention.use("invariant" if invariant else "library")
    return attention  # type: ignore[no-any-return]


def pictures(count: int) -> Tensor:
    """Pictures that differ."""
    return torch.randn(count, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("batch", [1, 2, TOGETHER - 1, TOGETHER, TOGETHER + 1, 2 * TOGETHER, 2 * TOGETHER + 3])
@torch.inference_mode()
def test_products_in_groups_equal_those_at_once(batch: int) -> None:
    x = pictures(batch)

    assert torch.allclose(layer(True)(x), layer(False)(x), rtol=ROUNDING, atol=ROUNDING)


@torch.inference_mode()
def test_the_library_multiplies_tensors_of_one_shape_and_layout_for_any_batch() -> None:
    with Library() as library:
        for batch in (1, TOGETHER, 2 * TOGETHER + 3):
            layer(True)(pictures(batch))

    assert len(library.products) == 2  # one for what is kept of keys and values, one for what is read of it


@pytest.mark.parametrize("invariant", [True, False])
@torch.inference_mode()
def test_bits_depend_on_the_batch_where_products_are_made_at_once(invariant: bool) -> None:
    x = pictures(2 * TOGETHER)
    attention = layer(invariant)
    with Library():
        together, few = attention(x), attention(x[:3])

    assert bool((together[:3] - few).abs().max() < ROUNDING) == invariant


def test_the_promise_makes_linear_attention_multiply_in_groups() -> None:
    arch = LucidrainsArchitecture(
        height=8,
        width=8,
        in_channels=3,
        out_channels=3,
        dim=8,
        init_dim=8,
        dim_mults=(1, 2),
        full_attn=(False, True),
        attn_heads=(2, 2),
        attn_dim_head=(8, 8),
    )
    net: Any = LucidrainsUNet(arch).eval().requires_grad_(False)
    linear = [module for module in net.modules() if isinstance(module, LinearAttention)]
    x, embedding = torch.zeros(1, 3, 8, 8), torch.zeros(1, net.embedding_width)
    with torch.inference_mode():
        for _ in choose_kernels(net, lambda: net(x, embedding), [1, 2]):
            pass
    assert [attention.invariant for attention in linear] == [True] * 2

    use_libraries(net)
    assert [attention.invariant for attention in linear] == [False] * 2
