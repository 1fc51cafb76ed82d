"""deploy/kubernetes: what the manifests must not get wrong. Whether a cluster takes them is not seen here."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from server.errors import BadHost
from server.settings import Settings
from server.web.hosts import Rules
from tests.deploy.files import DEPLOY, ROOT, manifests

KUBERNETES = DEPLOY / "kubernetes"
KUSTOMIZATIONS = sorted(KUBERNETES.rglob("kustomization.yaml"))
NOT_APPLIED = {"adapter.yaml"}  # values for a chart


@pytest.fixture
def pod() -> dict[str, Any]:
    """The specification of the server's pods."""
    spec: dict[str, Any] = manifests()["StatefulSet", "ddpm"]["spec"]["template"]["spec"]
    return spec


@pytest.fixture
def container(pod: dict[str, Any]) -> dict[str, Any]:
    """The only container of a pod."""
    (only,) = pod["containers"]
    assert isinstance(only, dict)
    return only


@pytest.mark.parametrize("path", KUSTOMIZATIONS, ids=lambda path: str(path.parent.name))
def test_every_file_is_applied_by_the_kustomization_beside_it(path: Path) -> None:
    listed = set(yaml.safe_load(path.read_text()).get("resources", []))

    assert listed == {p.name for p in path.parent.glob("*.yaml")} - {path.name} - NOT_APPLIED


def test_the_service_does_not_configure_the_server(pod: dict[str, Any]) -> None:
    assert pod["enableServiceLinks"] is False  # else a Service `ddpm` sets DDPM_PORT to tcp://10.0.0.1:80


def test_a_pod_may_end_its_requests(pod: dict[str, Any], container: dict[str, Any]) -> None:
    before = int(container["lifecycle"]["preStop"]["exec"]["command"][-1].split("(")[1].rstrip(")"))

    assert pod["terminationGracePeriodSeconds"] >= before + Settings.model_fields["drain_s"].default + 10


def test_a_pod_is_confined(pod: dict[str, Any], container: dict[str, Any]) -> None:
    context = container["securityContext"]

    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 10001
    assert pod["securityContext"]["fsGroup"] == 10001  # or it could not write to its volume
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert context["readOnlyRootFilesystem"] is True and context["allowPrivilegeEscalation"] is False
    assert context["capabilities"] == {"drop": ["ALL"]}
    assert pod["automountServiceAccountToken"] is False


def test_what_is_written_has_a_place(container: dict[str, Any]) -> None:
    claims = manifests()["StatefulSet", "ddpm"]["spec"]["volumeClaimTemplates"]

    assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/data", "/tmp"}
    assert [claim["metadata"]["name"] for claim in claims] == ["data"]
    kept = Settings.model_fields["retention_bytes"].default
    assert int(claims[0]["spec"]["resources"]["requests"]["storage"].removesuffix("Gi")) << 30 > kept


def test_an_engine_that_is_replaced_is_no_reason_to_kill_the_server(container: dict[str, Any]) -> None:
    paths = {name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")}

    assert paths == {"startup": "/readyz", "readiness": "/readyz", "liveness": "/healthz"}


@pytest.fixture
def settings() -> Settings:
    """What the manifests set."""
    (generated,) = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())["configMapGenerator"]
    return Settings.read(dict(literal.split("=", 1) for literal in generated["literals"]))


def answers(settings: Settings, host: str) -> bool:
    """Whether a server with these settings, and no keys, answers for this host."""
    try:
        Rules.read(settings.allowed_hosts, "", keys_needed=False).check_host([host.encode()])
    except BadHost:
        return False
    return True


def test_the_server_answers_for_every_name_that_it_is_given(settings: Settings) -> None:
    namespace = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())["namespace"]
    domains = ["", f".{namespace}", f".{namespace}.svc", f".{namespace}.svc.cluster.local"]
    offered = [name + domain for name in ("ddpm", "ddpm-0.ddpm-pods", "ddpm-12.ddpm-pods") for domain in domains]

    assert {name for kind, name in manifests() if kind == "Service"} == {"ddpm", "ddpm-pods"}
    assert [name for name in [*offered, "localhost", "127.0.0.1"] if not answers(settings, f"{name}:8000")] == []
    assert not answers(settings, "pictures.example")


def test_prometheus_asks_by_a_name_that_is_answered_for(settings: Settings) -> None:
    (endpoint,) = manifests()["PodMonitor", "ddpm"]["spec"]["podMetricsEndpoints"]
    (address,) = [rule for rule in endpoint["relabelings"] if rule["targetLabel"] == "__address__"]
    asked = re.sub(address["regex"], address["replacement"].replace("$", "\\"), "ddpm-0/ddpm")

    assert asked == "ddpm-0.ddpm-pods.ddpm.svc:8000"
    assert answers(settings, asked)


@pytest.mark.parametrize("name", ["ddpm", "ddpm-pods"])
def test_services_find_the_pods(name: str, container: dict[str, Any]) -> None:
    spec = manifests()["Service", name]["spec"]
    labels = manifests()["StatefulSet", "ddpm"]["spec"]["template"]["metadata"]["labels"]

    assert spec["selector"].items() <= labels.items()
    assert {port["targetPort"] for port in spec["ports"]} <= {port["name"] for port in container["ports"]}


def test_whoever_selects_pods_finds_them() -> None:
    made = manifests()
    stateful = made["StatefulSet", "ddpm"]["spec"]
    selecting = [made["PodDisruptionBudget", "ddpm"], made["PodMonitor", "ddpm"], {"spec": stateful}]
    labels = stateful["template"]["metadata"]["labels"]

    assert [m["spec"]["selector"]["matchLabels"].items() <= labels.items() for m in selecting] == [True] * 3
    assert stateful["serviceName"] == "ddpm-pods"


@pytest.mark.parametrize("kind", ["HorizontalPodAutoscaler", "ScaledObject"])
def test_autoscalers_scale_the_servers(kind: str) -> None:
    target = manifests()[kind, "ddpm"]["spec"]["scaleTargetRef"]

    assert target == {"apiVersion": "apps/v1", "kind": "StatefulSet", "name": "ddpm"}
    assert "ddpm_steps_waiting" in str(manifests()[kind, "ddpm"])


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_weights_keys_and_tokens_of_ones_own_come_as_the_document_says(tmp_path: Path) -> None:
    (text,) = re.findall(r"^```yaml\n(.*?)^```$", (ROOT / "docs" / "operations.md").read_text(), re.M | re.S)
    (tmp_path / "ddpm-server").symlink_to(ROOT)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "kustomization.yaml").write_text(text)
    (mine / "keys").write_text("alice:hash")
    (mine / "hub.env").write_text("HF_TOKEN=token")
    printed = subprocess.run(["kubectl", "kustomize", mine], capture_output=True, text=True)
    assert printed.returncode == 0, printed.stderr
    documents = list(yaml.safe_load_all(printed.stdout))
    (settings,) = [d["data"] for d in documents if d["kind"] == "ConfigMap"]
    secrets = {d["metadata"]["name"]: set(d["data"]) for d in documents if d["kind"] == "Secret"}
    (pod,) = [d["spec"]["template"]["spec"] for d in documents if d["kind"] == "StatefulSet"]
    (server,) = pod["containers"]
    volumes, read = {v["name"]: v for v in pod["volumes"]}, Settings.read(settings)

    assert read.log_level == "info" and answers(read, "ddpm")  # what the manifests set is still there
    assert {m["mountPath"]: m["name"] for m in server["volumeMounts"]}.items() >= {
        read.weights.partition(",")[0]: "models",
        str(Path(read.api_keys).parent): "keys",
    }.items()
    assert Path(read.api_keys).name in secrets[volumes["keys"]["secret"]["secretName"]]
    assert "HF_TOKEN" in secrets[server["envFrom"][1]["secretRef"]["name"]]
    assert volumes["models"]["persistentVolumeClaim"]["claimName"] == "models"


def test_the_operator_has_the_same_alerts() -> None:
    alerts = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())

    assert manifests()["PrometheusRule", "ddpm"]["spec"] == alerts
