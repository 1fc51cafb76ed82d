"""Logs on standard error: one JSON object per line and record."""

import asyncio
import json
import logging
import sys
import time
from contextvars import ContextVar

logger = logging.getLogger(__name__)
request_id: ContextVar[str] = ContextVar("request_id", default="")  # of the request that this task answers
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


def report(task: "asyncio.Task[None]") -> None:
    """Logs an unforeseen error of a task that nobody awaits. It is a done callback."""
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("%s failed", task.get_name(), exc_info=error)


def configure(level: str) -> None:
    """Sends all logs of this process, from this level on, to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in ("uvicorn.access", "uvicorn.error"):  # at lower levels they log what clients send, such as keys
        logging.getLogger(name).setLevel(logging.ERROR)
