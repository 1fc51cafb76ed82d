"""What a scrape shows adds up, at any moment, and is named as it will stay."""

from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

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
    timed = {f"{name}_seconds" for name in ("step", "queue", "refusal", "job", "journal_commit")}
    histograms = timed | {"bucket_size"}
    read_at_a_scrape = {metric.name for metric in client.app.state.jobs.metric_values()}  # type: ignore[attr-defined]
    assert len(read_at_a_scrape) == 26
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
    assert (after["ddpm_slots"], after["ddpm_slots_used"], after["ddpm_engine_up"]) == (4, 0, 1)
    assert balance(after)[0] == balance(after)[1]
