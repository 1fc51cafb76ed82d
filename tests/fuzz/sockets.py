"""Fuzzing of every route with raw bytes: whatever is said to the server, it does not fail, and goes on.

`python -m tests.fuzz.sockets --runs 20000` against a server of its own.
"""

import argparse
import json
import random
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.model.convert.directories import write_model
from tests.server.conftest import Server
from tests.server.web import hostile
from tests.server.web.raw import HANDSHAKE, abort, connected, frame, request, say, statuses

TARGETS = ["/", "/generate", "/jobs", "/jobs/x", "/jobs/x/images/0", "/jobs/x/trajectory", "/models", "/models/tiny"]
TARGETS += ["/v1/images/generations", "/v1/models", "/v1/models/tiny"]
TARGETS += ["/healthz", "/readyz", "/metrics", "/docs", "/openapi.json", "/static/app.js", "/nothing"]
METHODS = ["GET", "POST", "DELETE", "HEAD", "OPTIONS", "PUT"]
SOCKETS = ["/generate/stream", "/jobs/x/stream", "/nothing"]
BODIES = [
    *hostile.NOT_JSON,
    *hostile.NOT_A_REQUEST,
    *hostile.NOT_A_MODEL,
    b'{"steps": 1}',
    b'{"steps": 2, "n": 3}',
    b"{}",
]
HEADERS = [headers for headers, _ in hostile.BAD_HEADERS] + hostile.HARMLESS_HEADERS
SPLICES = [
    b"\r\n",
    b"\n",
    b"\r",
    b"\x00",
    b" ",
    b":",
    b"%",
    b"\xff",
    b"HTTP/1.1",
    b"\r\n\r\n",
    b"0\r\n\r\n",
    b";",
    b"-1",
]
SPLICES += [b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n", b"Host: localhost\r\n", b"A" * 9000]
PATIENCE_S = 0.3  # what is not answered by then will be told so, or is waited for in vain


def _start(chance: random.Random) -> bytes:
    """Something that is nearly a request."""
    kind = chance.random()
    if kind < 0.2:
        return chance.choice([*hostile.NOT_HTTP, *hostile.HEADLESS])
    if kind < 0.45:
        shake = HANDSHAKE.format(path=chance.choice(SOCKETS)).encode()
        said = [frame(chance.randrange(16), chance.choice(BODIES), chance.random() < 0.9) for _ in range(3)]
        return shake + b"".join(said)
    headers = {name.replace("-", "_"): value for name, value in chance.choice([{}, chance.choice(HEADERS)]).items()}
    headers.pop("Host", None)
    body = chance.choice(BODIES) if chance.random() < 0.5 else b""
    return request(chance.choice(TARGETS), body, chance.choice(METHODS), **headers)


def mutant(chance: random.Random) -> bytes:
    """A request with up to three things put into it, or cut out of it."""
    data = _start(chance)
    for _ in range(chance.randrange(4)):
        at = chance.randrange(len(data) + 1)
        data = (
            data[:at] + chance.choice([b"", chance.randbytes(2), *SPLICES]) + data[at + chance.choice([0, 0, 1, 9]) :]
        )
    return data


def converse(port: int, seed: int) -> list[int]:
    """Says one mutant, all at once or in two parts, and hears what is answered within a moment."""
    chance = random.Random(seed)
    data, heard = mutant(chance), bytearray()
    with connected(port, PATIENCE_S) as connection:
        cut = chance.choice([0, chance.randrange(len(data) + 1)])
        say(connection, data[:cut])
        say(connection, data[cut:])
        try:
            while part := connection.recv(1 << 16):
                heard += part
        except (TimeoutError, ConnectionResetError):
            pass
        if chance.random() < 0.5:
            abort(connection)
    return statuses(bytes(heard))


def fuzz(server: Server, runs: int, seed: int) -> Counter[int]:
    """So many conversations, sixteen at a time. -> how often each status was answered"""
    found: Counter[int] = Counter()
    with ThreadPoolExecutor(16) as pool:
        for number, given in enumerate(pool.map(lambda i: converse(server.port, seed + i), range(runs))):
            found.update(given)
            bad = [status for status in given if status >= 500 and status != 503]
            assert not bad, f"conversation {seed + number} was answered {bad}"
            if number % 500 == 499:
                assert server.client.get("/healthz").status_code == 200
    assert server.client.get("/healthz").status_code == 200
    assert server.process.poll() is None
    return found


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder) / "tiny")
        server = Server(Path(folder)).wait_until_ready()
        try:
            found = fuzz(server, arguments.runs, arguments.seed)
        finally:
            code, log = server.stop()
    assert (code, "Traceback" in log) == (0, False), log[-2000:]
    print(json.dumps({"runs": arguments.runs, "seed": arguments.seed, "statuses": dict(sorted(found.items()))}))


if __name__ == "__main__":
    main()
