"""The choice of kernels for a net on a GPU: for each kind of layer, one in which a picture's bits are always the same.

A library chooses its kernel by the shape of the whole batch, so a picture's bits may differ between batch sizes. Each
kind of layer for which a trial shows that gets a kernel whose bits cannot depend on the batch; all others keep the
library's. Nothing here is timed, so two starts on one machine choose alike. `model.engine.exactness` checks the step.
"""

import logging
from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from model.errors import attempt
from model.kernels.gpu import raise_if_fatal
from model.nets.activations import alive
from model.nets.build import Net
from model.nets.convolution import Conv, Projection
from model.nets.layers import GroupNorm, How, SelfAttention
from model.nets.lucidrains import LinearAttention

Layer: TypeAlias = Conv | SelfAttention
MOST_NUMBERS = 2**31  # kernels count the numbers of a picture in int32
DRAWS = 2  # batches of each size that are compared
FEW = 8  # pictures in which the invariant kernel is compared with the library's
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}  # |ours - theirs| / |theirs| at most
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """The numbers of convolutions by cuDNN and by Triton, and of attentions by any kernel (free) or an invariant one
    (fixed); `pinned` of the convolutions by Triton have tiles of one size in every batch. A shortcut that another
    convolution computes along with its own result does not count."""

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


def fits_kernels(net: Net) -> bool:
    """Whether Triton's kernels can compute with pictures as large as this net's."""
    return alive(net.arch) < MOST_NUMBERS


def use_libraries(net: Net) -> None:
    """Makes all layers use the library's kernels, with Triton's around them, if these can be used at all."""
    how: How = "library" if fits_kernels(net) else "torch"
    for module in net.modules():
        if isinstance(module, Conv | GroupNorm | SelfAttention | LinearAttention):
            module.use(how)


@dataclass(frozen=True, slots=True, eq=False)
class Given:
    """The arguments of a layer: a picture, and pictures that a convolution adds to its result. [B, ...] each

    shortcut: the convolution of the pictures in `added`, if its result is added and not a picture itself
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
        """What distinguishes it from the arguments of other kinds of layers."""
        shapes = tuple(tuple(each.shape[1:]) for each in (self.x, *self.added))
        return shapes, self.shortcut is None, self.whole

    def like(self, make: Callable[[Tensor], Tensor]) -> "Given":
        """The same arguments with other pictures, each made of the one it replaces. They are channels-last."""
        x, *added = (make(each).contiguous(memory_format=torch.channels_last) for each in (self.x, *self.added))
        return replace(self, x=x, added=tuple(added))


@dataclass(frozen=True, slots=True, eq=False)
class Kind:
    """Layers that differ in their weights alone, and the arguments of the first of them."""

    layers: list[Layer]
    given: Given

    def inputs(self, batch: int, generator: torch.Generator) -> Given:
        """Random pictures for these layers."""

        def make(like: Tensor) -> Tensor:
            made = torch.empty(batch, *like.shape[1:], dtype=like.dtype, device=like.device)
            return made.normal_(generator=generator)

        return self.given.like(make)

    def call(self, given: Given) -> Tensor:
        """The first layer's result, as in a step. -> [B, out, H', W'], or terms of a sum, [B, S, out, H', W']"""
        layer = self.layers[0]
        if not isinstance(layer, Conv):
            return layer(given.x)  # type: ignore[no-any-return]
        add: Tensor | Projection | None = given.added[0] if given.added else None
        if given.shortcut is not None:
            add = Projection(given.shortcut, given.added)
        out: Tensor = layer(given.x, add=add, whole=given.whole)
        return out if out.ndim == 4 else out.movedim(1, 0)


def kinds(net: nn.Module, run: Callable[[], object]) -> list[Kind]:
    """All kinds of layers that a step calls. run: calls the net once, with a batch of any size"""
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
    """Chooses the invariant kernel for each layer whose bits would differ between batches of these sizes otherwise.

    Each kind is tried as a step calls it, with the tensors that are added to it. A shortcut that another convolution
    computes along with its own result is tried with that one, and by itself only where that one keeps the library's.

    run: calls the net once, with a batch of any size. Yields after each kind of layer, which may take a second.
    """
    tried: set[Layer] = set()
    for module in net.modules():
        if isinstance(module, LinearAttention):
            module.use("invariant")  # without a trial: it costs only a few more kernels
    ways: tuple[How, ...] = ("invariant", "library")  # the layers called if all are invariant; then those left out
    for how in ways:
        for layer in _layers(net):
            if layer not in tried:
                layer.use(how)
        for kind in _called(net, run, how):
            if tried.issuperset(kind.layers):
                continue
            chosen = _choose(kind, buckets)
            for layer in kind.layers:
                layer.use(chosen)
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
        pinned=[layer.how for layer in tried if isinstance(layer, Conv)].count("pinned"),
    )


def _called(net: nn.Module, run: Callable[[], object], how: How) -> list[Kind]:
    """All kinds of layers that a step calls with the layers as they are now; none, if an invariant one fails."""
    found = attempt(lambda: kinds(net, run))
    if isinstance(found, Exception):
        if how == "library":
            raise found
        raise_if_fatal(found, next(net.parameters()).device)
        return []  # the trial of each kind finds the one that fails
    return found


def _choose(kind: Kind, buckets: Sequence[int]) -> How:
    """The library's kernel if its bits do not depend on the batch; else the invariant one if its results are right, in
    tiles that follow the batch if that changes no bit; else the library's all the same."""
    layer, generator = kind.layers[0], torch.Generator(kind.given.x.device).manual_seed(0)
    given = kind.inputs(max(buckets), generator)
    for each in (layer, given.shortcut):
        if each is not None:
            each.use("library")
    theirs = kind.call(given)
    if agrees(kind, given, theirs, buckets, generator):
        return "library"
    ways: tuple[How, ...] = ("invariant", "pinned") if isinstance(layer, Conv) else ("invariant",)
    for how in ways:
        layer.use(how)
        trouble = attempt(lambda: _trouble(kind, given, theirs, buckets, generator))
        if isinstance(trouble, Exception):  # of a compiler, or too little shared memory
            raise_if_fatal(trouble, given.x.device)
            trouble = f"{type(trouble).__name__}: {trouble}"
        if not trouble:
            return how
        logger.warning("no %s kernel for %s with %s: %s", how, layer, list(given.x.shape[1:]), trouble)
    return "library"


def _trouble(kind: Kind, given: Given, theirs: Tensor, buckets: Sequence[int], generator: torch.Generator) -> str:
    """The reason not to use a layer's kernel, or nothing. theirs: the library's result"""
    ours = kind.call(given)
    sound = _close(ours[:FEW], theirs[:FEW]) and agrees(kind, given, ours, buckets, generator)
    return "" if sound else "its results are wrong or depend on the batch"


def agrees(kind: Kind, given: Given, expected: Tensor, buckets: Sequence[int], generator: torch.Generator) -> bool:
    """Whether a layer's result for each picture has the same bits in batches of all these sizes, beside any others."""
    for bucket in buckets:
        for _ in range(DRAWS):
            chosen = torch.randint(len(given.x), (bucket,), generator=generator, device=given.x.device)
            few = given.like(lambda each, chosen=chosen: each[chosen])  # type: ignore[misc]
            if not torch.equal(kind.call(few), expected[chosen]):
                return False
    return True


def _close(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two results differ only by rounding. theirs: [B, ...], ours: the same, or terms of a sum, [B, S, ...]"""
    ours = ours if ours.ndim == theirs.ndim else ours.sum(1).to(theirs.dtype)
    return bool((ours.float() - theirs.float()).norm() <= CLOSE[ours.dtype] * theirs.float().norm())
