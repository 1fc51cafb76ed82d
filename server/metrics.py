"""Prometheus metrics.

Counters and gauges are read from the rest of the server at each scrape, all at one moment. Only the histograms and
what is counted by model and by key are kept here.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
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
MOST_NAMES, OTHER = 100, "other"  # values of a label that is a name; further names share one
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


@dataclass(slots=True)
class Usage:
    """What the jobs of one model, or of one key, have done."""

    jobs: Counter[str] = field(default_factory=lambda: Counter(succeeded=0, failed=0, cancelled=0))  # that have ended
    sample_steps: int = 0  # that engines have reported, those of an interrupted job each time
    steps_waiting: int = 0  # image-steps accepted and not yet done
    rejected: int = 0  # refused requests


class Breakdown:
    """Usage by a label whose values are names that the operator gave: the first MOST_NAMES of them, and OTHER."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._usages: dict[str, Usage] = {}

    def name(self, given: str) -> str:
        """The value of the label for a name, the same at every call."""
        return given if given in self._usages or len(self._usages) < MOST_NAMES else OTHER

    def of(self, given: str) -> Usage:
        """The usage of a name."""
        return self._usages.setdefault(self.name(given), Usage())

    def families(self) -> list[Family]:
        """The usages as ddpm_LABEL_NAME."""
        label = self._label
        jobs = CounterMetricFamily(
            f"ddpm_{label}_jobs", f"Ended jobs by {label} and outcome.", None, [label, "outcome"]
        )
        steps = CounterMetricFamily(f"ddpm_{label}_sample_steps", f"Image-steps made, by {label}.", None, [label])
        waiting = GaugeMetricFamily(
            f"ddpm_{label}_steps_waiting", f"Image-steps left to do, by {label}.", None, [label]
        )
        for name, usage in sorted(self._usages.items()):
            for outcome, count in sorted(usage.jobs.items()):
                jobs.add_metric([name, outcome], count)
            steps.add_metric([name], usage.sample_steps)
            waiting.add_metric([name], usage.steps_waiting)
        return [jobs, steps, waiting]

    def rejected(self) -> Family:
        """Refused requests as ddpm_LABEL_rejected_total."""
        counts = {name: usage.rejected for name, usage in self._usages.items()}
        return counter(
            f"{self._label}_rejected", f"Refused requests for pictures, by {self._label}.", counts, self._label
        )


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
        self.by_model, self.by_key = Breakdown("model"), Breakdown("key")
        self._model_step_seconds = self._histogram(
            "model_step_seconds", "Duration of a step of a batch, by model.", STEP_S, "model"
        )
        self._model_queue_seconds = self._histogram(
            "model_queue_seconds", "From the acceptance of a job to its first step, by model.", WAIT_S, "model"
        )
        commit = "Duration of a journal transaction with its sync."
        self.journal_commit_seconds = self._histogram("journal_commit_seconds", commit, COMMIT_S)

    def _histogram(self, name: str, help: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"ddpm_{name}", help, labels, registry=self._registry, buckets=buckets)

    def steps_observed(self) -> tuple[float, float]:
        """How many steps there have been, and the seconds they took together."""
        of = {sample.name: sample.value for family in self.step_seconds.collect() for sample in family.samples}
        return of["ddpm_step_seconds_count"], of["ddpm_step_seconds_sum"]

    def watch(self, read: Callable[[], Iterable[Family]]) -> None:
        """Calls `read` at every scrape."""
        self.collect = read  # the name by which prometheus_client calls it
        self._registry.register(self)

    def show(self, models: Iterable[str]) -> None:
        """Shows models from the start on, so that their rates begin at zero."""
        for model in models:
            self.by_model.of(model)
            for histogram in (self._model_step_seconds, self._model_queue_seconds):
                histogram.labels(self.by_model.name(model))

    def usages(self, model: str, key: str | None) -> list[Usage]:
        """Where a job counts that is for this model and came with the key of this name, if keys are required."""
        return [self.by_model.of(model)] + ([self.by_key.of(key)] if key is not None else [])

    def observe_step(self, model: str, bucket: int, seconds: float) -> None:
        """Counts a step of a batch of `bucket` slots."""
        self.bucket_size.observe(bucket)
        self.step_seconds.observe(seconds)
        self._model_step_seconds.labels(self.by_model.name(model)).observe(seconds)

    def observe_wait(self, model: str, seconds: float) -> None:
        """Counts a job whose first step is made so long after its acceptance."""
        self.queue_seconds.observe(seconds)
        self._model_queue_seconds.labels(self.by_model.name(model)).observe(seconds)

    def render(self) -> bytes:
        """All metrics in Prometheus' text format. Call it on the event loop, where no value changes meanwhile."""
        return generate_latest(self._registry)
