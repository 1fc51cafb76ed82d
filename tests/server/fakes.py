"""A backend without an engine, which makes pictures of one grey level and which tests control; a reader of PNGs."""

import asyncio
import io
from collections.abc import AsyncGenerator, Sequence

import numpy as np
from PIL import Image

from model.engine.events import Finished, Picture, Preview, Stats
from server.engines.backend import Assigned, EngineHealth, SampleEvent
from server.errors import NotReady
from server.worker.messages import ModelStatus, Spec


def read_texts(data: bytes) -> dict[str, str]:
    """The text chunks of a PNG."""
    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        return {str(key): value for key, value in image.info.items() if isinstance(value, str)}


def grey(level: int) -> Picture:
    """A picture of one grey level (modulo 256)."""
    return np.full((8, 8, 1), level % 256, np.uint8)


class FakeBackend:
    """Makes picture i of grey level seed + i (modulo 256), when `gate` is open."""

    def __init__(self) -> None:
        tiny = ModelStatus(
            digest="sha256:0",
            device="cpu",
            dtype="float32",
            parameters=1,
            slots=4,
            buckets=[1, 2, 4],
            exact_buckets=[2, 4],
            admitted=[2, 4],
            exact=True,
            numerics="fake",
        )
        self.models = {"tiny": tiny}
        self.trouble: str | None = None
        self.health = EngineHealth(stats=Stats(), silence_s=0.0, memory_bytes=0, restarts={}, replayed=0)
        self.gate = asyncio.Event()
        self.gate.set()
        self.specs: list[Spec] = []
        self.given_up: list[Spec] = []
        self.failure: Exception | None = None

    async def start(self) -> None:
        """Nothing to load."""

    async def close(self) -> None:
        """Runs that wait end with NotReady."""
        self.failure = NotReady("the server is shutting down")
        self.gate.set()

    @property
    def replicas(self) -> list[dict[str, ModelStatus]]:
        """One engine."""
        return [self.models]

    def load_s(self, model: str) -> float:
        """Nothing to load."""
        return 0.0

    def step_s(self, model: str, buckets: Sequence[int]) -> list[float]:
        """Ten image-steps a second."""
        return [0.1 * batch for batch in range(buckets[-1] + 1)]

    async def run(self, spec: Spec) -> AsyncGenerator[SampleEvent]:
        """All pictures of `spec`."""
        self.specs.append(spec)
        done, samples = False, list(zip(spec.indices or range(len(spec.seeds)), spec.seeds, strict=True))
        try:
            if not self.models:  # a run waits for its engine
                await self.gate.wait()
            yield Assigned(self.models[spec.model])
            await self.gate.wait()
            for step in sorted(spec.frames):
                for i, seed in samples:
                    noisy = grey(seed + step)
                    yield Preview(i, step, noisy if spec.shows_x else None, noisy if spec.shows_x0 and step else None)
                    await asyncio.sleep(0)
            if self.failure is not None:
                raise self.failure
            for i, seed in samples:
                floats = np.full((1, 8, 8), seed / 256, np.float32) if spec.wants_floats else None
                yield Finished(i, grey(seed), floats)
            done = True
        finally:
            if not done:
                self.given_up.append(spec)
