"""Compose files and manifests, read as their tools read them, as far as these files need it."""

from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
RESET = object()  # what compose's tag !reset stands for: the key is gone


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML with compose's tag."""


_Loader.add_constructor("!reset", lambda loader, node: RESET)


def merged(below: Any, above: Any) -> Any:
    """What compose makes of two files: mappings are merged, lists joined, and what is above wins."""
    if isinstance(below, dict) and isinstance(above, dict):
        both = below | {key: merged(below.get(key), value) for key, value in above.items()}
        return {key: value for key, value in both.items() if value is not RESET}
    if isinstance(below, list) and isinstance(above, list):
        return below + above
    return above


def compose(*overlays: str) -> dict[str, Any]:
    """docker-compose.yml, with overlays from deploy/ over it."""
    made: dict[str, Any] = {}
    for path in (ROOT / "docker-compose.yml", *(DEPLOY / overlay for overlay in overlays)):
        made = merged(made, yaml.load(path.read_text(), _Loader))
    return made


def manifests() -> dict[tuple[str, str], dict[str, Any]]:
    """All of deploy/kubernetes that is applied, by kind and name."""
    paths = sorted((DEPLOY / "kubernetes").rglob("*.yaml"))
    documents = [document for path in paths for document in yaml.safe_load_all(path.read_text())]
    return {(d["kind"], d["metadata"]["name"]): d for d in documents if "metadata" in d}
