"""Rows of the journal as earlier versions wrote them."""

import json
from dataclasses import replace
from unittest import mock

import pytest

from model.sampling.plan import resolve
from model.sampling.samplers import Sampling
from model.sampling.schedule import Process, linear
from server.catalog import require_unchanged
from server.errors import ModelChanged
from server.jobs.codec import to_job, to_record
from server.jobs.job import State
from tests.server.jobs.test_job import job

PROCESS = Process(linear(30))


def read_again(sampling: Sampling) -> Sampling:
    """How a job of a version without orders, given levels and plans is sampled, once this version has read its row."""
    before = job(State.QUEUED)
    before.request = replace(before.request, sampling=sampling)
    record = to_record(before)
    fields = json.loads(record.request)
    for field in ("order", "timesteps", "plan", "plan_digest"):
        del fields[field]
    return to_job(replace(record, request=json.dumps(fields)), mock.Mock(), mock.Mock()).request.sampling


def test_a_dpmpp_2m_job_of_an_earlier_version_keeps_the_levels_that_it_had() -> None:
    asked = resolve(PROCESS, "dpmpp_2m", 4, spacing="leading", clip=True)

    assert read_again(replace(asked, order=None)) == replace(asked, spacing=None, timesteps=(22, 15, 8, 1))


@pytest.mark.parametrize("sampler", ["ddpm", "greedy", "ddim"])
def test_other_jobs_of_an_earlier_version_are_what_they_were(sampler: str) -> None:
    asked = resolve(PROCESS, sampler, 4)

    assert read_again(asked) == asked


def test_a_job_with_a_sampler_of_another_version_is_read_and_fails_alone() -> None:
    queued = job(State.QUEUED)
    queued.request = replace(queued.request, sampling=replace(queued.request.sampling, sampler="newer"))
    read = to_job(to_record(queued), mock.Mock(), mock.Mock())

    with pytest.raises(ModelChanged, match="this version has no sampler newer"):
        require_unchanged("digits", read.request.sampling, {"digits": mock.Mock()})
