"""A job has one state, and only the moves that lead on are legal."""

import asyncio
import json
from dataclasses import replace
from itertools import product
from unittest import mock

import pytest
from ddpm_client.wire import pack

from model.sampling.samplers import Sampling
from server.errors import NotReady
from server.jobs.codec import to_job, to_record
from server.jobs.job import ENDED, Job, State
from server.jobs.request import ResolvedRequest
from server.jobs.stream import PictureMessage, StreamCounts
from server.worker.messages import ModelStatus

LEGAL = {
    ("queued", "running"),
    ("queued", "ending"),
    ("queued", "parked"),
    ("running", "ending"),
    ("running", "parked"),
    ("ending", "succeeded"),
    ("ending", "failed"),
    ("ending", "cancelled"),
    ("ending", "parked"),
}


def job(state: State) -> Job:
    """A job in this state."""
    sampling = Sampling(
        sampler="ddpm", steps=4, spacing="leading", clip=True, noise="philox", variance="small", eta=None
    )
    request = ResolvedRequest(model="tiny", T=30, shape=(1, 8, 8), seed=7, n=2, sampling=sampling)
    status = ModelStatus(
        digest="sha256:0",
        device="cpu",
        dtype="float32",
        parameters=1,
        slots=4,
        buckets=[4],
        exact_buckets=[4],
        admitted=[4],
        exact=True,
        numerics="fake",
    )
    return Job(id="a", request=request, model=status, state=state)


@pytest.mark.parametrize(("sampler", "order"), [("ddpm", None), ("dpmpp_2m", 2)])
def test_a_job_of_a_version_without_orders_has_its_samplers_own(sampler: str, order: int | None) -> None:
    record = to_record(job(State.QUEUED))
    fields = json.loads(record.request) | {"sampler": sampler}
    for newer in ("order", "timesteps", "plan", "plan_digest"):
        del fields[newer]
    old = to_job(replace(record, request=json.dumps(fields)), lambda job, image: b"", StreamCounts())

    assert old.request.sampling.order == order


@pytest.mark.parametrize(("before", "after"), [*product(State, State)])
def test_a_job_makes_legal_moves_only(before: State, after: State) -> None:
    moved = job(before)
    if (before, after) in LEGAL:
        moved.move(after)
        assert moved.state is after
    else:
        with pytest.raises(AssertionError, match=f"a job that is {before} cannot become {after}"):
            moved.move(after)
        assert moved.state is before


def test_every_state_leads_to_an_end_or_to_the_next_server() -> None:
    ends = {after for _, after in LEGAL} - {before for before, _ in LEGAL}

    assert ends == {*ENDED, State.PARKED}


@pytest.mark.parametrize("state", [*State])
def test_clients_see_five_states(state: State) -> None:
    seen, started = job(state), job(state)
    started.started_at = 1.0

    if state in ENDED:
        assert seen.status == started.status == str(state)
    else:
        assert (seen.status, started.status) == ("queued", "running")


def test_a_picture_that_cannot_be_sent_yet_is_asked_for_again_by_the_next_subscriber() -> None:
    encode = mock.Mock(side_effect=[NotReady("it is being made again"), b"png"])

    async def story() -> bytes:
        message = PictureMessage(1, {"seq": 1}, False, False, encode)
        with pytest.raises(NotReady):
            await message.packed()
        return await message.packed()

    assert asyncio.run(story()) == pack({"seq": 1}, b"png")
