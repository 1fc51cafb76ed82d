"""Rows of the journal as earlier versions wrote them."""

import json
from dataclasses import replace
from unittest import mock

import pytest

from model.sampling.plan import resolve
from model.sampling.samplers import Sampling
from model.sampling.schedule import Process, linear
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
