"""Prometheus metrics.

Counters and gauges are read from the rest of the server at each scrape, all at one moment: each is a field of
`MetricValues`. Only the histograms are kept here.
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
class MetricValues:
    """All gauges and counters at one moment. The field `x` is the metric ddpm_x, or ddpm_x_total for a counter.

    jobs_accepted = the sum of jobs + jobs_running + jobs_waiting, always.
    """

    jobs_running: int = _gauge("Jobs with a picture that has been started.")
    jobs_waiting: int = _gauge("Jobs that wait for a slot.")
    steps_waiting: int = _gauge("Image-steps left to do of all accepted jobs, waiting and running.")
    slots: int = _gauge("Slots of all loaded models: pictures that can be denoised at once.")
    slots_used: int = _gauge("Slots in use: pictures being denoised.")
    viewers: int = _gauge("Clients that watch a job.")
    ready: bool = _gauge("1 if jobs are accepted, as /readyz reports.")
    engine_up: bool = _gauge("1 if the engine accepts jobs.")
    engine_heartbeat_age_seconds: float = _gauge("Seconds since the last heartbeat of the engine.")
    gpu_memory_bytes: int = _gauge("Device memory that the engine holds.")
    storage_full: bool = _gauge("1 if the store cannot be written.")
    store_bytes: int = _gauge("Size of jobs and pictures on disk.")
    jobs_accepted: int = _counter("Accepted jobs.")
    jobs: Mapping[str, int] = _counter("Ended jobs by outcome.", label="outcome")
    rejected: Mapping[str, int] = _counter("Refused requests by error code.", label="reason")
    sample_steps: int = _counter("Denoising steps of single pictures.")
    engine_steps: int = _counter("Denoising steps of a batch.")
    padded_slots: int = _counter("Slots that were computed as padding of a batch.")
    out_of_memory: int = _counter("Times that device memory ran out, which reduces the batch size.")
    engine_restarts: Mapping[str, int] = _counter("Engine restarts by cause.", label="cause")
    jobs_replayed: int = _counter("Jobs that were run again after an engine restart.")
    frames: int = _counter("Frames kept for clients that watch.")
    frames_dropped: int = _counter("Frames that slow clients missed.")
    replay_mismatch: int = _counter("Pictures with other bytes than the same picture had before.")
    cache_hits: int = _counter("Jobs answered with stored pictures of an equal job.")


class Metrics:
    """The histograms of a server, and the values that `watch` was told to read."""

    def __init__(self) -> None:
        disable_created_metrics()  # which add a timestamp to every counter
        self._registry = CollectorRegistry(auto_describe=False)
        build = Info("ddpm_build", "The version of the server.", registry=self._registry)
        build.info({"version": __version__})
        self.step_seconds = self._histogram("step_seconds", "Duration of a denoising step of a batch.", STEP_S)
        self.bucket_size = self._histogram("bucket_size", "Slots computed in a step, padding included.", BATCHES)
        self.queue_seconds = self._histogram("queue_seconds", "From the acceptance of a job to its first step.", WAIT_S)
        self.refusal_seconds = self._histogram(
            "refusal_seconds", "From the arrival of a request to its refusal.", WAIT_S
        )
        self.job_seconds = self._histogram("job_seconds", "From the acceptance of a job to its end.", WAIT_S)
        commit = "Duration of a journal transaction with its sync."
        self.journal_commit_seconds = self._histogram("journal_commit_seconds", commit, COMMIT_S)

    def _histogram(self, name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"ddpm_{name}", help, registry=self._registry, buckets=buckets)

    def watch(self, read: Callable[[], MetricValues]) -> None:
        """Calls `read` at every scrape."""
        self._read = read
        self._registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """The metrics of the values. prometheus_client calls it at every scrape."""
        values = self._read()
        for field in dataclasses.fields(values):
            value, family, help = getattr(values, field.name), field.metadata["family"], field.metadata["help"]
            if not isinstance(value, Mapping):
                yield family(f"ddpm_{field.name}", help, value=value)
                continue
            labelled = family(f"ddpm_{field.name}", help, labels=[field.metadata["label"]])
            for label, count in sorted(value.items()):
                labelled.add_metric([label], count)
            yield labelled

    def observe_step(self, bucket: int, seconds: float) -> None:
        """Counts a step of a batch of `bucket` slots."""
        self.bucket_size.observe(bucket)
        self.step_seconds.observe(seconds)

    def render(self) -> bytes:
        """All metrics in Prometheus' text format. Call it on the event loop, where no value changes meanwhile."""
        return generate_latest(self._registry)
