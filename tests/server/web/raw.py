"""Raw bytes to a server and back, without a library that would correct them."""

import json
import os
import re
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager

STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")
HANDSHAKE = (
    "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


@contextmanager
def connected(port: int, patience_s: float = 20.0) -> Iterator[socket.socket]:
    """A connection to a server on this machine."""
    with socket.create_connection(("127.0.0.1", port), timeout=patience_s) as made:
        yield made


def rest(connection: socket.socket) -> bytes:
    """All that comes until the other end closes; what was cut off by a reset counts as far as it came."""
    received = bytearray()
    try:
        while data := connection.recv(1 << 16):
            received += data
    except ConnectionResetError:
        pass
    return bytes(received)


def say(connection: socket.socket, data: bytes) -> None:
    """Sends, as far as the other end listens."""
    try:
        connection.sendall(data)
    except (BrokenPipeError, ConnectionResetError):
        pass


def ask(port: int, data: bytes) -> bytes:
    """What a server answers to these bytes until it closes. They must make it close."""
    with connected(port) as connection:
        say(connection, data)
        return rest(connection)


def statuses(answer: bytes) -> list[int]:
    """The status of each response in these bytes."""
    return [int(status) for status in STATUS.findall(answer)]


def abort(connection: socket.socket) -> None:
    """Closes with a reset."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@contextmanager
def upgraded(port: int, path: str = "/generate/stream") -> Iterator[socket.socket]:
    """A websocket after its handshake, with the frames left to whoever uses it."""
    with connected(port) as connection:
        connection.sendall(HANDSHAKE.format(path=path).encode())
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += connection.recv(1)
        assert statuses(head) == [101], head
        yield connection


def frame(opcode: int, payload: bytes = b"", fin: bool = True, masked: bool = True, reserved: int = 0) -> bytes:
    """One websocket frame, as a client sends it."""
    first = fin << 7 | reserved << 4 | opcode
    size = len(payload)
    wide = b"\x7e" + struct.pack(">H", size) if size < 1 << 16 else b"\x7f" + struct.pack(">Q", size)
    length = bytes([size]) if size < 126 else wide
    if not masked:
        return bytes([first]) + length + payload
    key = os.urandom(4)
    mixed = bytes(byte ^ key[i % 4] for i, byte in enumerate(payload))
    return bytes([first, length[0] | 0x80]) + length[1:] + key + mixed


def close_codes(heard: bytes) -> list[int]:
    """The codes of the close frames among these frames of a server."""
    codes, place = [], 0
    while place + 2 <= len(heard):
        opcode, size = heard[place] & 15, heard[place + 1]
        place += 2
        if size >= 126:
            width = 2 if size == 126 else 8
            size, place = int.from_bytes(heard[place : place + width], "big"), place + width
        if opcode == 8:
            codes.append(int.from_bytes(heard[place : place + 2], "big"))
        place += size
    return codes


def request(
    target: str = "/generate", body: bytes = b"", method: str = "POST", host: str = "localhost", **headers: str
) -> bytes:
    """A well-formed request after whose answer the connection is closed."""
    lines = [f"{method} {target} HTTP/1.1", f"Host: {host}", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    if body:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def problem_in(answer: bytes) -> dict[str, object]:
    """The problem document in an answer."""
    found: dict[str, object] = json.loads(answer.partition(b"\r\n\r\n")[2])
    return found


def resident_bytes(pid: int) -> int:
    """The memory of a process that is in use."""
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_files(pid: int) -> int:
    """How many descriptors a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def settles(count: int, pid: int, patience_s: float = 30.0) -> bool:
    """Whether the open descriptors of a process come down to so many."""
    deadline = time.monotonic() + patience_s
    while open_files(pid) > count:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
