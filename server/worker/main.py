"""The life of an engine process: load models, then step whatever is busy, until the pipe closes.

With `models`, `loader`, `device` and `faults` beside it the only module of the server that imports torch. The process
owns one device, and has no sockets and no disk to write to.
"""

import time
import traceback
from multiprocessing.connection import Connection

import torch

from model.errors import ModelRefused, NoSuchDevice
from server.worker.messages import Beat, Died, Happened, Ready, Refused, Start
from server.worker.models import Engines

BEAT_S = 0.25
LOOK_S = 0.01  # how often it is looked whether a net has been built, while nothing else is to be done


def serve(pipe: Connection, start: Start) -> None:
    """Runs until the other end of the pipe is closed."""
    try:
        _Process(pipe, start).run()
    except (ModelRefused, NoSuchDevice) as error:
        pipe.send(Refused(type(error).__name__, str(error)))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the API process is gone
    except Exception as error:  # the one place where whatever killed the engine can be told
        pipe.send(Died(_cause(error), traceback.format_exc()[-4000:]))


def _cause(error: Exception) -> str:
    """In a word, one of three (`Died.cause`). Nothing on a GPU works any more after an error of its own."""
    if isinstance(error, torch.OutOfMemoryError):
        return "memory"
    of_device = isinstance(error, torch.AcceleratorError) or any(name in str(error) for name in ("CUDA", "cuDNN"))
    return "cuda" if of_device else "failed"


class _Process:
    """The loop. While a model is made ready for its first step, the loop goes on in between."""

    def __init__(self, pipe: Connection, start: Start) -> None:
        self._pipe, self._beat_at, self._ready = pipe, 0.0, False
        self._engines = Engines(start, pipe.send, self._between)

    def run(self) -> None:
        """Until the pipe is closed."""
        engines = self._engines
        self._pipe.send(Ready(engines.served, engines.tell_steps()))
        self._ready = True
        while True:
            idle_s = LOOK_S if engines.loading else BEAT_S
            self._listen(0 if engines.busy else idle_s)
            engines.arrange()
            self._go_on()

    def _between(self) -> None:
        if self._ready:
            self._listen(0)
            self._go_on()

    def _listen(self, patience_s: float) -> None:
        while self._pipe.poll(patience_s):
            self._engines.handle(self._pipe.recv())
            patience_s = 0

    def _go_on(self) -> None:
        """One step of whatever is busy, and a sign of life."""
        pipe, engines = self._pipe, self._engines
        engines.distribute()
        if engines.busy:
            if begun := engines.seat():  # told before they are stepped: whoever sits there when it dies is known
                pipe.send(Happened([], engines.stats, begun))
            if events := engines.step():
                pipe.send(Happened(events, engines.stats))
        now = time.monotonic()
        if now - self._beat_at >= BEAT_S or engines.watched:
            pipe.send(Beat(engines.stats, engines.tell_steps(), engines.progress, engines.memory_bytes))
            self._beat_at = now
