"""Work in a process of its own: a GPU's context that dies there is not ours."""

import traceback
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

Work = Callable[..., Iterator[Any]]


class Apart:
    """A generator that runs in another process, begun at once. What it yields can be read here as it comes."""

    def __init__(self, work: Work, *arguments: Any) -> None:
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_run, args=(theirs, work, arguments), daemon=True)
        self._process.start()
        theirs.close()

    def results(self, patience_s: float) -> Iterator[Any]:
        """All that it yields. Raises RuntimeError if it fails, with its traceback, or is silent for so long."""
        try:
            while True:
                if not self._pipe.poll(patience_s):
                    raise RuntimeError(f"nothing came for {patience_s:.0f} s")
                kind, value = self._pipe.recv()
                if kind == "ended":
                    return
                if kind == "failed":
                    raise RuntimeError(value)
                yield value
        except EOFError as error:
            self._process.join()
            raise RuntimeError(f"its process ended with exit code {self._process.exitcode}") from error
        finally:
            self._process.kill()
            self._process.join()


def _run(pipe: Connection, work: Work, arguments: tuple[Any, ...]) -> None:
    try:
        for value in work(*arguments):
            pipe.send(("value", value))
    except Exception:  # told to whoever waits for it
        pipe.send(("failed", traceback.format_exc().strip()))
    else:
        pipe.send(("ended", None))
