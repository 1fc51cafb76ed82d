# syntax=docker/dockerfile:1
# The server with its models. For a GPU by default; `--build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu`
# builds it without CUDA.
FROM python:3.12-slim AS build
ARG TORCH_INDEX=https://pypi.org/simple
WORKDIR /build
RUN python -m venv /venv
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY model model
COPY server server
RUN /venv/bin/pip install --no-cache-dir --disable-pip-version-check --constraint constraints.txt \
        --extra-index-url "$TORCH_INDEX" .

FROM python:3.12-slim
RUN useradd --uid 10001 --user-group --no-create-home ddpm && install -d -o 10001 -g 10001 -m 700 /data
COPY --from=build /venv /venv
COPY weights /weights
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1 DDPM_WEIGHTS=/weights DDPM_DATA_DIR=/data \
    DDPM_HOST=0.0.0.0
VOLUME /data
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=2)"]
CMD ["ddpm", "serve"]
