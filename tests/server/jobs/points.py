"""Deaths at every point: a server's whole path of accepting jobs and keeping results, killed before its N-th write.

The calls that change a disk (write, fsync, rename, ...) are counted by a library that is loaded before all others, so
that SQLite's own are among them. `python -m tests.server.jobs.points STORY WEIGHTS DIR` forks a child for every N,
which plays the story in DIR/N and dies there, until one comes to the end. What a client was told is in DIR/N/told.
"""

import ctypes
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from pydantic import SecretStr
from starlette.testclient import TestClient

from server.jobs.deliveries import Deliveries
from server.settings import Settings
from server.store.store import Store
from server.web.app import create_app
from tests.server.fakes import FakeBackend
from tests.waiting import until

SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <signal.h>
#include <sys/types.h>
#include <unistd.h>

static int left;                                    /* calls until the end; 0: not counting */
void die_before(int n) { __atomic_store_n(&left, n, __ATOMIC_SEQ_CST); }
static void count(void) {
    if (__atomic_load_n(&left, __ATOMIC_SEQ_CST) && __atomic_sub_fetch(&left, 1, __ATOMIC_SEQ_CST) == 0)
        kill(getpid(), SIGKILL);
}
#define COUNTED(type, name, params, args)                                  \
    type name params {                                                     \
        static type (*real) params;                                        \
        if (!real) real = (type (*) params)dlsym(RTLD_NEXT, #name);        \
        count();                                                           \
        return real args;                                                  \
    }
COUNTED(ssize_t, write, (int fd, const void *data, size_t size), (fd, data, size))
COUNTED(ssize_t, pwrite64, (int fd, const void *data, size_t size, off64_t at), (fd, data, size, at))
COUNTED(ssize_t, pwrite, (int fd, const void *data, size_t size, off_t at), (fd, data, size, at))
COUNTED(int, fsync, (int fd), (fd))
COUNTED(int, fdatasync, (int fd), (fd))
COUNTED(int, ftruncate, (int fd, off_t size), (fd, size))
COUNTED(int, ftruncate64, (int fd, off64_t size), (fd, size))
COUNTED(int, unlink, (const char *path), (path))
COUNTED(int, rename, (const char *from, const char *to), (from, to))
"""


@contextmanager
def start(weights: Path, directory: Path) -> Iterator[TestClient]:
    """A server on this store, which owes webhooks and sends none."""
    settings = Settings(
        weights=str(weights), data_dir=directory / "data", log_level="error", webhook_secret=SecretStr("x" * 24)
    )
    with mock.patch.object(Deliveries, "start"), TestClient(create_app(settings, FakeBackend())) as client:
        yield client


def told(log: int, **words: object) -> None:
    """A client has been told this. It outlives the server."""
    os.write(log, json.dumps(words).encode() + b"\n")


def creating(weights: Path, directory: Path) -> None:
    """The first server of all begins."""
    Store(directory / "data")


def accepting(weights: Path, directory: Path) -> None:
    """A client asks for two pictures and comes back for them; and for one more, with a key, and waits."""
    log = os.open(directory / "told", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with start(weights, directory) as client:
        request = {"seed": 1, "steps": 2, "n": 2, "frames": None, "webhook": "https://a.example/"}
        job = client.post("/generate", json=request, headers={"prefer": "respond-async"}).json()
        told(log, id=job["id"], seed=1, n=2)

        def document() -> dict[str, Any]:
            found: dict[str, Any] = client.get(f"/jobs/{job['id']}").json()
            return found

        until(lambda: document()["status"] == "succeeded", pause_s=0.002)
        told(log, id=job["id"], seed=1, n=2, document=document())
        answer = client.post("/generate", json={"seed": 3}, headers={"idempotency-key": "k"})
        told(log, id=answer.headers["x-job-id"], seed=3, n=1)


STORIES = {"creating": creating, "accepting": accepting}


def main() -> None:
    """One child after the other, each of which dies one call later."""
    story, weights, directory = STORIES[sys.argv[1]], Path(sys.argv[2]), Path(sys.argv[3])
    template = directory / "template"
    Store(template) if story is accepting else template.mkdir()
    library, n, status = ctypes.CDLL(os.environ["LD_PRELOAD"]), 0, 1
    while status != 0:
        n += 1
        place = directory / str(n)
        shutil.copytree(template, place / "data")
        child = os.fork()
        if child == 0:
            library.die_before(n)
            story(weights, place)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert status in (0, 9), f"a child ended with {status} at point {n}"
    print(n - 1)


if __name__ == "__main__":
    main()
