"""docs/settings.md lists every setting with its default and bounds."""

from pathlib import Path

from server.bounds import listed
from server.settings import PREFIX, Settings

DOCUMENT = Path(__file__).parent.parent / "docs" / "settings.md"


def row(name: str) -> str:
    """A setting as docs/settings.md has it: variable, meaning, default, bounds."""
    field = Settings.model_fields[name]
    default = f"`{field.default}`" if str(field.default) else "empty"
    return f"| `{PREFIX}{name.upper()}` | {field.description} | {default} | {listed(field)} |"


def test_every_setting_is_documented_with_its_default() -> None:
    documented = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("| `DDPM_")]

    assert documented == [row(name) for name in Settings.model_fields]
