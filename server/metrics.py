"""Prometheus metrics.

Counters and gauges are read from the rest of the server at each scrape, all at one moment. Only the histograms are
kept here.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias

from prometheus_client import CollectorRegistry, Histogram, Info, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from server import __version__

MEDIA = CONTENT_TYPE_PLAIN_0_0_4
STEP_S = (0.0005, 0.001, 0.002, 0.004, 0.006, 0.008, 0.012, 0.016, 0.024, 0.032, 0.064, 0.128, 0.256, 0.512, 1, 2, 4, 8)
WAIT_S = (0.001, 0.005, 0.01, 0.02, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
COMMIT_S = (0.0001, 0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1, 2, 4)
BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024)
Family: TypeAlias = GaugeMetricFamily | CounterMetricFamily


def gauge(name: str, help: str, value: float) -> Family:
    """A gauge with its value: ddpm_NAME."""
    return GaugeMetricFamily(f"ddpm_{name}", help, value=value)


def counter(name: str, help: str, value: float | Mapping[str, float], label: str = "") -> Family:
    """A counter with its value, or with one for each value of a label: ddpm_NAME_total."""
    if not isinstance(value, Mapping):
        return CounterMetricFamily(f"ddpm_{name}", help, value=value)
    family = CounterMetricFamily(f"ddpm_{name}", help, labels=[label])
    for of, count in sorted(value.items()):
        family.add_metric([of], count)
    return family


class Metrics:
    """The histograms of a server, and the gauges and counters that `watch` was told to read."""

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

    def steps_observed(self) -> tuple[float, float]:
        """How many steps there have been, and the seconds they took together."""
        of = {sample.name: sample.value for family in self.step_seconds.collect() for sample in family.samples}
        return of["ddpm_step_seconds_count"], of["ddpm_step_seconds_sum"]

    def watch(self, read: Callable[[], Iterable[Family]]) -> None:
        """Calls `read` at every scrape."""
        self.collect = read  # the name by which prometheus_client calls it
        self._registry.register(self)

    def observe_step(self, bucket: int, seconds: float) -> None:
        """Counts a step of a batch of `bucket` slots."""
        self.bucket_size.observe(bucket)
        self.step_seconds.observe(seconds)

    def render(self) -> bytes:
        """All metrics in Prometheus' text format. Call it on the event loop, where no value changes meanwhile."""
        return generate_latest(self._registry)
