"""Measures how fast pictures are made, one at a time and several at once, as a client sees it."""

import time
from argparse import ArgumentParser
from collections.abc import Sequence

from ddpm_client import Client, Document

from server.cli import connect
from server.cli.progress import Bar
from server.errors import SettingsError


def main(arguments: Sequence[str]) -> int:
    """Prints a table. Returns the exit code."""
    parser = ArgumentParser("ddpm bench", description=__doc__)
    parser.add_argument("--model", metavar="NAME", help="which (default: the first that is served)")
    parser.add_argument("--steps", type=int, default=50, metavar="N", help="of each picture (50)")
    parser.add_argument("--times", type=int, default=3, metavar="N", help="how often; the fastest counts (3)")
    connect.add_arguments(parser)
    given = parser.parse_args(arguments)
    if given.times < 1:
        raise SettingsError("--times must be 1 or more")
    with Bar() as bar, connect.server(given, bar) as client:
        model = _model(client, given.model)
        runs, rows = model["runs"] or {}, []
        sizes = [size for size in (1, 2, 4, 8, 16, 32, 64) if size <= runs.get("slots", 1)]
        for size in sizes:
            bar.say(f"{size} at once")
            seconds = min(_time(client, model["name"], given.steps, size) for _ in range(given.times))
            rows.append((size, 1e3 * seconds / given.steps, size * given.steps / seconds))
    print(f"{model['name']}, {given.steps} steps, on {runs.get('device')} in {runs.get('dtype')}")
    print("pictures at once  ms per step  image-steps/s")
    for size, step_ms, rate in rows:
        print(f"{size:16}  {step_ms:11.2f}  {rate:13.1f}")
    return 0


def _model(client: Client, name: str | None) -> Document:
    return client.model(name) if name is not None else client.models()[0]


def _time(client: Client, model: str, steps: int, n: int) -> float:
    """Seconds until so many pictures are here. Their seed is drawn: none of them was made before."""
    began = time.perf_counter()
    client.generate(model=model, steps=steps, n=n)
    return time.perf_counter() - began
