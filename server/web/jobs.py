"""`/jobs`: what is running and what has come of it."""

import asyncio

from fastapi import APIRouter, Request, Response
from starlette.responses import JSONResponse

from server.bounds import whole_number
from server.errors import Invalid, NotFound
from server.jobs.job import Job
from server.jobs.schemas import JOBS, MOST_JOBS, STATUSES, After, Index, Limit, Status
from server.jobs.service import JobService
from server.web.generate import ANIMATIONS, PNG, draw
from server.web.http import already_has, header, name_of_owner, negotiate

router = APIRouter()
FOR_EVER = "max-age=31536000, immutable"


def _kept(job: Job) -> str:
    """The Cache-Control of a picture. Caches between us and an owner must not show it to others."""
    return f"{'public' if job.request.owner is None else 'private'}, {FOR_EVER}"


@router.get("/jobs", summary="JobService, newest first")
async def job_list(request: Request, status: Status = None, limit: Limit = None, after: After = None) -> JSONResponse:
    """The jobs that are kept. `after` is the id of the last job of the page before."""
    if status is not None and status not in STATUSES:
        raise Invalid(("status", f"status must be one of {', '.join(STATUSES)}"))
    most = JOBS if limit is None else whole_number("limit", limit, 1, MOST_JOBS)
    jobs: JobService = request.app.state.jobs
    page = await jobs.repository.page(name_of_owner(request), status, after, most)
    documents = [jobs.document(job) for job in page]
    return await asyncio.to_thread(JSONResponse, {"jobs": documents})


@router.get("/jobs/{id}", summary="A job")
async def job_document(request: Request, id: str) -> JSONResponse:
    """The job document."""
    jobs: JobService = request.app.state.jobs
    return JSONResponse(jobs.document(await jobs.repository.find(id, name_of_owner(request))))


@router.delete("/jobs/{id}", summary="Cancel a job")
async def job_cancel(request: Request, id: str) -> JSONResponse:
    """Gives a job up; a job that has ended stays as it is. Answers the document."""
    jobs: JobService = request.app.state.jobs
    return JSONResponse(jobs.document(await jobs.cancel(await jobs.repository.find(id, name_of_owner(request)))))


@router.get("/jobs/{id}/images/{index}", summary="One picture of a job", response_class=Response)
async def job_image(request: Request, id: str, index: Index) -> Response:
    """The PNG, immutable."""
    jobs: JobService = request.app.state.jobs
    job = await jobs.repository.find(id, name_of_owner(request))
    if not (index.isascii() and index.isdigit() and len(index) < 6 and int(index) in job.images):
        raise NotFound(f"this job has {len(job.images)} of its images 0..{job.request.n - 1}")
    image = job.images[int(index)]
    tag = f'"{await asyncio.to_thread(lambda: image.sha256)}"'
    headers = {"ETag": tag, "Cache-Control": _kept(job)}
    if already_has(request, tag):
        return Response(status_code=304, headers=headers)
    return Response(await asyncio.to_thread(lambda: image.png), media_type=PNG, headers=headers)


@router.get("/jobs/{id}/trajectory", summary="The denoising of a job as an animation", response_class=Response)
async def job_trajectory(request: Request, id: str) -> Response:
    """GIF, APNG or WebP as `Accept` asks, from the frames that were kept."""
    media = negotiate(header(request, "accept"), ANIMATIONS)
    jobs: JobService = request.app.state.jobs
    job = await jobs.repository.find(id, name_of_owner(request))
    if job.request.frames is None or job.status != "succeeded":
        raise NotFound("this job has no frames" if job.request.frames is None else f"this job is {job.status}")
    return Response(
        await draw(jobs, job, media), media_type=media, headers={"Cache-Control": _kept(job), "Vary": "Accept"}
    )
