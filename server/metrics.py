"""What a Prometheus scrape shows.

Counts live where the counted things do and are read at the scrape, all at one moment: a metric is a field of
`Standing`. Only times, which are nobody's state, are kept here, in histograms.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Histogram, Info, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from server import __version__

MEDIA = CONTENT_TYPE_PLAIN_0_0_4
STEP_S = (0.0005, 0.001, 0.002, 0.004, 0.006, 0.008, 0.012, 0.016, 0.024, 0.032, 0.064, 0.128, 0.256, 0.512, 1, 2, 4, 8)
WAIT_S = (0.001, 0.005, 0.01, 0.02, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
COMMIT_S = (0.0001, 0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1, 2, 4)
BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024)


def _gauge(help: str) -> Any:
    return dataclasses.field(metadata={"family": GaugeMetricFamily, "help": help})


def _counter(help: str, label: str = "") -> Any:
    return dataclasses.field(metadata={"family": CounterMetricFamily, "help": help, "label": label})


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Where the server stands at one moment. Field `x` is the metric ddpm_x, and ddpm_x_total if it only grows.

    jobs_accepted = the sum of jobs + jobs_running + jobs_waiting, always.
    """

    jobs_running: int = _gauge("jobs of which a picture has been begun")
    jobs_waiting: int = _gauge("jobs that wait for a slot")
    steps_waiting: int = _gauge("image-steps accepted and not yet done, those of running jobs too")
    slots: int = _gauge("pictures that fit into a batch, over all models")
    slots_used: int = _gauge("pictures that are being denoised")
    viewers: int = _gauge("streams that are being watched")
    ready: bool = _gauge("whether work is taken, as /readyz says")
    engine_up: bool = _gauge("whether the engine takes work")
    engine_heartbeat_age_seconds: float = _gauge("time since the engine's last sign of life")
    gpu_memory_bytes: int = _gauge("device memory the engine holds")
    storage_full: bool = _gauge("whether nothing can be written to the store")
    store_bytes: int = _gauge("what jobs and pictures take on disk")
    jobs_accepted: int = _counter("jobs taken on")
    jobs: Mapping[str, int] = _counter("jobs that have ended", label="outcome")
    rejected: Mapping[str, int] = _counter("requests for pictures that were refused", label="reason")
    sample_steps: int = _counter("image-steps done")
    engine_steps: int = _counter("steps of a batch done")
    padded_slots: int = _counter("slots that a step computed for nobody")
    out_of_memory: int = _counter("times device memory ran out, after which the batch was smaller")
    engine_restarts: Mapping[str, int] = _counter("engines replaced", label="cause")
    jobs_replayed: int = _counter("jobs that were run again because an engine was replaced")
    frames: int = _counter("frames kept for viewers")
    frames_dropped: int = _counter("frames that slow viewers missed")
    replay_mismatch: int = _counter("pictures that came out with other bytes than before")
    cache_hits: int = _counter("jobs that were answered with pictures of before")


def _families(standing: Standing) -> Iterator[Metric]:
    for field in dataclasses.fields(standing):
        value, family, help = getattr(standing, field.name), field.metadata["family"], field.metadata["help"]
        if not isinstance(value, Mapping):
            yield family(f"ddpm_{field.name}", help, value=value)
            continue
        labelled = family(f"ddpm_{field.name}", help, labels=[field.metadata["label"]])
        for word, count in sorted(value.items()):
            labelled.add_metric([word], count)
        yield labelled


@dataclass(frozen=True, slots=True, eq=False)
class _Collector:
    read: Callable[[], Standing]

    def collect(self) -> Iterator[Metric]:
        """What prometheus_client asks at every scrape."""
        return _families(self.read())


class Metrics:
    """The histograms of a server, and whatever `watch` was given to read."""

    def __init__(self) -> None:
        disable_created_metrics()  # a timestamp beside every count, which nobody asked for
        self._registry = CollectorRegistry(auto_describe=False)
        build = Info("ddpm_build", "which version of the server this is", registry=self._registry)
        build.info({"version": __version__})
        self.step_seconds = self._histogram("step_seconds", "time of a step of a batch", STEP_S)
        self.bucket_size = self._histogram("bucket_size", "slots that a step computed", BATCHES)
        self.queue_seconds = self._histogram("queue_seconds", "from the acceptance of a job to its first step", WAIT_S)
        self.refusal_seconds = self._histogram("refusal_seconds", "from a request's arrival to its refusal", WAIT_S)
        self.job_seconds = self._histogram("job_seconds", "from the acceptance of a job to its end", WAIT_S)

        self.journal_commit_seconds = self._histogram(
            "journal_commit_seconds", "time of a transaction of the journal with its sync", COMMIT_S
        )

    def _histogram(self, name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"ddpm_{name}", help, registry=self._registry, buckets=buckets)

    def watch(self, read: Callable[[], Standing]) -> None:
        """`read` is asked at every scrape."""
        self._registry.register(_Collector(read))

    def took(self, bucket: int, seconds: float) -> None:
        """A step of a batch was done."""
        self.bucket_size.observe(bucket)
        self.step_seconds.observe(seconds)

    def render(self) -> bytes:
        """Everything in Prometheus' text format. Call it on the event loop: then nothing changes meanwhile."""
        return generate_latest(self._registry)
