"""Lists models: those of the server at --url, or without it those in DDPM_WEIGHTS, which a server here would serve."""

import os
import sys
from collections.abc import Mapping, Sequence

from ddpm_client import Document

from model.usage import Parser
from server.cli import connect
from server.cli.progress import progress_bar

COLUMNS = ("name", "shape", "labels", "T", "steps", "prediction", "device", "dtype", "exact", "digest")
DIGEST = len("sha256:") + 12  # characters of a digest that are printed


def main(arguments: Sequence[str]) -> int:
    """Prints a table. Returns the exit code."""
    parser = Parser("ddpm models", description=__doc__)
    connect.add_arguments(parser)
    given = parser.parse_args(arguments)
    if given.url is None:
        rows, refused = _local()
    else:
        with progress_bar() as bar, connect.server(given, bar) as client:
            models = client.models()
            rows = [_row(model) for model in models]
            for model in models:
                _tell_refused(model["name"], {each["name"]: each["reason"] for each in model.get("refused_plans", ())})
            refused = {model["name"]: model["reason"] for model in client.refused_models()}
    for name, reason in refused.items():
        print(f"{name} is refused: {reason}", file=sys.stderr)
    table = [COLUMNS, *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(COLUMNS))]
    for row in table:
        print("  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _tell_refused(model: str, plans: Mapping[str, str]) -> None:
    for name, reason in plans.items():
        print(f"{model}: plan {name} is refused: {reason}", file=sys.stderr)


def _row(model: Document) -> tuple[str, ...]:
    shape, runs = model["shape"], model["runs"] or {}
    size = f"{shape['channels']}x{shape['height']}x{shape['width']}"
    labels = model.get("labels")
    count = labels["count"] if labels else "-"
    known = (str(count), str(model["T"]), str(model["default_steps"]), model["prediction"])
    exact = ("yes" if runs["exact"] else "no") if runs else "-"
    loaded = (runs.get("device", "-"), runs.get("dtype", "-"), exact)
    return (model["name"], size, *known, *loaded, (model["digest"] or "-")[:DIGEST])


def _local() -> tuple[list[tuple[str, ...]], Mapping[str, str]]:
    """The rows of the models in DDPM_WEIGHTS, and why others there are refused."""
    from model.checkpoint.weighing import told
    from server.catalog import find_models
    from server.settings import Settings

    rows: list[tuple[str, ...]] = []
    found = find_models(Settings.read(os.environ).weights)
    for card in found.values():
        _tell_refused(card.name, card.process.refused_plans)
        if card.left:
            print(f"{card.name}: {told(card.taken, card.left)}", file=sys.stderr)
        channels, height, width = card.shape
        process = card.process
        labels = str(len(card.labels.choices)) if card.labels is not None else "-"
        known = (labels, str(process.schedule.T), str(process.default_steps), process.prediction)
        rows.append((card.name, f"{channels}x{height}x{width}", *known, "-", "-", "-", card.digest[:DIGEST]))
    return rows, found.refused
