"""Logs as JSON lines."""

import json
import logging

from server.logs import JsonLines


def test_a_log_record_is_one_line_whatever_it_contains() -> None:
    record = logging.makeLogRecord({"msg": "a\nb\x1b[0m\u2028", "levelname": "INFO", "request_id": "r\n1"})

    line = JsonLines().format(record)

    assert len(line.splitlines()) == 1
    assert json.loads(line)["request_id"] == "r\n1"
