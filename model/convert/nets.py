"""The nets in a state dict: under which prefix each begins, which is an average, and what lies beside them.

A training saves its net below the names of whatever wraps it (`module.`, `_orig_mod.`, `model.diffusion_model.`, …).
No list of such prefixes is kept: a net is where all names that its layout cannot lack follow one and the same prefix.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from os.path import commonprefix

from torch import Tensor

from model.checkpoint.weighing import averaged, standing
from model.errors import ModelRefused

MAX_NETS = 32
OUTER = "../"  # before the names of tables that a file has beside the state dict of the net


@dataclass(frozen=True, slots=True)
class Net:
    """A net in a state dict."""

    layout: str
    prefix: str  # of its names in the state dict
    tensors: dict[str, Tensor]  # by their names without the prefix

    @property
    def part(self) -> str:
        """How `--part` names it."""
        return self.prefix.rstrip("./")


def find(state: Mapping[str, Tensor], layouts: Mapping[str, frozenset[str]]) -> list[Net]:
    """All nets of these layouts, averages first, then the larger before the smaller. Raises ModelRefused.

    layouts: the names of tensors that none of their nets lacks
    """
    places = {prefix: layout for layout, names in layouts.items() for prefix in _prefixes(state, names)}
    if len(places) > MAX_NETS:
        raise ModelRefused(f"a checkpoint may hold at most {MAX_NETS} nets, got {len(places)}")
    nets = []
    for prefix, layout in places.items():
        inner = tuple(other for other in places if other != prefix and other.startswith(prefix))
        others = (OUTER, *inner)
        keys = [key for key in state if key.startswith(prefix) and not key.startswith(others)]
        net = Net(layout, prefix, {key.removeprefix(prefix): state[key] for key in keys})
        nets += [net, *_without_dots(state, net)]
    return sorted(nets, key=lambda net: (standing(net.prefix), -len(net.tensors), len(net.prefix)))


def _prefixes(state: Mapping[str, Tensor], names: frozenset[str]) -> list[str]:
    one = max(names, key=len)
    prefixes = [key.removesuffix(one) for key in state if key.endswith(one)]
    return [prefix for prefix in prefixes if all(prefix + name in state for name in names)]


def _without_dots(state: Mapping[str, Tensor], net: Net) -> Iterator[Net]:
    """The average of a net as latent-diffusion's `LitEma` keeps it: `model_ema.` and the net's names without dots."""
    wrappers = net.prefix.split(".")
    heads = {key.partition(".")[0] for key in state}
    for head in sorted(filter(averaged, heads))[:MAX_NETS]:
        for start in range(len(wrappers)):
            place = f"{head}.{''.join(wrappers[start:])}"
            if all(place + name.replace(".", "") in state for name in net.tensors):
                tensors = {name: state[place + name.replace(".", "")] for name in net.tensors}
                yield replace(net, prefix=f"{head}.", tensors=tensors)
                return


def tables(state: Mapping[str, Tensor], net: Net) -> dict[str, Tensor]:
    """The tensors beside the net, or beside what wraps it, by their names there: those of its diffusion process."""
    placed = [(-1, key.removeprefix(OUTER), tensor) for key, tensor in state.items() if key.startswith(OUTER)]
    for key, tensor in state.items():
        shared = len(commonprefix([key, net.prefix]))
        if shared < len(net.prefix):
            placed += [(start, key[start:], tensor) for start in range(shared + 1) if "." not in key[start:]]
    return {name: tensor for _, name, tensor in sorted(placed, key=lambda each: each[0])}  # the innermost counts


def strangers(state: Mapping[str, Tensor], nets: list[Net]) -> list[str]:
    """The outermost names of all weights that belong to no net. Vectors and numbers are tables or counters."""
    prefixes = tuple(net.prefix for net in nets)
    return sorted(
        {key.partition(".")[0] for key, tensor in state.items() if tensor.ndim > 1 and not key.startswith(prefixes)}
    )
