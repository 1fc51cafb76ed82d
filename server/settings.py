"""All settings with their defaults and bounds: a frozen value, read once from `DDPM_*` variables and flags."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, ValidationError

from server.bounds import says
from server.errors import SettingsError

PREFIX = "DDPM_"
MIN_SECRET = 24  # characters
MAX_KEY_BYTES = 1024  # of a key in a request


def _long_enough(secret: SecretStr) -> SecretStr:
    text = secret.get_secret_value()
    if 0 < len(text) < MIN_SECRET or text.encode(errors="replace") != text.encode(errors="surrogateescape"):
        raise ValueError(f"must be empty, or at least {MIN_SECRET} random characters in UTF-8")
    return secret


def _can_be_sent(key: SecretStr) -> SecretStr:
    text = key.get_secret_value()
    if text.strip() != text or not text.isprintable() or len(text.encode()) > MAX_KEY_BYTES:
        most = f"up to {MAX_KEY_BYTES} bytes of printable characters"
        raise ValueError(f"must be empty, or {most} without a blank or a line's end around them")
    return key


def _is_meant(directory: object) -> object:
    text = str(directory)
    if not text.strip() or text.startswith("~"):
        raise ValueError("must not be empty or begin with ~, which only a shell understands")
    return directory


class Settings(BaseModel):
    """The configuration of a server. The field `slots` is the variable DDPM_SLOTS and the flag --slots."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = Field(
        "127.0.0.1", pattern="^[!-~]+$", description="address to listen on; 0.0.0.0: every IPv4 address of this machine"
    )
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0: any free port")
    weights: Annotated[str, BeforeValidator(str)] = Field(
        "weights",
        description="comma-separated model directories, folders of model directories, and hub ids (org/name@revision)",
    )
    default_model: str = Field(
        "", description="model of requests that name none; empty: `digits` if there is one, else the only one"
    )
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:\d{1,3}(,\d{1,3})*)?)$",
        description="cpu, cuda (every GPU), cuda:N or cuda:N,M; auto: every GPU, or the CPU if there is none",
    )
    engines: int = Field(1, ge=1, le=64, description="engine processes on a CPU, which share its threads equally")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="number format of the net; auto: bfloat16 if the device computes in it, else float32"
    )
    slots: int = Field(
        0,
        ge=0,
        le=1024,
        description="pictures in one batch, per model, of which a guided one counts as two; 0: 64 on a GPU, 8 on a CPU",
    )
    model_memory_bytes: int = Field(
        0,
        ge=0,
        description="device memory for loaded models, in bytes; 0: no limit, all models are loaded at the start",
    )
    threads: int = Field(
        0, ge=0, le=256, description="CPU threads of all engines together; 0: one per core that the container may use"
    )
    exact: bool = Field(
        True, description="use only batch sizes that give a picture the same bytes whatever else is in the batch"
    )
    data_dir: Annotated[Path, BeforeValidator(_is_meant)] = Field(
        Path("data"), description="folder of the journal and the pictures, for one server alone"
    )
    retention_days: float = Field(7.0, ge=0, le=36500, description="days that ended jobs are kept")
    retention_bytes: int = Field(
        10 << 30, ge=0, description="bytes of jobs on disk, beyond which the oldest ended jobs are deleted"
    )
    result_cache: bool = Field(True, description="answer a repeated request with the stored pictures of the first")
    max_n: int = Field(64, ge=1, le=4096, description="pictures per request")
    max_frames: int = Field(4096, ge=2, le=1 << 20, description="frames per request: pictures x points x kinds")
    max_queued_steps: int = Field(
        1_000_000, ge=1, description="image-steps left to do of all jobs; further jobs are answered with 429"
    )
    max_queued_jobs: int = Field(
        4096, ge=1, le=1 << 20, description="unfinished jobs; further jobs are answered with 429"
    )
    max_live_bytes: int = Field(
        1 << 30,
        ge=1 << 20,
        description="bytes of memory that unfinished jobs may hold; further jobs are answered with 429",
    )
    max_body_bytes: int = Field(65_536, ge=256, le=1 << 30, description="bytes of a request body")
    max_connections: int = Field(
        4096, ge=1, le=1 << 20, description="simultaneous connections; further ones may only ask for /healthz"
    )
    max_websockets: int = Field(
        3072, ge=1, le=1 << 20, description="simultaneous websockets; further ones are answered with 503"
    )
    request_s: float = Field(
        10.0, ge=0.1, le=3600, description="seconds in which the head of a request, and then its body, must arrive"
    )
    api_keys: str = Field(
        "",
        description="file of keys, one name:sha256[:quota] per line, read again when changed; empty: no key is needed",
    )
    metrics_key: Annotated[SecretStr, AfterValidator(_can_be_sent)] = Field(
        SecretStr(""), description="key for /metrics; empty: open if there are no API keys, else closed"
    )
    allowed_hosts: str = Field(
        "", description="comma-separated hosts that the server answers for, or *; empty: see docs/security.md"
    )
    allowed_origins: str = Field(
        "", description="comma-separated origins of other sites whose pages may use the server, or *"
    )
    webhook_secret: Annotated[SecretStr, AfterValidator(_long_enough)] = Field(
        SecretStr(""), description="secret from which those that sign webhooks are derived; empty: no webhooks"
    )
    webhook_hosts: str = Field(
        "",
        pattern=r"^[A-Za-z0-9_.:\[\]-]*( *, *[A-Za-z0-9_.:\[\]-]+)*$",
        description="comma-separated hosts of webhooks that may have private addresses and need no TLS",
    )
    frame_ancestors: str = Field(
        "none", description="comma-separated origins whose pages may show the page in a frame; or none, self, *"
    )
    path_prefix: str = Field(
        "",
        pattern=r"^(/[A-Za-z0-9_~-][A-Za-z0-9._~-]*)*$",
        description="path under which a proxy offers the server, such as /ddpm; empty: the root",
    )
    drain_s: float = Field(
        45.0, ge=0, le=3600, description="seconds that jobs get to end at shutdown, before they are parked"
    )
    engine_restarts: int = Field(
        5,
        ge=2,
        le=1000,
        description="consecutive engine restarts without progress before the server exits; restarts of a quarantined "
        "job do not count, and five after SIGKILL count as one",
    )
    engine_patience_s: float = Field(
        8.0, ge=0.5, le=3600, description="seconds (or 40 steps) without a heartbeat before an engine is replaced"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="lowest level that is logged")

    @classmethod
    def read(cls, environ: Mapping[str, str], flags: Mapping[str, object] | None = None) -> "Settings":
        """Settings from the environment, overridden by flags. Raises SettingsError, naming the variable."""
        values: dict[str, object] = {}
        for variable, text in environ.items():
            if variable.startswith(PREFIX):
                name = variable.removeprefix(PREFIX).lower()
                if name not in cls.model_fields:
                    raise SettingsError(f"{variable} is not a setting; there are {', '.join(cls.variables())}")
                values[name] = text
        values.update(flags or {})
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            name = str(first["loc"][0])
            field = cls.model_fields[name]
            wrong = f"{PREFIX}{name.upper()} {says(field, dict(first), text=True)}"
            raise SettingsError(f"{wrong}: {field.description}") from None

    @classmethod
    def variables(cls) -> list[str]:
        """The names of all variables."""
        return [PREFIX + name.upper() for name in cls.model_fields]
