"""`/jobs`: the jobs of a tenant, running and ended, their images and their animations."""

from fastapi import APIRouter, Request, Response
from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse

from server.bounds import WHOLE, whole_number
from server.documents import JobDocument, JobPage, WebhookSecret
from server.errors import Invalid, NotFound
from server.jobs.job import Job
from server.jobs.schemas import JOBS, MAX_SEQ, MOST_JOBS, STATUSES, After, Index, Limit, Seq, Status
from server.jobs.service import JobService
from server.settings import Settings
from server.web.generate import ANIMATIONS, PNG, ServerSent, draw, last_event_id, sent_events
from server.web.http import EVENTS, has_current, header, negotiate, tenant_of
from server.web.openapi import FILE, JOB_EVENTS, asks, event_stream, refusals, sends
from server.webhooks.signing import secret_of

router = APIRouter(tags=["jobs"])
RETRY_MS = 2000  # before an EventSource reconnects
IMMUTABLE = "max-age=31536000, immutable"


def _cache_control(job: Job) -> str:
    """The Cache-Control of an image: shared caches must not show a tenant's image to others."""
    return f"{'public' if job.request.owner is None else 'private'}, {IMMUTABLE}"


def _owner(request: HTTPConnection) -> str | None:
    tenant = tenant_of(request)
    return None if tenant is None else tenant.name


async def find_job(request: HTTPConnection, id: str) -> Job:
    """A job of the tenant that asks. Raises NotFound, Gone."""
    jobs: JobService = request.app.state.jobs
    return await jobs.repository.find(id, _owner(request))


@router.get("/jobs", summary="List jobs, newest first", response_model=JobPage, responses=refusals(404, 406, 410))
async def list_jobs(request: Request, status: Status = None, limit: Limit = None, after: After = None) -> JSONResponse:
    """One page of the jobs that are kept. `after` is the id of the last job of the previous page."""
    if status is not None and status not in STATUSES:
        raise Invalid(("status", f"status must be one of {', '.join(STATUSES)}"))
    most = JOBS if limit is None else whole_number("limit", limit, 1, MOST_JOBS)
    jobs: JobService = request.app.state.jobs
    page = await jobs.repository.page(_owner(request), status, after, most)
    documents = [jobs.document(job) for job in page]
    return await jobs.in_thread(lambda: JSONResponse({"jobs": documents}))


@router.get("/jobs/{id}", summary="Get a job", response_model=JobDocument, responses=refusals(404, 406, 410))
async def get_job(request: Request, id: str) -> JSONResponse:
    """The job document: status, progress, request, images, error."""
    jobs: JobService = request.app.state.jobs
    return JSONResponse(jobs.document(await find_job(request, id)))


@router.delete("/jobs/{id}", summary="Cancel a job", response_model=JobDocument, responses=refusals(404, 406, 410))
async def cancel_job(request: Request, id: str) -> JSONResponse:
    """Cancels a job and returns its document. A job that has ended stays as it is."""
    jobs: JobService = request.app.state.jobs
    return JSONResponse(jobs.document(await jobs.cancel(await find_job(request, id))))


@router.get(
    "/jobs/{id}/images/{index}",
    summary="Get an image of a job",
    response_class=Response,
    responses={
        200: {"content": {PNG: {"schema": FILE}}, **sends("ETag", "Cache-Control")},
        304: {"description": "`If-None-Match` names its ETag.", **sends("ETag", "Cache-Control")},
        **refusals(404, 406, 410),
    },
    openapi_extra=asks("Accept", "If-None-Match"),
)
async def get_image(request: Request, id: str, index: Index) -> Response:
    """The PNG. It never changes."""
    job = await find_job(request, id)
    if not (WHOLE.fullmatch(index) and int(index) in job.images):
        raise NotFound(f"this job has {len(job.images)} of its images 0..{job.request.n - 1}")
    image, jobs = job.images[int(index)], request.app.state.jobs
    tag = f'"{await jobs.in_thread(lambda: image.sha256)}"'
    headers = {"ETag": tag, "Cache-Control": _cache_control(job)}
    if has_current(request, tag):
        return Response(status_code=304, headers=headers)
    return Response(await jobs.in_thread(lambda: image.png), media_type=PNG, headers=headers)


@router.get(
    "/jobs/{id}/events",
    summary="Watch a job by server-sent events",
    response_class=Response,
    responses={
        200: {"content": {EVENTS: event_stream(JOB_EVENTS)}, **sends("Cache-Control")},
        204: {"description": "The last message was sent before: there is nothing more to come."},
        **refusals(403, 404, 406, 410),
    },
    openapi_extra=asks("Last-Event-ID"),
)
async def get_events(request: Request, id: str, after: Seq = None) -> Response:
    """The messages of a job from number `after` + 1 on, or behind the `Last-Event-ID` that an EventSource sends when it
    reconnects. A client that disconnects cancels nothing."""
    passed = 0 if after is None else whole_number("after", after, 0, MAX_SEQ)
    if (last := last_event_id(request)) is not None:
        passed = last
    job = await find_job(request, id)
    if job.ended and job.stream.closed and passed == len(job.stream.kept):
        return Response(status_code=204)  # at which an EventSource stops
    jobs: JobService = request.app.state.jobs
    return ServerSent(sent_events(job, jobs.watch(job, passed), request.state.request_id, RETRY_MS), {})


@router.get(
    "/jobs/{id}/trajectory",
    summary="Get the denoising of a job as an animation",
    response_class=Response,
    responses={
        200: {"content": dict.fromkeys(ANIMATIONS, {"schema": FILE}), **sends("Cache-Control", "Vary")},
        **refusals(404, 406, 410),
    },
    openapi_extra=asks("Accept"),
)
async def get_trajectory(request: Request, id: str) -> Response:
    """A GIF, APNG or WebP, as `Accept` asks, of the frames that are in memory."""
    media, job = negotiate(header(request, "accept"), ANIMATIONS), await find_job(request, id)
    if job.request.frames is None or job.status != "succeeded":
        raise NotFound("this job has no frames" if job.request.frames is None else f"this job is {job.status}")
    data = await draw(request.app.state.jobs, job, media)
    return Response(data, media_type=media, headers={"Cache-Control": _cache_control(job), "Vary": "Accept"})


@router.get(
    "/webhooks/secret",
    summary="Get the secret that signs the caller's webhooks",
    response_model=WebhookSecret,
    responses={200: sends("Cache-Control"), **refusals(404, 406)},
)
async def get_webhook_secret(request: Request) -> JSONResponse:
    """The secret in the form of Standard Webhooks: `whsec_` and base64. Each API key's name has its own."""
    settings: Settings = request.app.state.settings
    master = settings.webhook_secret.get_secret_value()
    if not master:
        raise NotFound("this server sends no webhooks: DDPM_WEBHOOK_SECRET is not set")
    return JSONResponse({"secret": secret_of(master, _owner(request))}, headers={"Cache-Control": "no-store"})
