"""What the flows decide, without a server and without waiting: a test performs the effects itself."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from ddpm_client import Busy, Ended, Event, Refused, Started, TimedOut, Unreachable
from ddpm_client import protocol as flows
from ddpm_client.errors import ClientError, Response
from ddpm_client.protocol import Close, Effect, Flow, Receive, Reply, Retry, Send, Sleep, Subscription

Answer = Callable[[Effect], Reply | ClientError]


@dataclass
class Performer:
    """Performs a flow: asks `answer` for each reply, and lets a clock run instead of sleeping."""

    answer: Answer
    now: float = 0.0
    effects: list[Effect] = field(default_factory=list)

    def run(self, flow: Flow[Any]) -> Any:
        """The flow's result."""
        reply: Reply | ClientError = None
        while True:
            try:
                effect = flow.throw(reply) if isinstance(reply, ClientError) else flow.send(reply)
            except StopIteration as end:
                return end.value
            self.effects.append(effect)
            if isinstance(effect, Sleep):
                self.now += effect.seconds
            reply = None if isinstance(effect, Sleep | Close) else self.answer(effect)

    def seen(self, kind: type[Effect]) -> list[Any]:
        """The effects of one kind."""
        return [effect for effect in self.effects if isinstance(effect, kind)]


@pytest.fixture
def performer(monkeypatch: pytest.MonkeyPatch) -> Performer:
    """A performer whose clock is the flows' clock. Nobody answers until its `answer` is set."""
    made = Performer(lambda effect: Unreachable("nobody there"))
    monkeypatch.setattr("ddpm_client.protocol.time.monotonic", lambda: made.now)
    monkeypatch.setattr("ddpm_client.protocol.random.uniform", lambda low, high: 1.0)
    return made


def in_turn(*replies: Reply | ClientError) -> Answer:
    """Answers with these, one after the other."""
    left: Iterator[Reply | ClientError] = iter(replies)
    return lambda effect: next(left)


def said(type: str, seq: int, **more: Any) -> str:
    """A message of job `j`."""
    return json.dumps({"type": type, "job": "j", "seq": seq, **more})


ACCEPTED = Response(202, {}, b'{"id": "j"}')
ENDED = said("cancelled", 2, document={"status": "cancelled"})


def busy(retry_after_s: int) -> Response:
    """The server's refusal for now."""
    return Response(503, {"retry-after": str(retry_after_s)}, b"")


def test_pauses_grow_until_the_deadline_and_the_last_error_is_raised(performer: Performer) -> None:
    with pytest.raises(Unreachable, match="nobody there"):
        performer.run(flows.fetch(10, "/models"))

    assert [effect.seconds for effect in performer.seen(Sleep)] == [0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0, 2.0]
    assert all(effect.timeout_s <= 10 for effect in performer.seen(Send))


def test_a_busy_server_is_asked_again_when_it_said(performer: Performer) -> None:
    performer.answer = in_turn(busy(7), Response(200, {}, b'{"models": []}'))

    assert performer.run(flows.fetch(10, "/models")) == {"models": []}
    assert performer.seen(Sleep) == [Sleep(7)]


def test_a_server_that_is_busy_for_longer_than_the_timeout_is_not_waited_for(performer: Performer) -> None:
    performer.answer = in_turn(busy(11))
    with pytest.raises(Busy) as refused:
        performer.run(flows.fetch(10, "/models"))

    assert (refused.value.retry_after_s, performer.seen(Sleep)) == (11, [])


def test_a_final_refusal_is_not_retried(performer: Performer) -> None:
    performer.answer = in_turn(Response(500, {}, b""))
    with pytest.raises(Refused):
        performer.run(flows.fetch(10, "/models"))

    assert len(performer.effects) == 1


def test_a_lost_answer_is_asked_for_with_the_same_key(performer: Performer) -> None:
    performer.answer = in_turn(TimedOut("silence"), ACCEPTED)
    performer.run(flows.submit(Retry(10), {"seed": 1}))

    first, second = performer.seen(Send)
    assert first.headers == second.headers
    assert len(first.headers["Idempotency-Key"]) == 32


def test_a_subscription_resumes_after_the_last_number_and_repeats_nothing(performer: Performer) -> None:
    subscription = Subscription(10, "j")
    started = said("started", 1, steps=5)
    performer.answer = in_turn(started, Unreachable("broken"), started, said("progress of tomorrow", 1), ENDED)

    events: list[Event | None] = [performer.run(subscription.next()) for _ in range(3)]

    assert events == [Started("j", 1, 5), Ended("j", 2, "cancelled", {"status": "cancelled"}), None]
    assert [effect.path for effect in performer.seen(Receive)] == [
        "/jobs/j/stream?after=0",
        *["/jobs/j/stream?after=1"] * 4,
    ]
    assert [type(effect) for effect in performer.effects[1:4]] == [Receive, Close, Sleep]


def test_a_stream_without_more_messages_ends(performer: Performer) -> None:
    subscription = Subscription(10, "j", after=7)
    performer.answer = in_turn(None)

    assert performer.run(subscription.next()) is None
    assert subscription.ended


def test_leaving_cancels_the_job_once(performer: Performer) -> None:
    subscription = Subscription(10, None, {"seed": 1})
    performer.answer = in_turn(ACCEPTED, said("started", 1, steps=5), Response(200, {}, b"{}"))
    performer.run(subscription.next())
    performer.run(subscription.leave())
    performer.run(subscription.leave())

    assert [(effect.method, effect.path) for effect in performer.seen(Send)] == [
        ("POST", "/generate"),
        ("DELETE", "/jobs/j"),
    ]


def test_leaving_before_the_id_is_known_finds_the_job_by_its_key(performer: Performer) -> None:
    subscription = Subscription(10, None, {"seed": 1})
    submitting = subscription.next()
    lost = next(submitting)
    submitting.close()
    performer.answer = in_turn(ACCEPTED, Response(200, {}, b"{}"))
    performer.run(subscription.leave())

    again, cancelling = performer.seen(Send)
    assert isinstance(lost, Send) and (again.headers, again.json) == (lost.headers, lost.json)
    assert (cancelling.method, cancelling.path) == ("DELETE", "/jobs/j")


def test_leaving_raises_nothing_and_gives_up_soon(performer: Performer) -> None:
    subscription = Subscription(60, None, {"seed": 1})
    performer.answer = in_turn(ACCEPTED, said("started", 1, steps=5))
    performer.run(subscription.next())
    performer.answer = lambda effect: Unreachable("nobody there")
    performer.run(subscription.leave())

    assert performer.now < flows.CANCEL_S


@pytest.mark.parametrize("status", ["running", "succeeded"])
def test_a_look_at_a_job_gives_up_soon_and_keeps_what_was_known(status: str, performer: Performer) -> None:
    document = {"id": "j", "status": status, "images": [{"url": "/jobs/j/images/0"}]}

    assert performer.run(flows.look(document, ())) == (document, ())
    assert performer.now < flows.LOOK_S
    assert all(effect.timeout_s <= flows.LOOK_S for effect in performer.seen(Send))
