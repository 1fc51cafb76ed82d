"""A file of keys that changes while the server runs."""

import asyncio
import errno
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from server.errors import Unauthenticated
from server.jobs.tenants import Quota
from server.settings import Settings
from server.web import auth
from server.web.app import create_app
from server.web.auth import KeyFile, Keyring
from tests.server.fakes import FakeBackend
from tests.server.web.test_auth import bearer, line, watching
from tests.waiting import until


def replace(path: Path, text: str) -> None:
    """Replaces a file as editors do."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.replace(path)


def overwrite(path: Path, text: str) -> None:
    """Writes into the same file."""
    path.write_text(text)


def refresh(keys: KeyFile) -> None:
    """One look at the file."""
    asyncio.run(keys.refresh())


def is_valid(keys: KeyFile, key: str) -> bool:
    """Whether a key is accepted."""
    try:
        keys.owner(key.encode())
    except Unauthenticated:
        return False
    return True


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of two keys."""
    path = tmp_path / "keys"
    path.write_text(line("alice", "a", ":60") + line("bob", "b"))
    return path


@pytest.fixture
def locked(weights: Path, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    """The application behind that file, at which it looks all the time."""
    monkeypatch.setattr(auth, "LOOK_S", 0.01)
    settings = Settings(weights=weights, data_dir=tmp_path / "data", api_keys=str(path))
    with TestClient(create_app(settings, FakeBackend())) as made:
        yield made


def test_a_running_server_accepts_new_keys_and_refuses_removed_ones(locked: TestClient, path: Path) -> None:
    def status(key: str) -> int:
        return locked.get("/jobs", headers=bearer(key)).status_code

    assert (status("a"), status("b"), status("c")) == (200, 200, 401)
    replace(path, line("alice", "a", ":60") + line("carol", "c"))
    until(lambda: status("c") == 200)

    assert (status("a"), status("b")) == (200, 401)


def test_a_job_of_a_removed_key_runs_to_its_end_before_those_who_watch_it(locked: TestClient, path: Path) -> None:
    backend, service = locked.app.state.jobs.backend, locked.app.state.jobs  # type: ignore[attr-defined]
    backend.gate.clear()
    left = locked.post("/generate", headers=bearer("b") | {"prefer": "respond-async"}).json()["id"]
    with watching(locked, f"/jobs/{left}/stream", "b") as socket:
        replace(path, line("alice", "a"))
        until(lambda: locked.get("/jobs", headers=bearer("b")).status_code == 401)
        assert left in service.repository.live
        assert locked.portal is not None
        locked.portal.call(backend.gate.set)
        messages = list(iter(socket.receive, {"type": "websocket.close", "code": 1000, "reason": ""}))

    assert '"type":"succeeded"' in messages[-1]["text"].replace(" ", "")


@pytest.mark.parametrize("write", [replace, overwrite])
def test_a_key_of_the_same_length_is_seen(path: Path, write: Callable[[Path, str], None]) -> None:
    keys = KeyFile(path)
    write(path, line("alice", "x", ":60") + line("bob", "y"))
    refresh(keys)

    assert [key for key in "abxy" if is_valid(keys, key)] == ["x", "y"]


def test_a_link_that_is_swapped_as_kubernetes_does_is_followed(tmp_path: Path) -> None:
    for version, key in (("v1", "a"), ("v2", "b")):
        (tmp_path / version).mkdir()
        (tmp_path / version / "keys").write_text(line("alice", key))
        os.utime(tmp_path / version / "keys", (0, 0))
    (tmp_path / "..data").symlink_to("v1")
    (tmp_path / "keys").symlink_to("..data/keys")
    keys = KeyFile(tmp_path / "keys")
    (tmp_path / "new").symlink_to("v2")
    (tmp_path / "new").replace(tmp_path / "..data")
    refresh(keys)

    assert (is_valid(keys, "a"), is_valid(keys, "b")) == (False, True)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (line("alice", "x") + "bob\n", "line 2 must be"),
        (line("alice", "x") + line("bob", "x"), "line 2 has the key of another owner"),
        ("", "holds no key"),
        (None, "No such file or directory"),
    ],
)
def test_a_file_with_a_mistake_changes_nothing_and_is_told_once(
    path: Path, caplog: pytest.LogCaptureFixture, text: str | None, reason: str
) -> None:
    keys = KeyFile(path)
    replace(path, text) if text is not None else path.unlink()
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            refresh(keys)

    (told,) = caplog.records
    assert told.getMessage() == "the API keys stay as they were" and reason in vars(told)["reason"]
    assert [key for key in "abx" if is_valid(keys, key)] == ["a", "b"]
    replace(path, line("alice", "x"))
    refresh(keys)
    assert [key for key in "abx" if is_valid(keys, key)] == ["x"]


def test_a_pipe_in_the_place_of_the_file_does_not_end_the_looks(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = KeyFile(path)
    path.unlink()
    os.mkfifo(path)
    with caplog.at_level(logging.ERROR):
        refresh(keys)  # which waited for a writer, and with it all later ones
    path.unlink()
    path.write_text(line("alice", "x"))
    refresh(keys)

    assert len(caplog.records) == 1
    assert [key for key in "abx" if is_valid(keys, key)] == ["x"]


@pytest.mark.parametrize(("capacity", "left"), [(60, 20), (100, 60), (30, -10)])
def test_what_was_used_of_a_quota_is_used_of_the_next_one(capacity: int, left: int) -> None:
    before, after = (Quota(most, clock=lambda: 0.0) for most in (60, capacity))
    before.take(40)
    after.continue_from(before)

    assert after.left == left


def test_another_quota_is_valid_from_then_on(path: Path) -> None:
    keys, quotas = KeyFile(path), list[Quota | None]()
    for suffix in (":50", ":70", ""):
        replace(path, line("alice", "a", suffix))
        refresh(keys)
        quotas.append(keys.owner(b"a").quota)
        if (quota := quotas[-1]) is not None:
            quota.take(40 if suffix == ":50" else 0)

    assert [quota and quota.capacity for quota in quotas] == [50, 70, None]
    assert quotas[1] is not None and quotas[1].left < 70


def test_a_file_that_has_not_changed_is_not_read_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys, read = KeyFile(path), list[Path]()
    monkeypatch.setattr(Keyring, "read", lambda path: read.append(path))
    refresh(keys)

    assert read == []


def test_a_file_that_could_not_be_read_for_a_moment_is_read_at_the_next_look(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_descriptor(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    keys = KeyFile(path)
    replace(path, line("alice", "x"))
    with monkeypatch.context() as short, caplog.at_level(logging.ERROR):
        short.setattr("server.web.auth._open", no_descriptor)
        for _ in range(3):
            refresh(keys)
    assert [key for key in "abx" if is_valid(keys, key)] == ["a", "b"]
    assert len(caplog.records) == 1
    refresh(keys)

    assert [key for key in "abx" if is_valid(keys, key)] == ["x"]
