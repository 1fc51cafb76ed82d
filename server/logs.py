"""Logs on standard error: one JSON object per line and record."""

import asyncio
import json
import logging
import os
import select
import sys
import time
from contextvars import ContextVar

logger = logging.getLogger(__name__)
request_id: ContextVar[str] = ContextVar("request_id", default="")  # of the request that this task answers
PATIENCE_MS = 20  # that a line waits for room where it is written to
AT_ONCE = 4096  # bytes that a pipe takes whole if it takes any: PIPE_BUF
STANDARD = set(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "color_message"}


class JsonLines(logging.Formatter):
    """Formats a record with time, level, event, request id and the fields of `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        line: dict[str, object] = {"time": stamp, "level": record.levelname.lower(), "event": record.getMessage()}
        if id := request_id.get():
            line["request_id"] = id
        line |= {key: value for key, value in record.__dict__.items() if key not in STANDARD}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class Lines(logging.Handler):
    """Writes to a file descriptor, but never waits long for its reader.

    A log that nobody reads (a collector that hangs, a terminal after Ctrl-S) would else stop the server at the first
    line that does not fit into the pipe. What is not written is counted, and the count is the next line that is.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor, self._lost, self._torn = descriptor, 0, False
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)

    def emit(self, record: logging.LogRecord) -> None:
        """Writes a record, or counts it as lost."""
        try:
            if self._lost and self._write(self._loss()):
                self._lost = 0
            if self._lost or not self._write(self.format(record)):
                self._lost += 1
        except OSError:  # there is no reader any more, or the disk is full
            self._lost += 1

    def _loss(self) -> str:
        fields = {"levelno": logging.WARNING, "levelname": "WARNING", "msg": "log lines were lost", "count": self._lost}
        return self.format(logging.makeLogRecord(fields))

    def _write(self, line: str) -> bool:
        """Whether a line was written. If only its beginning was, the next one begins a line nevertheless."""
        text = ("\n" * self._torn + line + "\n").encode(errors="backslashreplace")
        while text:
            if not self._poll.poll(0 if self._lost else PATIENCE_MS):
                return False
            self._torn = True
            text = text[os.write(self._descriptor, text[:AT_ONCE]) :]  # it may take less, as on a disk that gets full
        self._torn = False
        return True


def report(task: "asyncio.Task[None]") -> None:
    """Logs an unforeseen error of a task that nobody awaits. It is a done callback."""
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("%s failed", task.get_name(), exc_info=error)


def configure(level: str) -> None:
    """Sends all logs of this process, from this level on, to standard error."""
    handler = Lines(sys.__stderr__.fileno()) if sys.__stderr__ is not None else logging.NullHandler()
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in ("uvicorn.access", "uvicorn.error"):  # at lower levels they log what clients send, such as keys
        logging.getLogger(name).setLevel(logging.ERROR)
