"""The models of one device: which are loaded, what each is asked for, and their steps.

When there is not room for all, `server.worker.eviction` decides which are loaded; requests for others are held here. A
load is a generator that `arrange` advances by one piece per turn of the main loop: the others make a step meanwhile.
"""

import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import cast

import torch

from model.checkpoint.card import ModelCard
from model.engine.engine import Engine
from model.engine.events import ENDS, Cancelled, Event, Request, Stats
from model.errors import ModelRefused
from model.sampling.plan import plan
from server.worker.device import give_back, held_bytes, refuse
from server.worker.eviction import Eviction
from server.worker.loader import NO_MEMORY, Loader
from server.worker.messages import Cancel, Changed, Heartbeat, Loading, ModelStatus, Start, Step, Submit

HEARTBEAT_S = 0.25
SAME = ("rank", "frames", "shows_x", "shows_x0", "wants_floats", "owner")  # in a spec and in its requests
_plan = lru_cache(256)(plan)


class Models:
    """The models of one device. `tell` sends a message to the API process."""

    def __init__(self, start: Start, tell: Callable[[Loading | Changed], None]) -> None:
        self._start, self._tell, self._loader = start, tell, Loader(start)
        self.statuses: dict[str, ModelStatus] = {}
        self.watched: set[int] = set()  # samples of which every step is reported
        self.pause_s = HEARTBEAT_S  # for which an idle loop may wait for messages
        self._engines: dict[str, Engine] = {}
        self._cards: dict[str, ModelCard] = {}
        self._requests: dict[int, tuple[str, Request]] = {}  # (model, request) of each sample that has not ended
        self._held: dict[str, dict[int, Request]] = {}  # by model: what its engine has not been given
        self._recalled: set[int] = set()  # what an engine was given, and is to give back
        self._steps: list[Step] = []  # that have not been reported
        self._past = Stats()  # of engines that are gone
        self._load: Iterator[float] | None = None
        self._coming: str | None = None  # the model that is being loaded
        self._eviction = Eviction(start.memory_bytes, {})

    def start(self) -> Iterator[float]:
        """Loads all models there is room for; yields how long to wait before the next piece. Others may be refused:
        raises ModelRefused if the default one is, or all, unless this engine replaces another."""
        for name, directory in self._start.models:
            self._held[name] = {}
            try:
                card, status = yield from self._loader.announced(name, directory)
                self._eviction.require_room(name, status.memory_bytes)
            except ModelRefused as error:
                self._refuse(name, error)
            else:
                self._cards[name], self.statuses[name] = card, status
                self._eviction.sizes[name] = status.memory_bytes
        for name in filter(self._eviction.fits, self._cards):
            try:
                yield from self._bring(name)
            except (ModelRefused, torch.OutOfMemoryError) as error:
                self._refuse(name, error)
        troubles = [status.trouble for status in self.statuses.values()]
        if troubles and None not in troubles and not self._start.again:
            raise ModelRefused(str(troubles[0]))

    def _refuse(self, name: str, error: Exception) -> None:
        """At the start: notes why a model cannot be loaded. Raises the error if nothing is to be served without it."""
        again, short = self._start.again, isinstance(error, torch.OutOfMemoryError)  # which may pass
        if (short and (again or len(self._start.models) == 1)) or (not again and name == self._start.default):
            raise error
        if name in self.statuses:
            self._give_up(name, NO_MEMORY if short else str(error))
        elif not again:
            self.statuses[name] = refuse(str(error))

    def _bring(self, name: str) -> Iterator[float]:
        """Loads a model. Raises ModelRefused or torch.OutOfMemoryError."""
        loaded = yield from self._loader.load(self._cards[name], self.statuses[name].digest)
        self._eviction.require_room(name, loaded.status.memory_bytes)
        self.statuses[name], self._engines[name] = loaded.status, loaded.engine
        self._eviction.came(name, loaded.status.memory_bytes, time.monotonic(), loaded.status.load_s)
        self._steps += loaded.steps

    def _bring_for_requests(self, name: str) -> Iterator[float]:
        """Loads a model that is asked for, or gives it up."""
        self._tell(Loading(name))
        reason = ""
        try:
            yield from self._bring(name)
            self._hand_over(name)  # at once: a model with nothing to do would be the first to leave
        except ModelRefused as error:
            reason = str(error)
        except torch.OutOfMemoryError:
            if self._engines:  # it is tried once more, alone
                self._eviction.sizes[name] = self._eviction.budget_bytes
            else:
                reason = NO_MEMORY
        if reason:  # only now, when no traceback holds the model's memory
            self._give_up(name, reason)
        self._load = self._coming = None
        self._tell(Changed(name, self.statuses[name]))

    def _unload(self, name: str) -> None:
        """Forgets an engine that has nothing to do. If requests are held for it, it is asked for anew."""
        self._past += replace(self._engines.pop(name).stats, seated=0, waiting=0)
        self._eviction.drop(name)
        give_back(self._loader.device)
        self.statuses[name] = replace(self.statuses[name], loaded=False)
        self._tell(Changed(name, self.statuses[name]))
        if self._held[name]:
            self._eviction.ask(name, time.monotonic())

    def _give_up(self, name: str, reason: str) -> None:
        """Notes that a model cannot be loaded, and drops the requests for it."""
        for id in self._held[name]:
            self._forget(id)
        self._held[name].clear()
        self._eviction.drop(name)
        give_back(self._loader.device)
        self.statuses[name] = replace(self.statuses[name], trouble=reason)

    def arrange(self) -> None:
        """Between two steps: advances a load by one piece, or begins one; unloads what must make room."""
        if self._load is None and self._eviction.budget_bytes:
            self._make_room()
        if self._load is not None:
            self.pause_s = next(self._load, HEARTBEAT_S)

    def _make_room(self) -> None:
        leaving = self._eviction.leaving(self.busy)
        if set(self.busy).isdisjoint(leaving):
            for name in leaving:
                self._unload(name)
            if (wanted := self._eviction.next) is not None:
                self._load, self._coming = self._bring_for_requests(wanted), wanted

    # Requests

    def handle(self, message: Submit | Cancel) -> None:
        """Does what the API process asks."""
        if isinstance(message, Cancel):
            for id in message.ids:
                self._cancel(id)
            return
        spec = message.spec
        if self.statuses[spec.model].trouble is not None:
            return  # its sender hears of that, if it has not yet
        self.watched.update(message.ids if spec.alone else ())
        table = _plan(self._cards[spec.model].process, spec.sampling)
        known = self._cards[spec.model].labels
        same = {name: getattr(spec, name) for name in SAME}
        for id, seed in zip(message.ids, spec.seeds, strict=True):
            self._held[spec.model][id] = request = Request(id, seed, table, labels=spec.told(seed, known), **same)
            self._requests[id] = spec.model, request
        if self._eviction.budget_bytes:  # without a budget all were loaded at the start
            self._eviction.ask(spec.model, time.monotonic())

    def _cancel(self, id: int) -> None:
        if id not in self._requests:
            return
        model, _ = self._requests[id]
        self._recalled.discard(id)
        if self._held[model].pop(id, None) is not None:
            self._forget(id)
        elif model in self._engines:
            self._engines[model].cancel(id)
        if not self._held[model] and model in self._eviction.wanted and model != self._coming:
            self._eviction.drop(model)

    def distribute(self) -> None:
        """Gives loaded models what is held for them; one that must leave gives back what is not seated in its turn."""
        leaving = self._eviction.leaving(self.busy) if self._eviction.budget_bytes else ()
        for name in self._engines:
            if name not in leaving:
                self._hand_over(name)
            elif self._eviction.turn_is_over(name, time.monotonic()):
                self._recall(name)

    def _hand_over(self, name: str) -> None:
        for request in self._held[name].values():
            self._engines[name].submit(request)
        self._held[name].clear()

    def _recall(self, name: str) -> None:
        """Takes back what an engine has not seated."""
        seated = {id for id, _ in self._engines[name].progress}
        for id, (model, _) in self._requests.items():
            if model == name and id not in seated and id not in self._held[name]:
                self._recalled.add(id)
                self._engines[name].cancel(id)

    def _forget(self, id: int) -> None:
        del self._requests[id]
        self.watched.discard(id)

    # Steps

    @property
    def busy(self) -> list[str]:
        """The models that have something to do."""
        return [name for name, engine in self._engines.items() if engine.busy]

    def seat(self, models: Collection[str]) -> list[tuple[int, int]]:
        """Seats what waits for these models. -> (sample, updates done) of those just seated"""
        return [(cast(int, id), step) for name in models for id, step in self._engines[name].seat()]

    def step(self, models: Collection[str]) -> list[Event]:
        """One step of each of these models. -> what happened"""
        events = list[Event]()
        for name in models:
            engine, began = self._engines[name], time.monotonic()
            before = engine.stats
            events += engine.step()
            if engine.stats.steps > before.steps:
                bucket = engine.stats.slot_steps - before.slot_steps
                self._steps.append(Step(name, bucket, time.monotonic() - began))
        return [event for event in events if self._conclude(event)]

    def _conclude(self, event: Event) -> bool:
        """Notes what an event ends. Returns whether it is to be reported: a sample that was only taken back is not."""
        id = cast(int, event.id)
        if not isinstance(event, ENDS):
            return True
        taken_back = isinstance(event, Cancelled) and id in self._recalled
        self._recalled.discard(id)
        if taken_back:
            model, request = self._requests[id]
            self._held[model][id] = request
        else:
            self._forget(id)
        return not taken_back

    @property
    def stats(self) -> Stats:
        """The sum over all engines, present and past. Requests that are held wait, too."""
        held = Stats(waiting=sum(map(len, self._held.values())))
        return sum((engine.stats for engine in self._engines.values()), self._past + held)

    def heartbeat(self) -> Heartbeat:
        """How far the samples are, and which steps were done since this was last called."""
        progress = [(cast(int, id), step) for engine in self._engines.values() for id, step in engine.progress]
        steps, self._steps = self._steps, []
        return Heartbeat(steps, progress, held_bytes(self._loader.device))
