"""Settings from variables and flags."""

import pytest

from server.errors import SettingsError
from server.settings import Settings


def test_flags_override_variables_and_other_variables_are_ignored() -> None:
    settings = Settings.read({"DDPM_SLOTS": "4", "DDPM_EXACT": "0", "HOME": "x"}, {"slots": "8"})

    assert (settings.slots, settings.exact) == (8, False)


def test_an_unknown_variable_is_refused_with_the_known_ones() -> None:
    with pytest.raises(SettingsError, match="DDPM_SLOTZ is not a setting; there are .*DDPM_SLOTS"):
        Settings.read({"DDPM_SLOTZ": "4"})


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("PORT", "70000", "DDPM_PORT must lie in 0..65535, got 70000: port to listen on"),
        ("SLOTS", "many", "DDPM_SLOTS must be an integer in 0..1024: pictures in one batch"),
        ("MAX_QUEUED_STEPS", "0", "DDPM_MAX_QUEUED_STEPS must be at least 1, got 0: "),
        ("REQUEST_S", "0.05", "DDPM_REQUEST_S must lie in 0.1..3600, got 0.05: "),
        ("EXACT", "perhaps", "DDPM_EXACT must be yes or no: "),
        ("DTYPE", "int8", "DDPM_DTYPE must be one of auto, float32, bfloat16, float16: "),
        (
            "WEBHOOK_SECRET",
            "short",
            "DDPM_WEBHOOK_SECRET must be empty, or at least 24 random characters in UTF-8: secret",
        ),
        (
            "WEBHOOK_SECRET",
            "\udcff" * 24,
            "DDPM_WEBHOOK_SECRET must be empty, or at least 24 random characters in UTF-8: ",
        ),
        ("METRICS_KEY", "key\n", "DDPM_METRICS_KEY must be empty, or up to 1024 bytes of printable characters without"),
        (
            "METRICS_KEY",
            "\udcff",
            "DDPM_METRICS_KEY must be empty, or up to 1024 bytes of printable characters without",
        ),
        ("METRICS_KEY", "k" * 1025, "DDPM_METRICS_KEY must be empty, or up to 1024 bytes of printable characters"),
        ("HOST", "", "DDPM_HOST is ill-formed: address to listen on; 0.0.0.0: every IPv4 address of this machine"),
        ("HOST", "\udcff", "DDPM_HOST must be Unicode text: address to listen on"),
        ("DATA_DIR", "", "DDPM_DATA_DIR must not be empty or begin with ~, which only a shell understands: folder of"),
        ("DATA_DIR", "~/data", "DDPM_DATA_DIR must not be empty or begin with ~, which only a shell understands: "),
        ("WEBHOOK_HOSTS", "http://a.example", "DDPM_WEBHOOK_HOSTS is ill-formed: comma-separated hosts of webhooks"),
        ("DEVICE", "gpu", "DDPM_DEVICE is ill-formed: cpu, cuda (every GPU), cuda:N or cuda:N,M; auto: "),
    ],
)
def test_a_setting_out_of_bounds_is_refused_with_its_bounds(name: str, text: str, said: str) -> None:
    with pytest.raises(SettingsError) as refusal:
        Settings.read({f"DDPM_{name}": text})

    assert str(refusal.value).startswith(said)
