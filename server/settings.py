"""Every knob: its unit, default and bounds. A frozen value, read once, from `DDPM_*` variables and flags."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, ValidationError

from server.bounds import says
from server.errors import SettingsError

PREFIX = "DDPM_"


class Settings(BaseModel):
    """The configuration of a server. Field `slots` is the variable DDPM_SLOTS and the flag --slots."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes any free one")
    weights: Annotated[str, BeforeValidator(str)] = Field(
        "weights", description="folders of model directories, model directories, hub ids (org/name@revision), by commas"
    )
    default_model: str = Field("", description="model of requests that name none; empty: the only one there is")
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:\d{1,3}(,\d{1,3})*)?)$",
        description="cpu, cuda (every GPU), cuda:N or cuda:N,M; auto: every GPU, else the CPU",
    )
    engines: int = Field(1, ge=1, le=64, description="engine processes on a CPU; they share its threads equally")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="numbers inside the net; auto: bfloat16 where the device computes in it"
    )
    slots: int = Field(0, ge=0, le=1024, description="pictures in one batch per model; 0: 64 on a GPU, 8 on a CPU")
    model_memory_bytes: int = Field(
        0, ge=0, description="bytes of a device that loaded models may take; 0: all are loaded at the start"
    )
    threads: int = Field(
        0,
        ge=0,
        le=256,
        description="threads of all engines on a CPU together; 0: one per core, and no more than a container may use",
    )
    exact: bool = Field(True, description="only batch sizes in which a picture has the same bytes in any company")
    data_dir: Path = Field(Path("data"), description="a folder for the jobs and their pictures; one server has it")
    retention_days: float = Field(7.0, ge=0, le=36500, description="days for which a job that has ended is kept")
    retention_bytes: int = Field(10 << 30, ge=0, description="bytes that jobs may take on disk; the oldest go first")
    result_cache: bool = Field(True, description="answer a request that was made before with the pictures of then")
    max_n: int = Field(64, ge=1, le=4096, description="pictures per request")
    max_frames: int = Field(4096, ge=2, le=1 << 20, description="frames per request: pictures x points x kinds")
    max_queued_steps: int = Field(
        1_000_000, ge=1, description="image-steps accepted and not yet done; more are answered with 429"
    )
    max_queued_jobs: int = Field(
        4096, ge=1, le=1 << 20, description="jobs accepted and not yet ended; more are answered with 429"
    )
    max_live_bytes: int = Field(
        1 << 30,
        ge=1 << 20,
        description="bytes that jobs not yet ended may come to hold; more are answered with 429",
    )
    max_body_bytes: int = Field(65_536, ge=256, le=1 << 30, description="bytes of a request's body")
    max_connections: int = Field(
        4096, ge=1, le=1 << 20, description="connections at a time; of those beyond, only /healthz is answered"
    )
    max_websockets: int = Field(3072, ge=1, le=1 << 20, description="websockets at a time; more are answered with 503")
    request_s: float = Field(
        10.0, ge=0.1, le=3600, description="seconds within which a request's head, and then its body, must arrive"
    )
    api_keys: str = Field("", description="file of keys, a line name:sha256[:quota] each; empty: no key is needed")
    metrics_key: SecretStr = Field(
        SecretStr(""), description="key for /metrics; empty: open if no API keys are set, else closed"
    )
    allowed_hosts: str = Field(
        "", description="hosts this server answers for, by commas, or *; empty: see docs/security.md"
    )
    allowed_origins: str = Field(
        "", description="origins of other sites whose pages may use this server, by commas, or *"
    )
    drain_s: float = Field(45.0, ge=0, le=3600, description="seconds that running requests get to end at shutdown")
    engine_restarts: int = Field(
        5,
        ge=2,
        le=1000,
        description="restarts of the engine in a row without a step done, beside those of a suspect that is run alone",
    )
    engine_patience_s: float = Field(
        8.0, ge=0.5, le=3600, description="seconds without a sign of life (or 40 steps) until the engine is replaced"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severe level logged")

    @classmethod
    def read(cls, environ: Mapping[str, str], flags: Mapping[str, object] | None = None) -> "Settings":
        """Settings from the environment, overridden by flags. Raises SettingsError in one line that names the knob."""
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
