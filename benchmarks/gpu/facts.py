"""What a stage finds out: a fact is a line of `facts.jsonl`, written the moment it is known, and one of the table."""

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FACTS = "facts.jsonl"
OUTCOME = "outcome"  # what became of a stage
TABLE_LINES = 40


@dataclass(frozen=True, slots=True)
class Fact:
    """One thing that was found out; a number where it is one. `more` joins the line as it is."""

    name: str
    value: float | bool | str
    unit: str = ""
    spread: tuple[float, float] | None = None  # least and greatest of the rounds
    more: Mapping[str, object] = field(default_factory=dict)
    main: bool = False  # whether it belongs into the table before others


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a stage is told, as plain values that fit on a command line. Times are those of `time.time`."""

    stage: str
    work: str  # module:function, which gives the parts of the stage
    out: str  # the folder of what comes back
    scratch: str  # a folder that all stages of a run share, and that goes with it
    dry: bool
    began_s: float
    until_s: float  # when the stage will be ended
    train: Sequence[Sequence[str]] = ()  # pairs of a model directory and pictures

    @property
    def left_s(self) -> float:
        """Seconds until the stage will be ended."""
        return self.until_s - time.time()

    def as_json(self) -> str:
        """For `from_json`."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Setting":
        """What `as_json` wrote."""
        return cls(**json.loads(text))


def tell(setting: Setting, fact: Fact) -> None:
    """Appends a fact to the file, in one write."""
    value = round(fact.value, 4) if isinstance(fact.value, float) else fact.value
    line: dict[str, object] = {"stage": setting.stage, "name": fact.name, "value": value, "unit": fact.unit}
    if fact.spread:
        line["spread"] = [round(each, 4) for each in fact.spread]
    line |= fact.more
    marks = {"main": fact.main, "dry": setting.dry}
    line |= {mark: True for mark, holds in marks.items() if holds}
    line["at_s"] = round(time.time() - setting.began_s, 1)
    file = os.open(Path(setting.out) / FACTS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, json.dumps(line).encode() + b"\n")
    finally:
        os.close(file)


@dataclass(slots=True)
class Reader:
    """Follows the file of facts as it grows, from where it ended when this was made."""

    path: Path
    seen: list[dict[str, Any]] = field(default_factory=list)
    _offset: int = 0
    _rest: bytes = b""

    def __post_init__(self) -> None:
        self._offset = self.path.stat().st_size if self.path.exists() else 0

    def news(self) -> Iterator[dict[str, Any]]:
        """The facts that have been told since the last call."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._offset)
            read = file.read()
        self._offset += len(read)
        *lines, self._rest = (self._rest + read).split(b"\n")
        for line in lines:
            fact = json.loads(line)
            self.seen.append(fact)
            yield fact


def line_of(fact: Mapping[str, Any]) -> str:
    """A fact for the eye, on one line."""
    value = fact["value"]
    shown = f"{value:.3f}" if isinstance(value, float) else str(value)
    if "spread" in fact:
        shown += " ({:.3f} .. {:.3f})".format(*fact["spread"])
    usual = ("stage", "name", "value", "unit", "spread", "main", "dry", "at_s")
    more = ", ".join(f"{key} {value}" for key, value in fact.items() if key not in usual)
    parts = [f"{fact['stage']:11}", f"{fact['name']:62}", shown, fact["unit"], f"[{more}]" if more else ""]
    return " ".join(part for part in parts if part).replace("\n", " ")[:200]


def table(facts: Sequence[Mapping[str, Any]]) -> list[str]:
    """The last lines that are printed: what became of stages, what matters most, and what else finds room."""
    outcomes, main = [fact for fact in facts if fact["name"] == OUTCOME], [fact for fact in facts if fact.get("main")]
    chosen: dict[tuple[str, str], Mapping[str, Any]] = {}
    for fact in [*outcomes, *main, *facts]:
        chosen.setdefault((fact["stage"], fact["name"]), fact)
    return [line_of(fact) for fact in list(chosen.values())[:TABLE_LINES]]
