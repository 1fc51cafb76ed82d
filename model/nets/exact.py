"""Which kernels may be trusted with a picture's bits: found out layer by layer, when a model starts on a GPU.

A library chooses its kernel by the whole problem, so a picture's bits may be others in another batch. Every kind of
layer for which that is seen gets a kernel that cannot do so; all others keep the library's. Nothing here is timed, so
that two starts on one machine choose alike. What follows from it for the whole step, `model.engine.runner` checks.
"""

import logging
from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from model.nets.convolution import Conv, Projection
from model.nets.gpu import raise_if_fatal
from model.nets.layers import SelfAttention
from model.nets.lucidrains import LinearAttention

Layer: TypeAlias = Conv | SelfAttention
How: TypeAlias = Literal["library", "invariant", "pinned"]  # the last with tiles of one size in every batch
DRAWS = 2  # batches of each size that are compared
FEW = 8  # pictures by which the invariant kernel is compared with the library's
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}  # |ours - theirs| / |theirs| at most
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Chosen:
    """How many layers keep the library's kernel, and how many have the invariant one; of the convolutions among those,
    how many are computed in tiles of one size. A shortcut that joins another convolution's walk does not count."""

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
class Given:
    """What a layer is called with: a picture, and for a convolution perhaps what is added to it. [B, ...] each

    shortcut: the convolution that the pictures in `added` go through, if it is not a picture itself that is added
    """

    x: Tensor
    added: tuple[Tensor, ...] = ()
    shortcut: Conv | None = None
    whole: bool = True

    @classmethod
    def of(cls, x: Tensor, add: Tensor | Projection | None = None, *, whole: bool = True) -> "Given":
        """The arguments of a call."""
        if isinstance(add, Projection):
            return cls(x, add.sources, add.conv, whole)
        return cls(x, () if add is None else (add,), None, whole)

    @property
    def shape(self) -> Hashable:
        """What tells it from what other kinds of layers are called with."""
        shapes = tuple(tuple(each.shape[1:]) for each in (self.x, *self.added))
        return shapes, self.shortcut is None, self.whole

    def like(self, make: Callable[[Tensor], Tensor]) -> "Given":
        """Others in place of these pictures, channels-last."""
        x, *added = (make(each).contiguous(memory_format=torch.channels_last) for each in (self.x, *self.added))
        return replace(self, x=x, added=tuple(added))


@dataclass(frozen=True, slots=True, eq=False)
class Kind:
    """Layers that differ in their weights alone, and what the first of them is called with."""

    layers: list[Layer]
    given: Given

    def inputs(self, batch: int, generator: torch.Generator) -> Given:
        """Random pictures for these layers."""

        def make(like: Tensor) -> Tensor:
            made = torch.empty(batch, *like.shape[1:], dtype=like.dtype, device=like.device)
            return made.normal_(generator=generator)

        return self.given.like(make)

    def call(self, given: Given) -> Tensor:
        """What a layer gives, called as in a step. -> [B, out, H', W'], or terms of a sum, [B, S, out, H', W']"""
        layer = self.layers[0]
        if not isinstance(layer, Conv):
            return layer(given.x)  # type: ignore[no-any-return]
        add: Tensor | Projection | None = given.added[0] if given.added else None
        if given.shortcut is not None:
            add = Projection(given.shortcut, given.added)
        out: Tensor = layer(given.x, add=add, whole=given.whole)
        return out if out.ndim == 4 else out.movedim(1, 0)


def kinds(net: nn.Module, run: Callable[[], object]) -> list[Kind]:
    """All kinds of layers that are called. run: calls the net once, with a batch of any size"""
    found: dict[Hashable, Kind] = {}

    def note(layer: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        assert isinstance(layer, Conv | SelfAttention)
        given = Given.of(*arguments, **named).like(lambda each: each[:1])
        key = (type(layer), layer.extra_repr(), given.shape)
        found.setdefault(key, Kind([], given)).layers.append(layer)

    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in _layers(net)]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return list(found.values())


def choose_kernels(net: nn.Module, run: Callable[[], object], buckets: Sequence[int]) -> Generator[None, None, Chosen]:
    """Gives its invariant kernel to each layer that needs it for its bits to be the same in batches of these sizes.

    Each is tried as a step calls it, with what is added to it. A shortcut that joins the walk of the convolution it is
    added to is tried with that one, and by itself only where that one keeps the library's kernel.

    run: calls the net once, with a batch of any size. Yields after each kind of layer, which may take a second.
    """
    tried: set[Layer] = set()
    for how in ("invariant", "library"):  # as they are called if all are ours; then who is called only otherwise
        for layer in _layers(net):
            if layer not in tried:
                _use(layer, how)
        _group_products(net, True)
        for kind in _called(net, run, how):
            if tried.issuperset(kind.layers):
                continue
            chosen = _choose(kind, buckets)
            for layer in kind.layers:
                _use(layer, chosen)
            tried.update(kind.layers)
            yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # graphs have memory of their own, and could not use what has been freed here
    counted = [(isinstance(layer, Conv), layer.invariant) for layer in tried]
    return Chosen(
        cudnn=counted.count((True, False)),
        triton=counted.count((True, True)),
        free=counted.count((False, False)),
        fixed=counted.count((False, True)),
        pinned=[layer.pinned for layer in tried if isinstance(layer, Conv)].count(True),
    )


def _called(net: nn.Module, run: Callable[[], object], how: How) -> list[Kind]:
    """All kinds of layers that are called if those that can be chosen are computed so; none, if they cannot be."""
    try:
        return kinds(net, run)
    except Exception as error:
        if how == "library":
            raise
        raise_if_fatal(error, next(net.parameters()).device)
        return []  # the one that fails is found out when it is tried


def _use(layer: Layer, how: How) -> None:
    """The layer is computed in this way from now on."""
    layer.invariant = how != "library"
    if isinstance(layer, Conv):
        layer.pinned = how == "pinned"


def _choose(kind: Kind, buckets: Sequence[int]) -> How:
    """The library's kernel, if its bits do not depend on the batch; else the invariant one, whose tiles follow the
    batch if that costs no bit, if it is as good; else the library's all the same."""
    layer, generator = kind.layers[0], torch.Generator(kind.given.x.device).manual_seed(0)
    given = kind.inputs(max(buckets), generator)
    for each in (layer, given.shortcut):
        if each is not None:
            _use(each, "library")
    theirs = kind.call(given)
    if agrees(kind, given, theirs, buckets, generator):
        return "library"
    ways: tuple[How, ...] = ("invariant", "pinned") if isinstance(layer, Conv) else ("invariant",)
    for how in ways:
        _use(layer, how)
        try:
            ours = kind.call(given)
            sound = _close(ours[:FEW], theirs[:FEW]) and agrees(kind, given, ours, buckets, generator)
            trouble = "" if sound else "its results are wrong or depend on the batch"
        except Exception as error:  # a compiler, too little shared memory: the library's kernel still works
            raise_if_fatal(error, given.x.device)
            trouble = f"{type(error).__name__}: {error}"
        if not trouble:
            return how
        logger.warning("no %s kernel for %s with %s: %s", how, layer, list(given.x.shape[1:]), trouble)
    return "library"


def agrees(kind: Kind, given: Given, expected: Tensor, buckets: Sequence[int], generator: torch.Generator) -> bool:
    """Whether a layer computes each picture to the same bits in batches of all these sizes, beside anybody."""
    for bucket in buckets:
        for _ in range(DRAWS):
            chosen = torch.randint(len(given.x), (bucket,), generator=generator, device=given.x.device)
            few = given.like(lambda each, chosen=chosen: each[chosen])  # type: ignore[misc]
            if not torch.equal(kind.call(few), expected[chosen]):
                return False
    return True


def _close(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two results differ by rounding alone. ours, theirs: [B, ...]; ours perhaps terms of a sum, [B, S, ...]"""
    ours = ours if ours.ndim == theirs.ndim else ours.sum(1).to(theirs.dtype)
    return bool((ours.float() - theirs.float()).norm() <= CLOSE[ours.dtype] * theirs.float().norm())
