"""Builds the engines that the settings ask for: one for each device, or several on a CPU."""

from collections.abc import Callable, Mapping

from model.checkpoint.card import ModelCard
from server.engines.backend import Backend
from server.engines.devices import choose_devices, count_gpus
from server.engines.process import Patience
from server.engines.quarantine import Quarantine
from server.engines.router import Router
from server.engines.supervisor import EngineSupervisor
from server.errors import EngineFailed, SettingsError
from server.settings import Settings
from server.troubles import Troubles
from server.worker.cpus import cores
from server.worker.messages import Start


def build(
    settings: Settings,
    cards: Mapping[str, ModelCard],
    on_failed: Callable[[EngineFailed], None],
    on_step: Callable[[str, int, float], None],
    troubles: Troubles,
) -> Backend:
    """The backend of a server. Raises SettingsError if GPUs were to be shared, NoSuchDevice if their driver is mute."""
    patience = Patience(silence_s=settings.engine_patience_s / 2, hang_s=settings.engine_patience_s)
    starts, quarantine = _starts(settings, cards), Quarantine()
    if len(starts) == 1:
        return EngineSupervisor(starts[0], settings.engine_restarts, on_failed, on_step, patience, quarantine, troubles)
    router = Router(on_failed, quarantine)
    for start in starts:
        supervisor = EngineSupervisor(
            start, settings.engine_restarts, router.lose, on_step, patience, quarantine, troubles
        )
        router.join(supervisor)
    return router


def _starts(settings: Settings, cards: Mapping[str, ModelCard]) -> list[Start]:
    """What each engine is to run."""
    gpus = count_gpus() if settings.device in ("auto", "cuda") else 0
    devices, threads = choose_devices(settings.device, gpus), settings.threads
    if settings.engines > 1:
        if gpus or settings.device.startswith("cuda"):
            raise SettingsError("DDPM_ENGINES must be 1 on GPUs, each of which has one engine")
        devices = devices * settings.engines
        threads = max(1, (threads or cores()) // settings.engines)
    budget_bytes = settings.model_memory_bytes // settings.engines  # they share the machine's memory
    return [
        Start(
            models=tuple((name, card.directory) for name, card in cards.items()),
            configs={name: card.configs for name, card in cards.items()},
            plans={name: card.process.plans for name, card in cards.items()},
            default=settings.default_model,
            device=device,
            dtype=settings.dtype,
            slots=settings.slots,
            threads=threads,
            exact=settings.exact,
            log_level=settings.log_level,
            memory_bytes=budget_bytes,
        )
        for device in devices
    ]
