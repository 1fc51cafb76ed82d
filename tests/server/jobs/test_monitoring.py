"""Every alert and every panel asks for metrics and labels that a server really has."""

import dataclasses
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from server.errors import ANSWERS
from tests.server.fakes import FakeBackend

DEPLOY = Path(__file__).parents[3] / "deploy"
DASHBOARDS = sorted((DEPLOY / "grafana" / "dashboards").glob("*.json"))
ALERTS = DEPLOY / "prometheus" / "alerts.yml"
RUNBOOK = DEPLOY.parent / "docs" / "operations.md"
FROM_PROMETHEUS = {"instance", "job"}
SELECTOR = re.compile(r"\b(ddpm_\w+)(?:\{([^}]*)\})?")
MATCHER = re.compile(r'(\w+)\s*(?:=~|!~|!=|=)\s*"([^"]*)"')


def rules() -> list[dict[str, Any]]:
    """The alerts."""
    return [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]


def targets(dashboard: Path) -> list[dict[str, Any]]:
    """The queries of a dashboard, with what their lines are called."""
    return [target for panel in json.loads(dashboard.read_text())["panels"] for target in panel.get("targets", [])]


EXPRESSIONS = [rule["expr"] for rule in rules()] + [t["expr"] for dashboard in DASHBOARDS for t in targets(dashboard)]


@pytest.fixture
def labels(client: TestClient) -> dict[str, set[str]]:
    """The labels of each name that a scrape shows, once everything has happened that a label tells apart."""
    backend = client.app.state.jobs.backend  # type: ignore[attr-defined]
    assert isinstance(backend, FakeBackend)
    backend.health = dataclasses.replace(backend.health, restarts={"died": 1})
    client.post("/generate", json={"steps": 0})
    client.app.state.jobs.metrics.by_key.of("alice")  # type: ignore[attr-defined]
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {sample.name: set(sample.labels) for family in families for sample in family.samples}


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_metrics_and_labels_are_there(expression: str, labels: dict[str, set[str]]) -> None:
    selectors = SELECTOR.findall(expression)
    grouped = [word for words in re.findall(r"\bby \(([^)]*)\)", expression) for word in words.split(", ")]
    known = FROM_PROMETHEUS.union(*(labels.get(name, set()) for name, _ in selectors))

    assert [name for name, _ in selectors if name not in labels] == []
    for name, matchers in selectors:
        assert {label for label, _ in MATCHER.findall(matchers)} <= labels[name] | FROM_PROMETHEUS
    assert set(grouped) <= known


@pytest.mark.parametrize("expression", [e for e in EXPRESSIONS if "reason" in e or "outcome=" in e])
def test_labels_are_compared_with_what_they_can_be(expression: str) -> None:
    codes = {code for _, code in ANSWERS.values()} | {"succeeded", "failed", "cancelled"}
    asked = [word for _, words in MATCHER.findall(expression) for word in words.split("|")]

    assert {word for word in asked if word != "$instance"} <= codes


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: str(path.name))
def test_lines_are_called_by_labels_they_have(dashboard: Path) -> None:
    for target in targets(dashboard):
        named = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
        assert named <= {
            word for words in re.findall(r"\bby \(([^)]*)\)", target["expr"]) for word in words.split(", ")
        }


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: str(path.name))
def test_every_panel_says_what_it_shows(dashboard: Path) -> None:
    panels = [panel for panel in json.loads(dashboard.read_text())["panels"] if panel["type"] != "row"]
    said = [panel.get("description", "") for panel in panels]

    assert [panel["title"] for panel, text in zip(panels, said, strict=True) if not text.endswith(".")] == []
    assert len(set(said)) == len(panels) > 30


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: str(path.name))
def test_panels_do_not_lie_on_each_other(dashboard: Path) -> None:
    places = [panel["gridPos"] for panel in json.loads(dashboard.read_text())["panels"]]
    cells = [(p["x"] + dx, p["y"] + dy) for p in places for dx in range(p["w"]) for dy in range(p["h"])]

    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24


def test_every_metric_is_shown_somewhere(client: TestClient) -> None:
    shown = {name for expression in EXPRESSIONS for name, _ in SELECTOR.findall(expression)}

    metrics = {metric.name for metric in client.app.state.jobs.metric_values()}  # type: ignore[attr-defined]
    assert metrics <= {name.removesuffix("_total") for name in shown} | {"ddpm_jobs_accepted"}


def test_every_alert_has_a_page_to_turn_to() -> None:
    assert re.findall(r"^### (Ddpm\w+)$", RUNBOOK.read_text(), re.MULTILINE) == [rule["alert"] for rule in rules()]


def test_every_alert_is_tried_out() -> None:
    tests = yaml.safe_load((ALERTS.parent / "alerts.test.yml").read_text())["tests"]
    fired = {case["alertname"] for test in tests for case in test["alert_rule_test"] if case.get("exp_alerts")}

    assert fired == {rule["alert"] for rule in rules()}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_agrees(tmp_path: Path) -> None:
    queries = [e.replace("$__rate_interval", "5m").replace("$instance", ".*") for e in EXPRESSIONS]
    recorded = [{"record": f"panel:{i}", "expr": query} for i, query in enumerate(queries)]
    (tmp_path / "panels.yml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": recorded}]}))
    (tmp_path / "metrics_key").write_text("none")
    scraping = (ALERTS.parent / "prometheus.yml").read_text().replace("/etc/prometheus/metrics_key", "metrics_key")
    (tmp_path / "prometheus.yml").write_text(scraping.replace("/etc/prometheus/alerts.yml", str(ALERTS)))
    orders = [
        ["check", "rules", str(tmp_path / "panels.yml"), str(ALERTS)],
        ["check", "config", str(tmp_path / "prometheus.yml")],
        ["test", "rules", str(ALERTS.parent / "alerts.test.yml")],
    ]

    for order in orders:
        result = subprocess.run(["promtool", *order], capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
