"""The jobs that an engine has on board or is to have: who reads their events, and what of them has not ended."""

import asyncio
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

from model.engine.events import ENDS, Event
from server.engines.backend import Progress, SampleEvent
from server.engines.quarantine import Quarantine
from server.errors import SampleLost
from server.worker.messages import Spec


@dataclass(slots=True, eq=False)
class Stream:
    """A spec that is being run."""

    spec: Spec
    index: dict[int, int]  # sample id -> index of its seed, for samples that have not ended
    events: asyncio.Queue[SampleEvent | Exception] = field(default_factory=asyncio.Queue)
    aboard: bool = False  # whether the engine that lives has been told of it


@dataclass(frozen=True, slots=True)
class Loss:
    """What the death of an engine was to those on board."""

    again: int  # so many were there, and will be run again
    tried: bool  # whether a suspect was seated, alone: then the death is held against it
    explained: bool  # whether somebody has been found guilty


@dataclass(slots=True)
class InFlight:
    """Of one engine, and of those that replace it."""

    suspects: Quarantine[Stream] = field(default_factory=Quarantine)
    _streams: dict[int, Stream] = field(default_factory=dict)  # by sample id
    _seated: dict[int, int] = field(default_factory=dict)  # updates done, by sample, of those that are, as is known
    _ids: "itertools.count[int]" = field(default_factory=itertools.count)

    @property
    def all(self) -> list[Stream]:
        """Those that have not ended."""
        return list(dict.fromkeys(self._streams.values()))

    def of(self, model: str) -> list[Stream]:
        """Those of a model."""
        return [stream for stream in self.all if stream.spec.model == model]

    def enter(self, spec: Spec) -> Stream:
        """A new one."""
        stream = Stream(spec, {next(self._ids): i for i in range(len(spec.seeds))})
        self._streams.update(dict.fromkeys(stream.index, stream))
        return stream

    def leave(self, stream: Stream) -> tuple[int, ...]:
        """Nobody reads it any more. -> its samples that have not ended"""
        left = tuple(stream.index)
        for id in left:
            del self._streams[id]
        return left

    def next(self, waiting: Iterable[Stream]) -> list[Stream]:
        """Who of those that wait may go on board; but while there are suspects, one of them at a time, nobody else."""
        suspects = self.suspects.all
        if any(stream.aboard for stream in suspects):
            return []
        return suspects[:1] or [stream for stream in waiting if not stream.aboard]

    def hear(self, event: Event) -> Stream | None:
        """Hands an event to its reader. -> the stream, if it has ended by it"""
        id = cast(int, event.id)
        stream = self._streams.get(id)
        if stream is None:
            return None
        told = replace(event, id=stream.index[id])
        if isinstance(event, ENDS):
            del stream.index[id], self._streams[id]
            self._seated.pop(id, None)
        stream.events.put_nowait(told)
        return None if stream.index else stream

    def sit(self, progress: Sequence[tuple[int, int]], alone: bool) -> None:
        """So far are these samples: (id, updates done). alone: nobody else is seated."""
        if alone:
            self._seated.clear()
        self._seated.update(progress)
        steps: dict[Stream, dict[int, int]] = {}
        for id, step in progress:
            if (stream := self._streams.get(id)) is not None:
                steps.setdefault(stream, {})[stream.index[id]] = step
        for stream, of_samples in steps.items():
            stream.events.put_nowait(Progress(of_samples))

    def perish(self) -> Loss:
        """The engine has died. All will be run again, but for what has killed it."""
        seated: dict[Stream, set[tuple[int, int]]] = {}
        for id, step in self._seated.items():
            if (stream := self._streams.get(id)) is not None:
                seated.setdefault(stream, set()).add((stream.index[id], step))
        tried = not seated.keys().isdisjoint(self.suspects.all)
        guilty = self.suspects.died({stream: frozenset(place) for stream, place in seated.items()})
        self._seated.clear()
        again = sum(stream.aboard and stream not in guilty for stream in self.all)
        for stream in self.all:
            stream.aboard = False
        for stream in guilty:
            stream.events.put_nowait(SampleLost("the engine died each time it came to the same step of this job"))
        return Loss(again, tried, bool(guilty))

    def tell(self, streams: Iterable[Stream], event: SampleEvent | Exception) -> None:
        """Tells these something."""
        for stream in streams:
            stream.events.put_nowait(event)
