"""Measures throughput as a client sees it: image-steps per second for 1, 2, 4, ... pictures at once."""

import time
from collections.abc import Sequence

from ddpm_client import Client

from model.usage import Parser
from server.cli import connect
from server.cli.progress import progress_bar
from server.errors import SettingsError


def main(arguments: Sequence[str]) -> int:
    """Prints a table. Returns the exit code."""
    parser = Parser("ddpm bench", description=__doc__)
    parser.add_argument("--model", metavar="NAME", help="the model (default: the server's first)")
    parser.add_argument("--steps", type=int, default=50, metavar="N", help="steps of each picture (50)")
    parser.add_argument("--times", type=int, default=3, metavar="N", help="repetitions; the fastest counts (3)")
    connect.add_arguments(parser)
    given = parser.parse_args(arguments)
    if given.times < 1:
        raise SettingsError("--times must be 1 or more")
    with progress_bar() as bar, connect.server(given, bar) as client:
        model = client.model(given.model) if given.model is not None else client.models()[0]
        runs, rows = model["runs"] or {}, []
        for size in (size for size in (1, 2, 4, 8, 16, 32, 64) if size <= runs.get("slots", 1)):
            bar.set_description_str(f"{size} at once")
            seconds = min(_time(client, model["name"], given.steps, size) for _ in range(given.times))
            rows.append((size, 1e3 * seconds / given.steps, size * given.steps / seconds))
    print(f"{model['name']}, {given.steps} steps, on {runs.get('device')} in {runs.get('dtype')}")
    print("pictures at once  ms per step  image-steps/s")
    for size, step_ms, rate in rows:
        print(f"{size:16}  {step_ms:11.2f}  {rate:13.1f}")
    return 0


def _time(client: Client, model: str, steps: int, n: int) -> float:
    """Seconds to make n pictures. The server draws their seed, so none of them is in its cache."""
    began = time.perf_counter()
    client.generate(model=model, steps=steps, n=n)
    return time.perf_counter() - began
