"""`GET /metrics`: what Prometheus scrapes."""

from fastapi import APIRouter, Request, Response

from server.jobs.service import JobService
from server.metrics import MEDIA

router = APIRouter()


@router.get("/metrics", summary="Metrics in Prometheus' text format", response_class=Response)
async def scrape(request: Request) -> Response:
    """Counters, gauges and histograms named `ddpm_*`, all read at one moment."""
    jobs: JobService = request.app.state.jobs
    return Response(jobs.metrics.render(), headers={"Content-Type": MEDIA, "Cache-Control": "no-store"})
