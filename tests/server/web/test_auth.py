"""API keys: access, separation of tenants, quotas."""

import base64
import hashlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient, WebSocketDenialResponse, WebSocketTestSession

from server.errors import Invalid, QuotaExceeded, SettingsError, Unauthenticated
from server.jobs.tenants import Quota
from server.settings import Settings
from server.web.app import create_app
from server.web.auth import Keyring, offered
from tests.server.fakes import FakeBackend

ALICE, BOB, SCRAPER = "alice's key", "bob's key", "a key for Prometheus"
OPEN = ["/", "/docs", "/healthz", "/readyz", "/static/app.js", "/static/style.css"]
CLOSED = ["/status", "/openapi.json", "/models", "/models/tiny", "/jobs", "/jobs/x", "/nothing", "/metrics"]
CLOSED += ["/v1/models", "/v1/models/tiny", "/v1/images/generations"]


def line(name: str, key: str, quota: str = "") -> str:
    """A line for the file of keys."""
    return f"{name}:{hashlib.sha256(key.encode()).hexdigest()}{quota}\n"


def bearer(key: str) -> dict[str, str]:
    """The header that brings a key."""
    return {"authorization": f"Bearer {key}"}


def subprotocol(key: str) -> str:
    """The same for a browser's websocket."""
    return "ddpm.key." + base64.urlsafe_b64encode(key.encode()).decode().rstrip("=")


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """A file of two keys; alice may ask for 60 image-steps a minute."""
    path = tmp_path / "keys"
    path.write_text("# who may\n\n" + line("alice", ALICE, ":60") + line("bob", BOB))
    return path


@pytest.fixture
def locked(weights: Path, keys: Path, tmp_path: Path) -> Iterator[TestClient]:
    """The application behind those keys."""
    settings = Settings(weights=weights, data_dir=tmp_path / "data", api_keys=str(keys))
    with TestClient(create_app(settings, FakeBackend()), raise_server_exceptions=False) as made:
        yield made


@pytest.mark.parametrize("path", OPEN)
def test_the_page_and_the_probes_need_no_key(locked: TestClient, path: str) -> None:
    assert locked.get(path).status_code == 200


@pytest.mark.parametrize("path", CLOSED)
def test_every_other_path_needs_a_key_whether_it_exists_or_not(locked: TestClient, path: str) -> None:
    answer = locked.get(path)

    assert (answer.status_code, answer.json()["code"]) == (401, "unauthenticated")
    assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "path", ["/static/../jobs", "/static/..%2fjobs", "/healthz/../jobs", "/Healthz", "/%2e%2e/jobs"]
)
def test_no_spelling_of_an_open_path_reaches_a_closed_one(locked: TestClient, path: str) -> None:
    assert locked.get(path).status_code in (401, 404)
    assert "jobs" not in locked.get(path).text


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"authorization": ""},
        {"authorization": "Bearer"},
        {"authorization": "Bearer "},
        {"authorization": "Basic YTpi"},
        {"authorization": ALICE},
        bearer("wrong"),
        bearer(ALICE + "x"),
        bearer(ALICE.upper()),
        bearer(hashlib.sha256(ALICE.encode()).hexdigest()),
        bearer("alice"),
        bearer("x" * 5000),
        {"x-api-key": ALICE},
        {"cookie": f"key={ALICE}"},
    ],
)
def test_a_missing_an_ill_formed_and_a_wrong_key_get_the_same_answer(locked: TestClient, given: dict[str, str]) -> None:
    answer, missing = locked.get("/jobs", headers=given), locked.get("/jobs")

    assert answer.status_code == 401
    assert answer.json() | {"request_id": ""} == missing.json() | {"request_id": ""}


def test_a_valid_key_is_accepted_with_its_scheme_in_any_case(locked: TestClient) -> None:
    assert locked.get("/jobs", headers=bearer(ALICE)).json() == {"jobs": []}
    assert locked.get("/jobs", headers={"authorization": f"bEARER {BOB}"}).status_code == 200
    assert locked.get("/nothing", headers=bearer(BOB)).status_code == 404


def test_two_authorization_headers_are_no_key() -> None:
    given = [(b"authorization", b"Bearer a"), (b"authorization", b"Bearer b")]

    assert offered(given[:1]) == b"a"
    assert offered(given) is None


def test_a_job_of_another_tenant_does_not_exist(locked: TestClient) -> None:
    made = locked.post("/generate", headers=bearer(BOB) | {"prefer": "respond-async"})
    job, mine = f"/jobs/{made.json()['id']}", bearer(ALICE)

    for path in (job, f"{job}/images/0", f"{job}/trajectory"):
        answer = locked.get(path, headers=mine)
        assert (answer.status_code, answer.json()["detail"]) == (404, "there is no such job")
    assert locked.delete(job, headers=mine).status_code == 404
    assert locked.get("/jobs", headers=mine).json() == {"jobs": []}
    assert locked.get(f"/jobs?after={made.json()['id']}", headers=mine).status_code == 404
    with watching(locked, f"{job}/stream", ALICE) as socket:
        assert socket.receive() == {"type": "websocket.close", "code": 4404, "reason": "there is no such job"}
    assert locked.get(job, headers=bearer(BOB)).status_code == 200
    assert len(locked.get("/jobs", headers=bearer(BOB)).json()["jobs"]) == 1


def test_shared_caches_may_not_keep_the_picture_of_a_tenant(locked: TestClient, client: TestClient) -> None:
    kept = []
    for server, headers in ((locked, bearer(BOB)), (client, {})):
        made = server.post("/generate", headers=headers | {"accept": "application/json"}).json()
        kept.append(server.get(made["images"][0]["url"], headers=headers).headers["cache-control"])

    assert [words.split(",")[0] for words in kept] == ["private", "public"]


def watching(client: TestClient, path: str, key: str, *more: str) -> WebSocketTestSession:
    """A websocket that brings its key as a browser does."""
    return client.websocket_connect(path, subprotocols=[*more, subprotocol(key)])


def test_a_websocket_sends_its_key_as_a_subprotocol_which_is_never_echoed(locked: TestClient) -> None:
    with watching(locked, "/generate/stream", ALICE, "ddpm.v1") as socket:
        assert socket.accepted_subprotocol == "ddpm.v1"
        socket.send_text("{}")
        assert socket.receive_json()["type"] in ("queued", "started")
    with watching(locked, "/generate/stream", ALICE) as socket:
        assert socket.accepted_subprotocol is None


@pytest.mark.parametrize("path", ["/generate/stream", "/jobs/x/stream", "/nothing", "/healthz", "/"])
def test_a_websocket_without_a_key_is_refused_before_its_handshake(locked: TestClient, path: str) -> None:
    for subprotocols in ([], [subprotocol("wrong")], ["ddpm.key.", "ddpm.v1"], ["ddpm.key.!!"], ["ddpm.key.a"]):
        with pytest.raises(WebSocketDenialResponse) as refusal, locked.websocket_connect(path, subprotocols):
            pass
        assert (refusal.value.status_code, refusal.value.json()["code"]) == (401, "unauthenticated")


def test_metrics_take_a_key_of_their_own(weights: Path, keys: Path, tmp_path: Path) -> None:
    expected = {"": {"": 200, SCRAPER: 401}, str(keys): {"": 401, SCRAPER: 401}}
    for api_keys, statuses in expected.items():
        for metrics_key, status in statuses.items():
            flags = {"weights": weights, "data_dir": tmp_path / "data", "api_keys": api_keys}
            settings = Settings.read({"DDPM_METRICS_KEY": metrics_key}, flags)
            with TestClient(create_app(settings, FakeBackend())) as made:
                assert made.get("/metrics").status_code == status
                wrong, right = (made.get("/metrics", headers=bearer(key)).status_code for key in (ALICE, SCRAPER))
                assert (wrong, right) == ((401, 200) if metrics_key else (status, status))
                assert made.get("/metrics%0A", headers=bearer(ALICE)).status_code == 404


def test_refusals_are_counted(locked: TestClient) -> None:
    locked.get("/jobs")
    rejected = locked.app.state.jobs.admission.rejected  # type: ignore[attr-defined]

    assert rejected == {"unauthenticated": 1}


def test_a_quota_limits_the_image_steps_per_minute(locked: TestClient) -> None:
    def ask(steps: int, key: str = ALICE) -> tuple[int, str]:
        answer = locked.post("/generate", json={"steps": steps, "n": 2}, headers=bearer(key))
        return answer.status_code, answer.headers.get("retry-after", "")

    assert ask(steps=30) == (200, "")
    assert ask(steps=15) == (429, "30")
    assert ask(steps=15, key=BOB) == (200, "")
    refused = locked.post("/generate", json={"steps": 30}, headers=bearer(ALICE))
    assert refused.json()["code"] == "quota-exceeded"
    assert refused.headers["ratelimit-policy"] == '"image-steps";q=60;w=60'
    assert refused.headers["ratelimit"] == '"image-steps";r=0;t=30'


def test_a_quota_refills_evenly_up_to_one_minute() -> None:
    now = [0.0]
    quota = Quota(60, clock=lambda: now[0])
    quota.take(60)
    now[0] = 10.0
    with pytest.raises(QuotaExceeded) as refusal:
        quota.require(15)
    assert (refusal.value.left, refusal.value.retry_after_s) == (10, 5)

    now[0] = 15.0
    quota.require(15)
    now[0] = 10_000.0
    assert quota.left == 60


def test_a_job_larger_than_the_quota_is_invalid() -> None:
    with pytest.raises(Invalid, match="at most 60, the quota of this key, got 61"):
        Quota(60).require(61)


def test_a_job_that_is_refused_for_another_reason_uses_no_quota(weights: Path, keys: Path, tmp_path: Path) -> None:
    settings = Settings(weights=weights, data_dir=tmp_path, api_keys=str(keys), max_queued_steps=50)
    with TestClient(create_app(settings, FakeBackend())) as client:
        assert client.post("/generate", json={"steps": 30, "n": 2}, headers=bearer(ALICE)).status_code == 422
        assert client.post("/generate", json={"steps": 30}, headers=bearer(ALICE)).status_code == 200


def test_an_answer_from_the_cache_uses_no_quota_but_must_be_within_it(
    weights: Path, keys: Path, tmp_path: Path
) -> None:
    settings = Settings(weights=weights, data_dir=tmp_path, api_keys=str(keys))
    with TestClient(create_app(settings, FakeBackend())) as client:

        def ask(seed: int) -> tuple[int, str | None]:
            answer = client.post("/generate", json={"seed": seed, "steps": 30}, headers=bearer(ALICE))
            return answer.status_code, answer.headers.get("x-cache")

        assert [ask(seed) for seed in (1, 1, 1, 2, 1)] == [(200, None), *[(200, "hit")] * 2, (200, None), (429, None)]


def test_a_name_may_have_two_keys_while_one_is_being_changed(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(line("alice", "old", ":60") + line("alice", "new", ":60"))
    keyring = Keyring.read(path)

    assert keyring.owner(b"old") is keyring.owner(b"new")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "holds no key"),
        ("# nobody\n", "holds no key"),
        ("alice:abc\n", "line 1 must be name:sha256"),
        ("\nalice\n", "line 2 must be"),
        (line("al ice", "k"), "line 1 must be"),
        (line("../alice", "k"), "line 1 must be"),
        (line("alice", "k", ":0"), "line 1 must be"),
        (line("alice", "k", ":-5"), "line 1 must be"),
        (line("alice", "k", ":1.5"), "line 1 must be"),
        (line("alice", "k").upper(), "line 1 must be"),
        (line("alice", ""), "line 1 has the hash of an empty key"),
        (line("alice", "k") + line("bob", "k"), "line 2 has the key of another owner"),
        (line("alice", "k") + line("alice", "l", ":5"), "line 2 gives its owner another quota"),
        ("x" * (1 << 20) + "\n\n", "at most 1048576 bytes"),
    ],
)
def test_an_error_in_a_file_of_keys_names_the_line(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(SettingsError, match=reason) as refusal:
        Keyring.read(path)

    assert len(str(refusal.value)) < 120


def test_a_missing_file_of_keys_is_refused_by_its_variable(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="DDPM_API_KEYS: the file could not be read: No such file or directory"):
        Keyring.read(tmp_path / "nothing")


def test_the_command_makes_a_key_and_its_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "server", "key", "alice", "--quota", "500"]
    made = subprocess.run(command, capture_output=True, text=True, check=True)
    path = tmp_path / "keys"
    path.write_text(made.stdout)
    owner = Keyring.read(path).owner(made.stderr.strip().encode())

    assert (owner.name, owner.quota and owner.quota.capacity) == ("alice", 500)
    assert made.stderr.strip() not in made.stdout
    with pytest.raises(Unauthenticated):
        Keyring.read(path).owner(made.stderr.strip().encode()[:-1])


def test_the_command_refuses_a_name_that_no_file_can_hold() -> None:
    for arguments in (["al:ice"], ["alice", "--quota", "0"]):
        made = subprocess.run([sys.executable, "-m", "server", "key", *arguments], capture_output=True, text=True)
        assert (made.returncode, made.stdout) == (2, "")
        assert "a key's name must be" in made.stderr
