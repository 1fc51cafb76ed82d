"""The labels that a conditional net knows, and what a request asks of them: a label for each picture, and guidance.

Classifier-free guidance (Ho & Salimans 2022) moves what the net says with the label away from what it says without:
out + (guidance - 1) (out - out without the label), in the steps at levels of an interval (Kynkaanniemi et al. 2024).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Literal, TypeAlias

from model.errors import PlanError

RANDOM: Literal["random"] = "random"  # a label of each picture's own, drawn from its seed
MOST_GUIDANCE = 20.0
Label: TypeAlias = int | str


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """What a net was told in its training, beside the picture."""

    count: int  # labels 0 .. count - 1, the null label among them
    null: int | None = None  # stands for no label
    names: Mapping[int, str] = field(default_factory=dict)  # by label, of those that have one
    guidance: float = 1.0  # unless a request says otherwise
    _meanings: Mapping[str, list[int]] = field(init=False, repr=False, compare=False)  # labels by what they are called

    def __post_init__(self) -> None:
        """A label is called by its name, by the parts between its commas ("tench, Tinca tinca"), or by its number: the
        first of these that any label is called by."""
        named = [(label, name) for label, name in self.names.items() if label != self.null]
        parts = [(label, part.strip()) for label, name in named for part in name.split(",")]
        numbers = [(label, str(label)) for label in self.choices]
        meanings: dict[str, list[int]] = {}
        for words in (named, parts, numbers):
            known = {*meanings}
            for label, word in words:
                if word and word not in known and label not in meanings.setdefault(word, []):
                    meanings[word].append(label)
        object.__setattr__(self, "_meanings", meanings)

    @property
    def choices(self) -> tuple[int, ...]:
        """The labels that may be asked for."""
        return tuple(label for label in range(self.count) if label != self.null)

    def of(self, label: Label, seed: int, where: str) -> int:
        """The label of a seed's picture, by its number, its name or `RANDOM`. Raises PlanError naming the field."""
        if label == RANDOM:
            return self.drawn(seed)
        told = where.replace("/", ".")
        if isinstance(label, str) and len(meant := self._meanings.get(label, [])) > 1:
            numbers = ", ".join(map(str, meant[:8])) + (", ..." if len(meant) > 8 else "")
            raise PlanError(where, f"{told} must be a number: several labels are called {label}: {numbers}")
        found = (meant or [-1])[0] if isinstance(label, str) else label
        if 0 <= found < self.count and found != self.null:
            return found
        raise PlanError(where, f"{told} must be {self._allowed()}, got {label!r}")

    def _allowed(self) -> str:
        first, last = int(self.null == 0), self.count - 1 - (self.null == self.count - 1)
        beside = (
            f" but {self.null}, which stands for none" if self.null is not None and first < self.null < last else ""
        )
        numbers = f"{first}..{last}{beside}" if first < last else str(first)
        known = list(dict.fromkeys(name for label, name in self.names.items() if label != self.null))
        if not known:
            return f"{RANDOM} or a label {numbers}"
        shown = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
        return f"{RANDOM}, a label {numbers}, or one of its names: {shown}"

    def meant(self, text: str) -> int | None:
        """The one label that is called so, in any case; None if there is none, or several."""
        if len(label := self._meanings.get(text, [])) == 1:
            return label[0]
        called = {
            label for word, labels in self._meanings.items() if word.casefold() == text.casefold() for label in labels
        }
        return called.pop() if len(called) == 1 else None

    def drawn(self, seed: int) -> int:
        """The label that belongs to a seed: any of those that may be asked for, each as likely."""
        number = int.from_bytes(sha256(f"label {seed}".encode()).digest()[:8], "big")
        if self.null is None:
            return number % self.count
        label = number % (self.count - 1)
        return label + (label >= self.null)


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What the net is told of each picture of a request, and how much that counts. Built by `resolve_labels`."""

    labels: tuple[int, ...]  # one for each picture
    guidance: float
    interval: tuple[int, int] | None = None  # the highest and the lowest level with guidance; None: all levels


def resolve_labels(
    labels: Labels | None,
    T: int,
    seeds: Sequence[int],
    *,
    label: Label | None = None,
    each: Sequence[Label] | None = None,
    guidance: float | None = None,
    interval: Sequence[int] | None = None,
) -> Conditions | None:
    """Completes what a request says of labels. Raises PlanError naming the field.

    labels: those that the net knows, or None; seeds: of the pictures; each: the field `labels`, one for each picture
    -> None if the net is told no label: if the request has none, and the net a null label. Without one they are drawn
    from the seeds.
    """
    given = {"label": label, "labels": each, "guidance": guidance, "guidance_interval": interval}
    if labels is None:
        for name, value in given.items():
            if value is not None:
                raise PlanError(name, f"{name} must be left out: this model knows no labels")
        return None
    if label is not None and each is not None:
        raise PlanError("labels", "labels must be left out beside label, which is one for all pictures")
    if each is not None and len(each) != len(seeds):
        raise PlanError("labels", f"labels must be as many as pictures, {len(seeds)}, got {len(each)}")
    unlabelled = label is None and each is None
    if unlabelled and labels.null is not None:
        for name in ("guidance", "guidance_interval"):
            if given[name] is not None:
                raise PlanError(name, f"{name} applies to pictures with a label only")
        return None
    wanted = each if each is not None else [RANDOM if label is None else label] * len(seeds)
    fields = [f"labels/{i}" if each is not None else "label" for i in range(len(seeds))]
    found = tuple(map(labels.of, wanted, seeds, fields))
    strength = _guidance(labels, guidance, interval)
    if interval is not None and strength == 1:
        why = "changes nothing" if guidance is not None else "is this model's own"
        raise PlanError("guidance_interval", f"guidance_interval must be left out with guidance 1, which {why}")
    return Conditions(labels=found, guidance=strength, interval=_interval(T, interval))


def _guidance(labels: Labels, guidance: float | None, interval: Sequence[int] | None) -> float:
    """The given guidance, or that of the card. Raises PlanError."""
    if labels.null is None:
        for name, value in (("guidance", guidance), ("guidance_interval", interval)):
            if value is not None and value != 1:
                raise PlanError(name, f"{name} must be left out: this model has no null label")
        return 1.0
    strength = labels.guidance if guidance is None else float(guidance)
    if not 0 <= strength <= MOST_GUIDANCE:
        raise PlanError("guidance", f"guidance must lie in 0..{MOST_GUIDANCE:g}, got {strength}")
    return strength


def _interval(T: int, given: Sequence[int] | None) -> tuple[int, int] | None:
    """The given interval. Raises PlanError unless it is two levels in T..1, the higher first."""
    if given is None:
        return None
    if len(given) != 2 or not T >= given[0] >= given[1] >= 1:
        shown = f", got {list(given)}" if len(given) == 2 else ""
        raise PlanError(
            "guidance_interval", f"guidance_interval must be [high, low] with {T} >= high >= low >= 1{shown}"
        )
    return given[0], given[1]
