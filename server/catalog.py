"""The catalog of models to serve: DDPM_WEIGHTS lists model directories, folders of them, and hub ids."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from model.checkpoint.card import ModelCard, read_card
from model.checkpoint.pipeline import INDEX
from model.errors import ModelRefused
from server.errors import ModelBroken, ModelNotFound

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([A-Za-z0-9][\w./-]*))?", re.ASCII)
MOST_NAMES = 20  # in a message
LOST_AND_FOUND = "lost+found"  # a folder at the root of every ext4 volume


def one_of(models: Iterable[str]) -> str:
    """`one of` the models that there are; of many, the first are named."""
    names = list(models)
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return f"one of {', '.join(names[:MOST_NAMES])}{more}"


@dataclass(frozen=True, slots=True)
class Catalog(Mapping[str, ModelCard]):
    """The cards of the models that are served, by name; and why others are not."""

    cards: Mapping[str, ModelCard]
    refused: Mapping[str, str]  # by name: the reason

    def __getitem__(self, name: str) -> ModelCard:
        return self.cards[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.cards)

    def __len__(self) -> int:
        return len(self.cards)


def refused(cards: Mapping[str, ModelCard]) -> Mapping[str, str]:
    """The reasons of models that are not served though they were listed, by name."""
    return cards.refused if isinstance(cards, Catalog) else {}


def card_of(name: str, cards: Mapping[str, ModelCard]) -> ModelCard:
    """The card of a model. Raises ModelBroken if it was refused, ModelNotFound if it was not listed."""
    if (reason := refused(cards).get(name)) is not None:
        raise ModelBroken(reason)
    if name not in cards:
        raise ModelNotFound(f"model must be {one_of(cards)}")
    return cards[name]


@dataclass(frozen=True, slots=True)
class _Listed:
    """A model that DDPM_WEIGHTS lists. where: words before the reason that it is refused for"""

    name: str
    where: str
    read: Callable[[], ModelCard]

    @property
    def shown(self) -> str:
        """The name as text that can be sent: that of a directory may be any bytes."""
        return self.name if self.name.isprintable() else ascii(self.name)[1:-1]


def find_models(weights: str | Path) -> Catalog:
    """All listed models but those that cannot be served. Raises ModelRefused if none is left, or for a name's sake."""
    text = str(weights)
    places = [text] if text and Path(text).is_dir() else [place.strip() for place in text.split(",") if place.strip()]
    cards, reasons, first = dict[str, ModelCard](), dict[str, str](), "DDPM_WEIGHTS names no model"
    for listed in (listed for place in places for listed in _find(place)):
        if listed.name in cards or listed.shown in reasons:
            raise ModelRefused(f"two of the models of DDPM_WEIGHTS are called {listed.name}; rename one's directory")
        try:
            cards[listed.name] = listed.read()
        except ModelRefused as error:
            first = first if reasons else f"{listed.where}{error}"
            reasons[listed.shown] = str(error)
    if not cards:
        raise ModelRefused(first)
    return Catalog(cards, reasons)


def _find(place: str) -> Iterable[_Listed]:
    """The models of one entry of the list."""
    if Path(place).is_dir():
        return _find_here(Path(place))
    on_hub = HUB_ID.fullmatch(place)
    if on_hub is None:
        return [_Listed(Path(place).name, f"{place} ", partial(_refuse, "is not a directory"))]
    name = on_hub[1].split("/")[1]
    return [_Listed(name, "", partial(_fetch, on_hub[1], on_hub[2] or "main", name))]


def _refuse(reason: str) -> ModelCard:
    raise ModelRefused(reason)


def _fetch(id: str, revision: str, name: str) -> ModelCard:
    """The card of a model of a hub. Raises ModelRefused."""
    if not NAME.fullmatch(name):
        raise ModelRefused(f"{id} cannot be served under its name, which is not {NAME.pattern}")
    from server import hub  # its import takes most of a second, and few servers need it

    return hub.fetch(id, revision, name)


def _find_here(weights: Path) -> list[_Listed]:
    alone = any((weights / file).is_file() for file in ("config.json", INDEX)) or (weights / "unet").is_dir()
    inside = (d for d in weights.iterdir() if d.is_dir() and d.name[0] != "." and d.name != LOST_AND_FOUND)
    named = {weights.resolve().name: weights} if alone else {at.name: at for at in sorted(inside)}  # links by their own
    if not named:
        raise ModelRefused(f"{weights} holds no model directory")
    return [_Listed(name, f"{at}: ", partial(_read, at, name)) for name, at in named.items()]


def _read(directory: Path, name: str) -> ModelCard:
    """The card of a directory. Raises ModelRefused."""
    if not NAME.fullmatch(name):
        raise ModelRefused(f"a model is named after its directory, and {name!r} is not {NAME.pattern}")
    try:
        return read_card(directory, name)
    except OSError as error:
        raise ModelRefused(f"could not be read: {type(error).__name__}") from error
