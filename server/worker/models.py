"""The engines of one device, by model: `server.worker.eviction` says which are loaded, and who waits is held here.

A model is read and built in a thread, while the others make their steps. Captures and checks are made between those
steps, one at a time.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import cast

import torch

from model.checkpoint.card import ModelCard, read_card
from model.engine.engine import Engine
from model.engine.events import ENDS, Cancelled, Event, Request, Stats
from model.errors import ModelRefused
from model.sampling.plan import Plan, Sampling, plan
from model.sampling.schedule import Process
from server.worker import device
from server.worker.eviction import Eviction
from server.worker.loader import Arrival, Loader
from server.worker.messages import Cancel, Changed, Loading, ModelStatus, Start, Step, Submit


@lru_cache(256)
def _plan(process: Process, sampling: Sampling) -> Plan:
    return plan(process, sampling)


class Engines:
    """The engines of one device. `tell`: to the API process. `between`: between two pieces of a load."""

    def __init__(self, start: Start, tell: Callable[[Loading | Changed], None], between: Callable[[], None]) -> None:
        self._loader, self._tell = Loader(start, between), tell
        self.device = self._loader.device
        self.engines: dict[str, Engine] = {}
        self.served: dict[str, ModelStatus] = {}
        self.taken: list[Step] = []  # since they were last told
        self.watched: set[int] = set()  # samples of which every step is told
        self._cards: dict[str, ModelCard] = {}
        self._requests: dict[int, Request] = {}  # that have not ended
        self._models: dict[int, str] = {}  # which model they are of
        self._held: dict[str, dict[int, Request]] = {}  # by model: what its engine has not been given
        self._recalled: set[int] = set()  # what an engine was given, and is to give back
        self._past = Stats()  # of engines that are gone
        self._arrival: Arrival | None = None
        self.eviction = Eviction(start.memory_bytes, {})
        for name, directory in start.models:
            try:
                self._cards[name], self._held[name] = read_card(directory, name), {}
                self.served[name] = self._announce(name)
            except ModelRefused:
                if not start.again:
                    raise
                self._cards.pop(name, None)  # the others go on; whoever started this one again misses it
        for name in self._cards:
            if self.eviction.fits(name):
                try:
                    self._settle(self._send_for(name))
                except ModelRefused as error:
                    if not start.again:
                        raise
                    self._give_up(name, str(error))

    def _announce(self, name: str) -> ModelStatus:
        """What is known of a model before it is loaded. Raises ModelRefused if it never can be."""
        served = self._loader.announce(self._cards[name])
        self._require_room(name, served.memory_bytes)
        self.eviction.sizes[name] = served.memory_bytes
        return served

    def _require_room(self, name: str, size_bytes: int) -> None:
        budget_bytes = self.eviction.budget_bytes
        if budget_bytes and size_bytes > budget_bytes:
            raise ModelRefused(f"{name} takes {size_bytes} bytes, models may take {budget_bytes}")

    # Loading and unloading

    def _send_for(self, name: str) -> Arrival:
        return self._loader.begin(self._cards[name], self.served[name].digest)

    def _settle(self, arrival: Arrival) -> None:
        """Ends a load. Raises ModelRefused or torch.OutOfMemoryError."""
        name, arrived = arrival.name, self._loader.finish(arrival)
        self._require_room(name, arrived.served.memory_bytes)
        self.served[name], self.engines[name] = arrived.served, arrived.engine
        self.eviction.came(name, arrived.served.memory_bytes, time.monotonic(), arrived.served.load_s)
        self.taken += arrived.steps

    def _unload(self, name: str) -> None:
        """Forgets an engine that has nothing to do. What is held for it is asked for anew."""
        self._past = _sum([self._past, replace(self.engines.pop(name).stats, seated=0, waiting=0)])
        self.eviction.drop(name)
        device.give_back(self.device)
        self.served[name] = replace(self.served[name], loaded=False)
        self._tell(Changed(name, self.served[name]))
        if self._held[name]:
            self.eviction.ask(name, time.monotonic())

    def _give_up(self, name: str, reason: str) -> None:
        """A model cannot be loaded, and whoever asked for it hears of it."""
        for id in self._held[name]:
            self._forget(id)
        self._held[name].clear()
        self.eviction.drop(name)
        device.give_back(self.device)
        self.served[name] = replace(self.served[name], trouble=reason)

    def arrange(self) -> None:
        """Between two steps: lets models come and go."""
        arrival = self._arrival
        if arrival is not None:
            if arrival.net.done():
                self._let_in(arrival)
                self._arrival = None
            return
        leaving = self.eviction.leaving(self._busy)
        if not self._busy.intersection(leaving):
            for name in leaving:
                self._unload(name)
            if (wanted := self.eviction.next) is not None:
                self._tell(Loading(wanted))
                self._arrival = self._send_for(wanted)

    def _let_in(self, arrival: Arrival) -> None:
        name, reason = arrival.name, None
        try:
            self._settle(arrival)
            self._hand_over(name, self.engines[name])  # at once: one with nothing to do would be the first to leave
        except ModelRefused as error:
            reason = str(error)
        except torch.OutOfMemoryError:
            reason = "the memory of the device is too small for it"
            if self.engines and self.eviction.budget_bytes:  # it gets one more chance, alone
                self.eviction.sizes[name], reason = self.eviction.budget_bytes, None
        if reason is not None:
            self._give_up(name, reason)
        self._tell(Changed(name, self.served[name]))

    def distribute(self) -> None:
        """Gives models that are here what is held for them, but for those who must leave; their turn may be over."""
        leaving = self.eviction.leaving(self._busy)
        for name, engine in self.engines.items():
            if name not in leaving:
                self._hand_over(name, engine)
            elif self.eviction.turn_is_over(name, time.monotonic()):
                self._recall(name, engine)

    def _hand_over(self, name: str, engine: Engine) -> None:
        for request in self._held[name].values():
            engine.submit(request)
        self._held[name].clear()

    def _recall(self, name: str, engine: Engine) -> None:
        """Takes back what an engine has not seated."""
        if not engine.stats.waiting:
            return
        seated = {id for id, _ in engine.progress}
        for id, model in self._models.items():
            if model == name and id not in seated and id not in self._held[name]:
                self._recalled.add(id)
                engine.cancel(id)

    # What is asked, and what comes of it

    @property
    def _busy(self) -> set[str]:
        return {name for name, engine in self.engines.items() if engine.busy}

    @property
    def busy(self) -> bool:
        """Whether any engine has something to do."""
        return any(engine.busy for engine in self.engines.values())

    @property
    def loading(self) -> bool:
        """Whether a model is on its way into memory."""
        return self._arrival is not None

    @property
    def stats(self) -> Stats:
        """The sum over all engines there are and were. Who is held waits, too."""
        held = Stats(waiting=sum(map(len, self._held.values())))
        return _sum([self._past, held, *(engine.stats for engine in self.engines.values())])

    @property
    def progress(self) -> list[tuple[int, int]]:
        """(sample, updates done) of all that are seated."""
        return [(cast(int, id), step) for engine in self.engines.values() for id, step in engine.progress]

    def handle(self, message: Submit | Cancel) -> None:
        """What the API process wants."""
        if isinstance(message, Cancel):
            for id in message.ids:
                self._cancel(id)
            return
        spec = message.spec
        if self.served[spec.model].trouble is not None:
            return  # its sender hears of that, if it has not yet
        self.watched.update(message.ids if message.watched else ())
        table = _plan(self._cards[spec.model].process, spec.sampling)
        for id, seed in zip(message.ids, spec.seeds, strict=True):
            shown = (spec.frames, spec.shows_x, spec.shows_x0, spec.wants_floats)
            self._models[id] = spec.model
            self._requests[id] = Request(id, seed, table, spec.rank, *shown, spec.owner)
            self._held[spec.model][id] = self._requests[id]
        self.eviction.ask(spec.model, time.monotonic())

    def _cancel(self, id: int) -> None:
        model = self._models.get(id)
        if model is None:
            return
        self._recalled.discard(id)
        if self._held[model].pop(id, None) is not None:
            self._forget(id)
        elif model in self.engines:
            self.engines[model].cancel(id)
        if not self._held[model] and model in self.eviction.wanted and not self._is_coming(model):
            self.eviction.drop(model)

    def _is_coming(self, model: str) -> bool:
        return self._arrival is not None and self._arrival.name == model

    def _forget(self, id: int) -> None:
        del self._models[id], self._requests[id]
        self.watched.discard(id)

    @property
    def memory_bytes(self) -> int:
        """Memory of the device that is held."""
        return device.held_bytes(self.device)

    def tell_steps(self) -> list[Step]:
        """The steps done since this was last asked."""
        told, self.taken = self.taken, []
        return told

    def seat(self) -> list[tuple[int, int]]:
        """Seats who waits. -> (sample, updates done) of those who have just sat down"""
        return [(cast(int, id), step) for engine in self.engines.values() for id, step in engine.seat()]

    def step(self) -> list[Event]:
        """One step of every engine that is busy. -> what happened"""
        events = list[Event]()
        for name, engine in self.engines.items():
            if engine.busy:
                before, began = engine.stats, time.monotonic()
                events += engine.step()
                if engine.stats.steps > before.steps:
                    bucket = engine.stats.slot_steps - before.slot_steps
                    self.taken.append(Step(name, bucket, time.monotonic() - began))
        return [event for event in events if self._conclude(event)]

    def _conclude(self, event: Event) -> bool:
        """Notes what an event ends. Whether anybody else need hear of it: not if a sample was only taken back."""
        id = cast(int, event.id)
        if not isinstance(event, ENDS):
            return True
        if isinstance(event, Cancelled) and id in self._recalled:
            self._held[self._models[id]][id] = self._requests[id]
            self._recalled.discard(id)
            return False
        self._recalled.discard(id)
        self._forget(id)
        return True


def _sum(each: list[Stats]) -> Stats:
    return Stats(*(sum(getattr(stats, name) for stats in each) for name in Stats.__slots__))
