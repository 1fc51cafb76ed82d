"""One stage, in a process of its own: `python -m benchmarks.gpu.stage SETTING`, as `benchmarks.gpu.run` starts it.

A stage is a list of parts, each of which tells facts. A part that fails leaves its traceback in the log, and the parts
behind it go on. A stage that is told to end says in its log where it stood.
"""

import faulthandler
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from types import FrameType
from typing import Any, TypeAlias, TypeVar

from benchmarks.gpu.facts import Fact, Setting, tell

Part: TypeAlias = Callable[[], Iterator[Fact]]
Thing = TypeVar("Thing")


def name_of(part: Part) -> str:
    """The name of a function, as words, and what it is called with, where that is words and numbers."""
    function: Any = part.func if isinstance(part, partial) else part
    given = [str(each) for each in part.args if isinstance(each, str)] if isinstance(part, partial) else []
    return " ".join([str(function.__name__).replace("_", " "), ", ".join(given)]).strip()


def run_parts(setting: Setting, parts: list[Part]) -> bool:
    """Runs all of them, and tells what they find. Returns whether none failed."""
    well = True
    for part in parts:
        print(f"--- {name_of(part)}", flush=True)
        try:
            for fact in part():
                tell(setting, fact)
        except Exception as error:  # whatever it is, it must not cost the parts behind it
            traceback.print_exc()
            sys.stderr.flush()
            well = False
            reason = next(iter(str(error).splitlines()), "")
            tell(setting, Fact(f"{name_of(part)} failed", f"{type(error).__name__}: {reason}"[:300], main=True))
    return well


def each_by_itself(things: Sequence[Thing], facts_of: Callable[[Thing], Iterator[Fact]]) -> Iterator[Fact]:
    """The facts of all things. One that fails costs only its own; at the end it is said how many did."""
    failed = 0
    for thing in things:
        try:
            yield from facts_of(thing)
        except Exception:  # as in `run_parts`
            traceback.print_exc()
            failed += 1
    if failed:
        raise RuntimeError(f"{failed} of {len(things)} failed")


def _end(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)  # by way of every `finally`: what this stage has started ends with it


def main() -> None:
    """Runs the stage that the command line holds."""
    setting = Setting.from_json(sys.argv[1])
    signal.signal(signal.SIGTERM, _end)
    faulthandler.enable()
    faulthandler.register(signal.SIGTERM, chain=True)
    module, _, function = setting.work.partition(":")
    parts: list[Part] = getattr(import_module(module), function)(setting)
    if not run_parts(setting, parts):
        sys.exit(1)


if __name__ == "__main__":
    main()
