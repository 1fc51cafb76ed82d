"""The main loop of an engine process: loads models, then steps whatever is busy, until the pipe closes.

`server.worker` is the only package of the server that imports torch. The process owns one device, and has no sockets
and no disk to write to.
"""

import logging
import time
import traceback
from multiprocessing.connection import Connection

import torch

from model.engine.events import Event
from model.errors import ModelRefused, NoSuchDevice
from server.worker.messages import Died, Ready, Refused, Report, Start
from server.worker.models import HEARTBEAT_S, Models

logger = logging.getLogger(__name__)


def serve(pipe: Connection, start: Start) -> None:
    """Runs until the other end of the pipe is closed."""
    try:
        _run(pipe, start)
    except (ModelRefused, NoSuchDevice) as error:
        pipe.send(Refused(type(error).__name__, str(error)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the API process is gone
    except Exception as error:  # the one place that can report whatever killed the engine
        pipe.send(Died(_cause(error), traceback.format_exc()[-4000:]))


def _cause(error: Exception) -> str:
    """One of the words of `Died.cause`. After an error of its own nothing on a GPU works any more."""
    if isinstance(error, torch.OutOfMemoryError):
        return "memory"
    of_device = isinstance(error, torch.AcceleratorError) or any(name in str(error) for name in ("CUDA", "cuDNN"))
    return "cuda" if of_device else "failed"


def _run(pipe: Connection, start: Start) -> None:
    models = Models(start, pipe.send)
    for pause_s in models.start():
        time.sleep(pause_s)
    for name, status in models.statuses.items():
        if status.trouble is not None and not start.again:
            logger.error("model refused", extra={"model": name, "reason": status.trouble})
    pipe.send(Ready(models.statuses, models.heartbeat().steps))
    events: list[Event] = []
    reported_at = 0.0
    while True:
        idle_s = 0.0 if events or models.busy else models.pause_s
        while pipe.poll(idle_s):
            models.handle(pipe.recv())
            idle_s = 0.0
        models.distribute()
        busy = models.busy
        seated = models.seat(busy)
        due = time.monotonic() - reported_at >= HEARTBEAT_S or (models.watched and busy)
        if events or seated or due:  # before the step: should it kill the engine, it is known who was seated
            pipe.send(Report(models.stats, events, seated, models.heartbeat() if due else None))
            reported_at = time.monotonic() if due else reported_at
        models.arrange()
        events = models.step(busy)
