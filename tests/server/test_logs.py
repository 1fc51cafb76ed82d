"""Logs as JSON lines."""

import json
import logging
import os
import time

import pytest

from server.logs import JsonLines, Lines


def test_a_log_record_is_one_line_whatever_it_contains() -> None:
    record = logging.makeLogRecord({"msg": "a\nb\x1b[0m\u2028", "levelname": "INFO", "request_id": "r\n1"})

    line = JsonLines().format(record)

    assert len(line.splitlines()) == 1
    assert json.loads(line)["request_id"] == "r\n1"


def test_a_log_that_nobody_reads_holds_nobody_up_and_says_later_how_much_was_lost() -> None:
    reader, writer = os.pipe()
    lines, record = Lines(writer), logging.makeLogRecord({"msg": "x" * 200, "levelname": "INFO"})
    lines.setFormatter(JsonLines())
    began = time.monotonic()

    for _ in range(1000):  # about four times what the pipe holds
        lines.emit(record)
    took_s, read = time.monotonic() - began, os.read(reader, 1 << 20)
    lines.emit(record)
    after = [json.loads(line) for line in os.read(reader, 1 << 20).splitlines()]

    assert took_s < 1
    assert 0 < read.count(b"\n") < 1000
    assert read.endswith(b"\n")
    assert [line["event"] for line in after] == ["log lines were lost", "x" * 200]
    assert after[0]["count"] == 1000 - read.count(b"\n")


def test_a_line_that_was_cut_off_ends_before_the_next() -> None:
    reader, writer = os.pipe()
    lines = Lines(writer)

    for letter in "ab":
        lines.emit(logging.makeLogRecord({"msg": letter * 100_000, "levelname": "INFO"}))
    os.read(reader, 1 << 20)
    lines.setFormatter(JsonLines())
    lines.emit(logging.makeLogRecord({"msg": "c", "levelname": "INFO"}))
    first, *after = os.read(reader, 1 << 20).splitlines()

    assert first == b""
    assert [json.loads(line)["event"] for line in after] == ["log lines were lost", "c"]


def test_a_log_whose_reader_has_gone_raises_nothing() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    lines = Lines(writer)

    lines.emit(logging.makeLogRecord({"msg": "x", "levelname": "INFO"}))


def test_a_line_that_is_taken_in_pieces_is_written_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    (reader, writer), usual = os.pipe(), os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: usual(descriptor, data[:7]))
    lines = Lines(writer)
    lines.setFormatter(JsonLines())

    for word in ("first", "second"):
        lines.emit(logging.makeLogRecord({"msg": word, "levelname": "INFO"}))

    assert [json.loads(line)["event"] for line in os.read(reader, 1 << 20).splitlines()] == ["first", "second"]
