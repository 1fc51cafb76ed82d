"""Says what of a data directory is damaged and what is sound, and changes nothing."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from model.usage import Parser
from server.errors import EXIT_STORE_REFUSED, SettingsError
from server.store import lock
from server.store.checks import inspect
from server.store.salvage import salvage
from server.store.schema import JOURNAL, PICTURES

MOST = 100  # lines of a kind


def main(arguments: Sequence[str]) -> int:
    """Prints what is sound, then what is damaged, one line each.

    Returns 0 if all is sound, else 4; with --salvage, 0 if all jobs are certainly in OUT.

    Raises StoreInUse, StoreRefused, SettingsError."""
    parser = Parser("ddpm check", description=__doc__)
    parser.add_argument("directory", metavar="DATA_DIR", type=Path, help="data directory of a server that does not run")
    salvaging = "write what is sound into this new directory, which a server can start on"
    parser.add_argument("--salvage", metavar="OUT", type=Path, help=salvaging)
    given = parser.parse_args(arguments)
    try:
        found = {JOURNAL, PICTURES, lock.LOCK}.intersection(os.listdir(given.directory))
    except OSError as error:
        raise SettingsError(f"{given.directory} cannot be read: {(error.strerror or str(error)).lower()}") from None
    if not found:
        raise SettingsError(f"{given.directory} is not a data directory: it has no {JOURNAL}")
    with _hold(given.directory) as held:
        return _check(given.directory, held, given.salvage)


def _check(directory: Path, held: int | None, out: Path | None) -> int:
    floor, store, damages = 0, "", list[str]()
    try:
        floor, store = lock.read_floor(held) if held is not None else (0, "")
    except ValueError as error:
        damages.append(str(error))
    found = inspect(directory, floor, store, hashes=True)
    damages += found.damages
    print(f"sound: {found.jobs} jobs ({found.unfinished} have not ended), {found.pictures} pictures")
    _list("damaged", damages + found.bad_pictures)
    lost = bool(damages + found.bad_pictures)
    if out is not None:
        saved = salvage(directory, out)
        print(f"saved in {out}: {saved.jobs} jobs, {saved.pictures} pictures")
        _list("will run again, for its pictures, or their rows, were damaged: job", saved.again)
        _list("lost", saved.lost)
        if found.damages:
            print(f"lost: perhaps some of what was written up to transaction {floor}, where the journal is damaged")
        lost = bool(saved.lost or found.damages)
    return EXIT_STORE_REFUSED if lost else 0


@contextmanager
def _hold(directory: Path) -> Iterator[int | None]:
    """The lock file, held, so that no server starts meanwhile; None if there is none."""
    try:
        held = lock.opened(directory, os.O_RDONLY)
    except FileNotFoundError:
        yield None
        return
    try:
        lock.hold(held, directory)
        yield held
    finally:
        os.close(held)


def _list(what: str, lines: list[str]) -> None:
    for line in lines[:MOST]:
        print(f"{what}: {line}")
    if len(lines) > MOST:
        print(f"{what}: and {len(lines) - MOST} more")
