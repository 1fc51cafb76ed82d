"""Which kernels may be trusted with a picture's bits: found out layer by layer, when a model starts on a GPU.

A library chooses its kernel by the whole problem, so a picture's bits may be others in another batch. Every kind of
layer for which that is seen gets a kernel that cannot do so; all others keep the library's. Nothing here is timed, so
that two starts on one machine choose alike. What follows from it for the whole step, `model.runner` checks.
"""

import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from model.convolution import Conv
from model.gpu import raise_if_fatal
from model.kernels import SelfAttention
from model.lucid_unet import LinearAttention

Layer: TypeAlias = Conv | SelfAttention
How: TypeAlias = Literal["library", "invariant", "pinned"]  # the last with tiles of one size in every batch
DRAWS = 2  # batches of each size that are compared
FEW = 8  # pictures by which the invariant kernel is compared with the library's
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}  # |ours - theirs| / |theirs| at most
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Chosen:
    """How many layers keep the library's kernel, and how many have the invariant one; of the convolutions among those,
    how many are computed in tiles of one size."""

    cudnn: int
    triton: int
    free: int
    fixed: int
    pinned: int = 0

    def __str__(self) -> str:
        tiles = f" ({self.pinned} in tiles of one size)" if self.pinned else ""
        convolutions = f"convolutions {self.cudnn} cudnn {self.triton} triton{tiles}"
        return f"{convolutions}, attention {self.free} free {self.fixed} fixed"


def _layers(net: nn.Module) -> Iterator[Layer]:
    return (module for module in net.modules() if isinstance(module, Conv | SelfAttention))


def trust_libraries(net: nn.Module) -> None:
    """No layer uses its invariant kernel."""
    for layer in _layers(net):
        _use(layer, "library")
    _group_products(net, False)


def _group_products(net: nn.Module, invariant: bool) -> None:
    """Linear attention needs no trial: its products have the same bits in any batch for a few more kernels."""
    for module in net.modules():
        if isinstance(module, LinearAttention):
            module.invariant = invariant


@dataclass(frozen=True, slots=True, eq=False)
class Kind:
    """Layers that differ in their weights alone, and what they are given. like: [1, C, H, W]"""

    layers: list[Layer]
    like: Tensor

    def inputs(self, batch: int, generator: torch.Generator) -> Tensor:
        """Random pictures for these layers. -> [B, C, H, W]"""
        x = torch.empty(batch, *self.like.shape[1:], dtype=self.like.dtype, device=self.like.device)
        return x.normal_(generator=generator).contiguous(memory_format=torch.channels_last)


def kinds(net: nn.Module, run: Callable[[], object]) -> list[Kind]:
    """All kinds of layers of a net for which there is a choice. run: calls the net once, with a batch of any size"""
    found: dict[Hashable, Kind] = {}

    def note(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, Conv | SelfAttention)
        key, like = (type(layer), layer.extra_repr(), arguments[0].shape[1:]), arguments[0][:1]
        found.setdefault(key, Kind([], like)).layers.append(layer)

    hooks = [layer.register_forward_pre_hook(note) for layer in _layers(net)]
    run()
    for hook in hooks:
        hook.remove()
    return list(found.values())


def choose_kernels(
    net: nn.Module, run: Callable[[], object], buckets: Sequence[int], between: Callable[[], None] = lambda: None
) -> Chosen:
    """Gives its invariant kernel to each layer that needs it for its bits to be the same in batches of these sizes.

    run: calls the net once, with a batch of any size; between: called after each kind, which may take a second
    """
    trust_libraries(net)
    _group_products(net, True)
    for kind in kinds(net, run):
        how = _choose(kind, buckets)
        for layer in kind.layers:
            _use(layer, how)
        between()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # graphs have memory of their own, and could not use what has been freed here
    counted = [(isinstance(layer, Conv), layer.invariant) for layer in _layers(net)]
    return Chosen(
        cudnn=counted.count((True, False)),
        triton=counted.count((True, True)),
        free=counted.count((False, False)),
        fixed=counted.count((False, True)),
        pinned=[layer.pinned for layer in _layers(net) if isinstance(layer, Conv)].count(True),
    )


def _use(layer: Layer, how: How) -> None:
    """The layer is computed in this way from now on."""
    layer.invariant = how != "library"
    if isinstance(layer, Conv):
        layer.pinned = how == "pinned"


def _choose(kind: Kind, buckets: Sequence[int]) -> How:
    """The library's kernel, if its bits do not depend on the batch; else the invariant one, whose tiles follow the
    batch if that costs no bit, if it is as good; else the library's all the same."""
    layer, generator = kind.layers[0], torch.Generator(kind.like.device).manual_seed(0)
    x = kind.inputs(max(buckets), generator)
    theirs = layer(x)
    if agrees(layer, x, theirs, buckets, generator):
        return "library"
    ways: tuple[How, ...] = ("invariant", "pinned") if isinstance(layer, Conv) else ("invariant",)
    for how in ways:
        _use(layer, how)
        try:
            ours = layer(x)
            sound = _close(ours[:FEW], theirs[:FEW]) and agrees(layer, x, ours, buckets, generator)
            trouble = "" if sound else "its results are wrong or depend on the batch"
        except Exception as error:  # a compiler, too little shared memory: the library's kernel still works
            raise_if_fatal(error, x.device)
            trouble = f"{type(error).__name__}: {error}"
        if not trouble:
            return how
        logger.warning("no %s kernel for %s with %s: %s", how, layer, list(x.shape[1:]), trouble)
    return "library"


def agrees(layer: Layer, x: Tensor, expected: Tensor, buckets: Sequence[int], generator: torch.Generator) -> bool:
    """Whether the layer computes each picture to the same bits in batches of all these sizes, beside anybody."""
    for bucket in buckets:
        for _ in range(DRAWS):
            chosen = torch.randint(len(x), (bucket,), generator=generator, device=x.device)
            if not torch.equal(layer(x[chosen].contiguous(memory_format=torch.channels_last)), expected[chosen]):
                return False
    return True


def _close(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two results differ by rounding alone."""
    return bool((ours.float() - theirs.float()).norm() <= CLOSE[ours.dtype] * theirs.float().norm())
