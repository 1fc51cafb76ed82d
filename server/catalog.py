"""The catalog of models to serve: DDPM_WEIGHTS lists model directories, folders of them, and hub ids."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from model.checkpoint.card import ModelCard, read_card
from model.errors import ModelRefused
from server.errors import ModelNotFound

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([A-Za-z0-9][\w./-]*))?", re.ASCII)
MOST_NAMES = 20  # in a message
LOST_AND_FOUND = "lost+found"  # a folder at the root of every ext4 volume


def one_of(models: Iterable[str]) -> str:
    """`one of` the models that there are; of many, the first are named."""
    names = list(models)
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return f"one of {', '.join(names[:MOST_NAMES])}{more}"


def card_of(name: str, cards: Mapping[str, ModelCard]) -> ModelCard:
    """The card of a model. Raises ModelNotFound."""
    if name not in cards:
        raise ModelNotFound(f"model must be {one_of(cards)}")
    return cards[name]


def find_models(weights: str | Path) -> dict[str, ModelCard]:
    """The cards of all listed models by name. Raises ModelRefused, naming the model."""
    text = str(weights)
    places = [text] if Path(text).is_dir() else [place.strip() for place in text.split(",") if place.strip()]
    cards: dict[str, ModelCard] = {}
    for card in (card for place in places for card in _find(place)):
        if card.name in cards:
            raise ModelRefused(f"two of the models of DDPM_WEIGHTS are called {card.name}; rename one's directory")
        cards[card.name] = card
    if not cards:
        raise ModelRefused("DDPM_WEIGHTS names no model")
    return cards


def _find(place: str) -> list[ModelCard]:
    """The cards of one entry of the list."""
    if Path(place).is_dir():
        return _find_here(Path(place))
    on_hub = HUB_ID.fullmatch(place)
    if on_hub is None:
        raise ModelRefused(f"{place} is not a directory")
    name = on_hub[1].split("/")[1]
    if not NAME.fullmatch(name):
        raise ModelRefused(f"{on_hub[1]} cannot be served under its name, which is not {NAME.pattern}")
    from server import hub  # its import takes most of a second, and few servers need it

    return [hub.fetch(on_hub[1], on_hub[2] or "main", name)]


def _find_here(weights: Path) -> list[ModelCard]:
    alone = (weights / "config.json").is_file() or (weights / "unet").is_dir()
    inside = (d for d in weights.iterdir() if d.is_dir() and d.name[0] != "." and d.name != LOST_AND_FOUND)
    directories = [weights] if alone else sorted(inside)
    if not directories:
        raise ModelRefused(f"{weights} holds no model directory")
    cards = []
    for directory in directories:
        name = directory.resolve().name
        if not NAME.fullmatch(name):
            raise ModelRefused(f"a model is named after its directory, and {name!r} in {weights} is not {NAME.pattern}")
        try:
            cards.append(read_card(directory, name))
        except ModelRefused as error:
            raise ModelRefused(f"{directory}: {error}") from error
    return cards
