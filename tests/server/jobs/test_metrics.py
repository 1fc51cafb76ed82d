"""What a scrape shows adds up, at any moment, and is named as it will stay."""

import hashlib
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from server.metrics import Breakdown
from server.settings import Settings
from server.web.app import create_app
from tests.server.conftest import Server
from tests.server.fakes import FakeBackend
from tests.waiting import until

LATER = {"prefer": "respond-async"}


def read(text: str) -> dict[str, float]:
    """Every sample of a scrape, by name and labels."""
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    return {s.name + "".join(f"{{{v}}}" for k, v in s.labels.items() if k != "le"): s.value for s in samples}


def balance(seen: dict[str, float]) -> tuple[float, float]:
    """What was accepted, and what became of it."""
    ended = sum(value for name, value in seen.items() if name.startswith("ddpm_jobs_total"))
    return seen["ddpm_jobs_accepted_total"], ended + seen["ddpm_jobs_running"] + seen["ddpm_jobs_waiting"]


def test_what_was_accepted_has_ended_or_runs_or_waits(client: TestClient) -> None:
    backend = client.app.state.jobs.backend  # type: ignore[attr-defined]
    assert isinstance(backend, FakeBackend)
    client.post("/generate", json={"steps": 2})
    backend.gate.clear()
    given_up, _ = (client.post("/generate", json={"steps": 2, "n": 3}, headers=LATER).json() for _ in range(2))
    client.delete(f"/jobs/{given_up['id']}")
    client.post("/generate", json={"steps": 0})
    client.post("/generate", json={"n": 8, "steps": 30})

    seen = read(client.get("/metrics").text)

    assert balance(seen) == (3, 3)
    assert {name: value for name, value in seen.items() if value and name.startswith(("ddpm_jobs", "ddpm_rej"))} == {
        "ddpm_jobs_accepted_total": 3,
        "ddpm_jobs_total{succeeded}": 1,
        "ddpm_jobs_total{cancelled}": 1,
        "ddpm_jobs_waiting": 1,
        "ddpm_rejected_total{invalid-request}": 2,
    }
    assert seen["ddpm_steps_waiting"] == 6


def test_every_metric_has_its_name_and_its_help(client: TestClient) -> None:
    answer = client.get("/metrics")
    families = {family.name: family for family in text_string_to_metric_families(answer.text)}

    assert answer.headers["content-type"].startswith("text/plain; version=")
    names = ("step", "queue", "refusal", "job", "journal_commit", "model_step", "model_queue")
    timed = {f"{name}_seconds" for name in names}
    histograms = timed | {"bucket_size"}
    read_at_a_scrape = {metric.name for metric in client.app.state.jobs.metric_values()}  # type: ignore[attr-defined]
    assert len(read_at_a_scrape) == 34
    assert families.keys() == {f"ddpm_{name}" for name in histograms | {"build_info"}} | read_at_a_scrape
    assert all(family.documentation for family in families.values())


def settled(server: Server) -> dict[str, float]:
    """A scrape after the engine, which tells its steps a few times a second, has told them all."""

    def scrape() -> dict[str, float] | None:
        seen = read(server.client.get("/metrics").text)
        return seen if seen["ddpm_bucket_size_count"] == seen["ddpm_engine_steps_total"] else None

    return until(scrape)


def test_the_engine_counts_what_it_does(server: Server) -> None:
    before = settled(server)
    server.client.post("/generate", json={"steps": 20, "n": 3, "frames": {"count": 5, "kind": "both"}})
    after = settled(server)
    more = {name: after[name] - before[name] for name in after}

    assert more["ddpm_sample_steps_total"] == 60
    assert 20 <= more["ddpm_engine_steps_total"] <= 22  # pictures of one request may be seated a step apart
    assert more["ddpm_bucket_size_sum"] == 60 + more["ddpm_padded_slots_total"]
    assert more["ddpm_frames_total"] == 3 * (5 + 4)
    assert more["ddpm_step_seconds_sum"] > 0
    assert more["ddpm_model_sample_steps_total{tiny}"] == 60
    assert more["ddpm_model_step_seconds_count{tiny}"] == more["ddpm_engine_steps_total"]
    assert more["ddpm_model_queue_seconds_count{tiny}"] == 1
    assert (after["ddpm_slots"], after["ddpm_slots_used"], after["ddpm_engine_up"]) == (4, 0, 1)
    assert balance(after)[0] == balance(after)[1]


def summed(seen: dict[str, float], name: str) -> float:
    """A metric over all its labels."""
    return sum(value for key, value in seen.items() if key.partition("{")[0] == name)


def test_models_and_keys_are_told_apart_and_add_up(weights: Path, tmp_path: Path) -> None:
    hashes = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("alice", "bob")}
    (tmp_path / "keys").write_text("".join(f"{name}:{digest}\n" for name, digest in hashes.items()))
    settings = Settings(weights=weights, data_dir=tmp_path / "data", api_keys=str(tmp_path / "keys"))
    backend = FakeBackend()
    with TestClient(create_app(settings, backend)) as client:
        alice, bob = ({"authorization": f"Bearer {name}"} for name in hashes)
        client.post("/generate", json={"steps": 2, "n": 3}, headers=alice)
        client.post("/generate", json={"steps": 31}, headers=bob)
        backend.gate.clear()
        for headers, steps in ((alice, 5), (bob, 7), (bob, 11)):
            last = client.post("/generate", json={"steps": steps}, headers=headers | LATER).json()
        client.delete(f"/jobs/{last['id']}", headers=bob)
        seen = read(client.app.state.jobs.metrics.render().decode())  # type: ignore[attr-defined]

    by_key = {name: value for name, value in seen.items() if name.startswith("ddpm_key") and value}
    assert by_key == {
        "ddpm_key_jobs_total{alice}{succeeded}": 1,
        "ddpm_key_jobs_total{bob}{cancelled}": 1,
        "ddpm_key_sample_steps_total{alice}": 6,
        "ddpm_key_steps_waiting{alice}": 5,
        "ddpm_key_steps_waiting{bob}": 7,
        "ddpm_key_rejected_total{bob}": 1,
    }
    for label in ("model", "key"):
        assert summed(seen, f"ddpm_{label}_jobs_total") == summed(seen, "ddpm_jobs_total") == 2
        assert summed(seen, f"ddpm_{label}_steps_waiting") == seen["ddpm_steps_waiting"]
    assert seen["ddpm_model_sample_steps_total{tiny}"] == 6
    assert balance(seen) == (4, 4)


def test_however_many_names_there_are_a_label_has_a_hundred_values_and_other() -> None:
    breakdown = Breakdown("key")
    for name in [f"tenant-{i}" for i in range(150)] * 2:
        breakdown.of(name).sample_steps += 1
    samples = {s.labels["key"]: s.value for f in breakdown.families() for s in f.samples if "sample_steps" in s.name}

    assert len(samples) == 101
    assert samples["tenant-0"] == samples["tenant-99"] == 2
    assert samples["other"] == 100
