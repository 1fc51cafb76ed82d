"""`docker compose up`: what the services may do, and how they fit together."""

import re
from typing import Any

import pytest
from pydantic import ValidationError

from server.settings import Settings
from tests.deploy.files import DEPLOY, ROOT, compose

PINNED = re.compile(r"[a-z./-]+:v?\d+\.\d+\.\d+[a-z0-9.-]*")
OURS = "ddpm-server:"
SERVICES = sorted(compose()["services"])


def seconds(duration: str) -> float:
    """A duration of compose's, of one unit."""
    return float(duration[:-1]) * {"s": 1, "m": 60}[duration[-1]]


@pytest.fixture(params=SERVICES)
def service(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Each of the services."""
    found: dict[str, Any] = compose()["services"][request.param]
    return found


def test_no_service_can_do_more_than_it_must(service: dict[str, Any]) -> None:
    assert service["read_only"] is not ("configs" in service)  # Compose can write nothing into what is read-only
    assert service["cap_drop"] == ["ALL"] and "cap_add" not in service and "privileged" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]


def test_images_are_ours_or_pinned(service: dict[str, Any]) -> None:
    assert service["image"].startswith(OURS) or PINNED.fullmatch(service["image"])


def test_only_nginx_can_be_reached_from_elsewhere() -> None:
    published = {name: s["ports"] for name, s in compose()["services"].items() if "ports" in s}

    assert published.pop("nginx") == ["${PUBLISH:-127.0.0.1:8000}:8080"]
    assert all(port.startswith("127.0.0.1:") for ports in published.values() for port in ports)


def test_what_is_mounted_is_there(service: dict[str, Any]) -> None:
    sources = [volume.partition(":")[0] for volume in service.get("volumes", [])]
    volumes = compose()["volumes"]

    assert [s for s in sources if not ((ROOT / s).exists() if s.startswith(".") else s in volumes)] == []


def test_the_server_may_end_its_requests() -> None:
    drain_s = Settings.model_fields["drain_s"].default

    assert seconds(compose()["services"]["ddpm"]["stop_grace_period"]) >= drain_s + 10


def test_nginx_lets_them_end_too() -> None:
    service, text = compose()["services"]["nginx"], (DEPLOY / "nginx" / "nginx.conf").read_text()
    shutdown = re.search(r"worker_shutdown_timeout (\w+);", text)

    assert shutdown is not None and service["stop_signal"] == "SIGQUIT"
    assert Settings.model_fields["drain_s"].default < seconds(shutdown[1]) < seconds(service["stop_grace_period"])


def test_nginx_is_not_stopped_before_the_server_has_told_its_subscribers() -> None:
    assert "depends_on" not in compose()["services"]["nginx"]


def test_nginx_allows_fewer_connections_than_the_server() -> None:
    text = (DEPLOY / "nginx" / "nginx.conf").read_text()
    most = int(re.findall(r"limit_conn all (\d+);", text)[0])
    files = compose()["services"]["ddpm"]["ulimits"]["nofile"]

    assert most < Settings.model_fields["max_connections"].default < files
    assert 2 * most < compose()["services"]["nginx"]["ulimits"]["nofile"]


def test_nginx_takes_the_bodies_that_the_server_takes() -> None:
    text = (DEPLOY / "nginx" / "nginx.conf").read_text()
    most = Settings.model_fields["max_body_bytes"].default

    assert f"client_max_body_size {most // 1024}k;" in text and f"at most {most} bytes" in text


def test_the_server_decides_how_long_a_body_may_take() -> None:
    pause = re.search(r"client_body_timeout (\w+);", (DEPLOY / "nginx" / "nginx.conf").read_text())

    assert pause is not None
    with pytest.raises(ValidationError):  # no server waits longer for a body
        Settings(request_s=seconds(pause[1]) + 1)


def test_a_gpu_is_asked_for_as_compose_wants_it() -> None:
    device = compose()["services"]["ddpm"]["deploy"]["resources"]["reservations"]["devices"][0]

    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}


def test_without_a_gpu_nothing_asks_for_one() -> None:
    service = compose("compose.cpu.yml")["services"]["ddpm"]

    assert "deploy" not in service
    assert (service["build"]["target"], service["image"]) == ("cpu", "ddpm-server:cpu")
    (index,) = re.findall(r"^CPU_WHEELS \?= (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert service["build"]["args"] == {"TORCH_INDEX": f"${{CPU_WHEELS-{index}}}"}


def test_with_keys_the_server_and_prometheus_share_one_for_metrics() -> None:
    made = compose("compose.keys.yml")
    environment = made["services"]["ddpm"]["environment"]

    assert environment["DDPM_API_KEYS"] == "/run/secrets/api_keys" and "api_keys" in made["secrets"]
    assert environment["DDPM_METRICS_KEY"].startswith("${DDPM_METRICS_KEY:?")
    assert made["configs"]["metrics_key"]["content"].startswith("${DDPM_METRICS_KEY:-")


def test_the_key_for_metrics_has_one_place_with_and_without_other_keys() -> None:
    environment = compose()["services"]["ddpm"]["environment"]

    assert environment["DDPM_METRICS_KEY"] == "${DDPM_METRICS_KEY:-}"
    assert not Settings.read({"DDPM_METRICS_KEY": ""}).metrics_key.get_secret_value()


def test_monitoring_is_there_for_those_who_ask() -> None:
    profiles = {name: s.get("profiles", []) for name, s in compose()["services"].items()}

    assert profiles == {"ddpm": [], "nginx": [], "prometheus": ["monitoring"], "grafana": ["monitoring"]}


@pytest.mark.parametrize("overlays", [(), ("compose.cpu.yml",), ("compose.keys.yml",)])
def test_the_server_is_given_settings_that_it_knows(overlays: tuple[str, ...]) -> None:
    environment = compose(*overlays)["services"]["ddpm"].get("environment", {})

    assert {name for name in environment if name.startswith("DDPM_")} <= set(Settings.variables())
