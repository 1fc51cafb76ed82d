# The server with its models. `docker build .` builds it for NVIDIA GPUs, `docker build --target cpu .` without CUDA.
# Neither image has a compiler. Both run as an unprivileged user with a root that may be read-only, and write to /data
# and, temporarily, to /tmp. See docs/operations.md.
#
# Packages come from where pip looks by itself. To name another place: --build-arg PIP_INDEX_URL=..., or, with a password
# in it, which no layer then keeps, --secret id=pip,src=pip.conf. TORCH_INDEX names one for torch alone. The image without
# CUDA needs it on x86: the index of the builds without CUDA, which is CPU_WHEELS in the Makefile.
# Where there is no network: --build-arg PIP_NO_INDEX=1 --build-arg PIP_FIND_LINKS=/wheels --volume ...:/wheels (buildah),
# as tests/deploy/image.py does. To pin the bytes of the base: --build-arg PYTHON=python:...@sha256:...
# To record the commit in the image: --build-arg REVISION=$(git rev-parse HEAD).
ARG PYTHON=python:3.11.15-slim-bookworm


FROM ${PYTHON} AS python


# The dependencies, at the versions of constraints.txt: a layer that changes only when they do.
FROM python AS packages
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore PIP_CONSTRAINT=/build/constraints.txt
WORKDIR /build
RUN ["python", "-m", "venv", "--without-pip", "/venv"]
COPY pyproject.toml constraints.txt ./
RUN ["python", "-c", "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
    lines = [line for line in project['dependencies'] if not line.startswith('ddpm-client==')]; \
    print(*lines, sep='\\n', file=open('requirements.txt', 'w')); \
    print(*[line for line in lines if line.startswith('torch==')], file=open('torch.txt', 'w'))"]


# torch is installed first and alone, so that only torch comes from TORCH_INDEX; a build of it with CUDA is refused here.
# From OpenVINO the plugins for other devices, the readers of other frameworks' files and the telemetry are removed.
FROM packages AS packages-cpu
ARG TORCH_INDEX
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
ARG PIP_NO_INDEX
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    python -m pip --python /venv install --no-deps ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} --requirement torch.txt \
    && if grep -E '^Requires-Dist: (cuda|nvidia)' /venv/lib/python*/site-packages/torch-*.dist-info/METADATA; then \
        echo 'this build of torch needs CUDA: name the index of one without, as --build-arg TORCH_INDEX=URL' >&2; exit 1; fi \
    && python -m pip --python /venv install --requirement requirements.txt \
    && python -m pip --python /venv uninstall --yes openvino-telemetry \
    && find /venv -path '*/openvino/libs/*' '(' -name '*_[gn]pu_plugin.so' -o -name cache.json \
        -o -name '*_frontend.so.*' ! -name '*_ir_frontend.so.*' ')' -print -delete


# Triton needs a C compiler once, for its extension that calls the driver. This stage has one.
FROM packages AS packages-cuda
ARG TORCH_INDEX
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
ARG PIP_NO_INDEX
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    python -m pip --python /venv install --no-deps ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} --requirement torch.txt \
    && python -m pip --python /venv install --requirement requirements.txt
COPY deploy/image_triton.py /opt/triton/image_triton.py
RUN ["/venv/bin/python", "/opt/triton/image_triton.py"]


FROM packages AS source
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
ARG PIP_NO_INDEX
COPY README.md LICENSE ./
COPY client client
COPY model model
COPY server server
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    python -m pip --python /venv install --no-deps --target /app ./client .


# The common base of both images, before anything large.
FROM python AS bare
RUN ["groupadd", "--gid", "10001", "ddpm"]
RUN ["useradd", "--uid", "10001", "--gid", "10001", "--no-create-home", "--home-dir", "/tmp", "--shell", "/usr/sbin/nologin", "ddpm"]
RUN ["install", "--directory", "--owner", "10001", "--group", "10001", "--mode", "700", "/data"]
ENV PATH=/venv/bin:/app/bin:$PATH PYTHONPATH=/app PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    HF_HOME=/data/huggingface DDPM_HOST=0.0.0.0 DDPM_PORT=8000 DDPM_WEIGHTS=/weights DDPM_DATA_DIR=/data
WORKDIR /app
VOLUME /data
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen(f'http://127.0.0.1:{os.environ[\"DDPM_PORT\"]}/readyz', timeout=4)"]
ENTRYPOINT ["python", "-m", "server"]
CMD ["serve"]
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="ddpm-server" \
    org.opencontainers.image.description="An inference server for pixel-space diffusion models" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="$VERSION" \
    org.opencontainers.image.revision="$REVISION"


FROM bare AS cpu
COPY --from=packages-cpu /venv /venv
COPY --from=source /app /app
COPY weights /weights
USER 10001:10001


# Compiled kernels are kept in /data, so that only the first start compiles them.
FROM bare AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    TRITON_CACHE_DIR=/data/triton TRITON_CACHE_MANAGER=image_triton:ImageCache TRITON_LIBCUDA_PATH=/usr/lib
COPY --from=packages-cuda /venv /venv
COPY --from=packages-cuda /opt/triton /opt/triton
ENV PYTHONPATH=/app:/opt/triton
COPY --from=source /app /app
COPY weights /weights
USER 10001:10001
