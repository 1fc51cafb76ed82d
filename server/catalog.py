"""The catalog of models to serve: DDPM_WEIGHTS lists model directories, folders of them, and hub ids."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count
from os.path import exists, isdir, realpath
from pathlib import Path

from model.checkpoint.card import ModelCard, read_card
from model.checkpoint.pipeline import INDEX
from model.errors import ModelRefused, reason
from model.sampling.plan import SAMPLERS, stands
from model.sampling.samplers import Sampling
from server.errors import Invalid, ModelBroken, ModelChanged, ModelNotFound
from server.troubles import shortage

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([A-Za-z0-9][\w./-]*))?", re.ASCII)
MOST_NAMES = 20  # in a message
SHIPPED = "digits"  # of this repository: the default of several models
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


def default_model(cards: Mapping[str, ModelCard], named: str | None) -> str | None:
    """The model of requests that name none; None if such requests are refused. named: by the settings"""
    if named or SHIPPED in cards:
        return named or SHIPPED
    return next(iter(cards)) if len(cards) == 1 and not refused(cards) else None


def model_of(wanted: str | None, cards: Mapping[str, ModelCard], named: str | None) -> ModelCard:
    """The model of a request. Raises what `card_of` raises, or Invalid if it must be named and is not."""
    name = wanted or default_model(cards, named)
    if name is None:
        raise Invalid(("model", f"name a model, {one_of(cards)}"))
    return card_of(name, cards)


def card_of(name: str, cards: Mapping[str, ModelCard]) -> ModelCard:
    """The card of a model. Raises ModelBroken if it was refused, ModelNotFound if it was not listed."""
    if (reason := refused(cards).get(name)) is not None:
        raise ModelBroken(reason)
    if name not in cards:
        raise ModelNotFound(f"model must be {one_of(cards)}")
    return cards[name]


def require_unchanged(name: str, sampling: Sampling, cards: Mapping[str, ModelCard]) -> None:
    """Raises ModelBroken or ModelChanged unless a model is served, with the sampler and the plan, if any, that its job
    was resolved with."""
    if (reason := refused(cards).get(name)) is not None:
        raise ModelBroken(reason)
    if name not in cards:
        raise ModelChanged("the model that this job was accepted for is not served any more")
    if sampling.sampler not in SAMPLERS:  # of another version's journal
        raise ModelChanged(f"this version has no sampler {sampling.sampler}, which this job was accepted with")
    if not stands(cards[name].process, sampling):
        raise ModelChanged(f"the plan {sampling.plan} was changed or removed after this job had been accepted")


def _printable(text: str) -> str:
    """Text that can be sent: the name of a directory may be any bytes."""
    return text if text.isprintable() else ascii(text)[1:-1]


@dataclass(frozen=True, slots=True)
class _Listed:
    """A model that DDPM_WEIGHTS lists. place: one for one model, wherever it is listed. where: words before the reason
    that it is refused for"""

    name: str
    place: str
    where: str
    read: Callable[[], ModelCard]


def find_models(weights: str | Path) -> Catalog:
    """All listed models but those that cannot be served. Raises ModelRefused if none is left.

    A name belongs to the first model that is listed under it, even if that one is refused: damage to a directory must
    not make pictures of another model.
    """
    text = str(weights)
    entries = [text] if isdir(text) else [entry.strip() for entry in text.split(",") if entry.strip()]
    cards, reasons, places, first = dict[str, ModelCard](), dict[str, str](), dict[str, str](), ""
    for listed in (listed for entry in entries for listed in _find(entry)):
        name, read = _printable(listed.name), listed.read
        if name in places:
            if places[name] == listed.place:
                continue
            read = partial(_refuse, f"{listed.place} has the name of {places[name]}, which is listed first; rename one")
            name = next(free for i in count(2) if (free := f"{name} ({i})") not in places)
        places[name] = listed.place
        try:
            cards[name] = read()
        except ModelRefused as error:
            if (cause := error.__cause__) is not None and shortage(cause) is not None:
                raise cause from None  # which passes: the model is sound, for all that is known
            first = first or f"{listed.where}{error}"
            reasons[name] = str(error)
    if not cards:
        raise ModelRefused(first or "DDPM_WEIGHTS names no model")
    return Catalog(cards, reasons)


def _find(entry: str) -> Iterable[_Listed]:
    """The models of one entry of the list; or what it is instead, which is refused."""
    path, instead = Path(entry), "is not a directory"
    if isdir(path):
        try:
            if found := _find_here(path):
                return found
            instead = "holds no model directory"
        except OSError as error:
            if shortage(error) is not None:
                raise
            instead = f"could not be read: {reason(error)}"
    elif on_hub := HUB_ID.fullmatch(entry):
        id, revision = on_hub[1], on_hub[2] or "main"
        name = id.split("/")[1]
        return [_Listed(name, f"{id}@{revision}", "", partial(_fetch, id, revision, name))]
    return [_Listed(path.name, _printable(realpath(path)), f"{entry} ", partial(_refuse, instead))]


def _refuse(reason: str) -> ModelCard:
    raise ModelRefused(reason)


def _fetch(id: str, revision: str, name: str) -> ModelCard:
    """The card of a model of a hub. Raises ModelRefused."""
    if not NAME.fullmatch(name):
        raise ModelRefused(f"{id} cannot be served under its name, which is not {NAME.pattern}")
    from server import hub  # its import takes most of a second, and few servers need it

    return hub.fetch(id, revision, name)


def _find_here(weights: Path) -> list[_Listed]:
    """The model that a directory is, or those in it. Raises OSError."""
    alone = any((weights / file).is_file() for file in ("config.json", INDEX)) or (weights / "unet").is_dir()
    inside = (at for at in sorted(weights.iterdir()) if at.name[0] != "." and at.name != LOST_AND_FOUND)
    # a link that leads nowhere may be a model whose volume is missing
    named = (
        {weights.resolve().name: weights} if alone else {at.name: at for at in inside if isdir(at) or not exists(at)}
    )
    return [_Listed(name, _printable(realpath(at)), f"{at}: ", partial(_read, at, name)) for name, at in named.items()]


def _read(directory: Path, name: str) -> ModelCard:
    """The card of a directory. Raises ModelRefused."""
    if not NAME.fullmatch(name):
        raise ModelRefused(f"a model is named after its directory, and {name!r} is not {NAME.pattern}")
    try:
        return read_card(directory, name)
    except OSError as error:
        raise ModelRefused(f"could not be read: {reason(error)}") from error
