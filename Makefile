# make serve | test | check | bench | gpu: see CONTRIBUTING.md. Everything is installed into .venv, nowhere else.
PYTHON ?= python3
HOST   ?= 127.0.0.1
PORT   ?= 8000
BIN    := .venv/bin
PIP    := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

# TORCH=cpu or TORCH=cuda chooses the build of PyTorch. By default it is the build without CUDA (0.2 GB instead of 2.7)
# where there is no NVIDIA driver, if CPU_WHEELS can be reached and pip was not told where else to look.
CPU_WHEELS ?= https://download.pytorch.org/whl/cpu

.NOTPARALLEL: # all install into one .venv
.PHONY: serve test test-long test-avx2 test-stalled check format bench bench-compile chaos chaos-long flips fuzz soak image gpu gpu-wheels clean

serve: .venv/serve.stamp
	$(BIN)/ddpm serve --host $(HOST) --port $(PORT)

# First in parallel, the slowest files at the start; then the tests that measure, alone, even if one of the first failed. A
# process of tests that dies ends the run, which names its test: pytest-xdist may wait for ever for the work of a new one.
test: WHICH = not long
test-long: WHICH = long
test test-long: .venv/test.stamp
	$(BIN)/python -m pytest -n auto --max-worker-restart 0 --dist loadfile --no-loadscope-reorder -m "not alone and $(WHICH)"; first=$$?; \
	$(BIN)/python -m pytest -m "alone and $(WHICH)" && exit $$first

# All tests as on an x86 processor without AVX-512: each variable limits the instructions of one library.
test-avx2:
	ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 OPENBLAS_CORETYPE=HASWELL \
		NPY_DISABLE_CPU_FEATURES="X86_V4 AVX512_ICL AVX512_SPR" $(MAKE) --keep-going test test-long

# All tests on a machine that is busy and stops now and then, as a shared one does: half an hour.
test-stalled: .venv/test.stamp
	$(BIN)/python -m tests.stalls --busy 2 $(MAKE) --keep-going test

check: .venv/test.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/test.stamp
	$(BIN)/python client/unasync.py
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/bench.stamp
	$(BIN)/python -m benchmarks

bench-compile: .venv/bench.stamp
	$(BIN)/python -m benchmarks --compiled --out build/compiled.jsonl

# Sends kill -9 to the server, its engine or both 200 times under 16 clients: ten to twenty minutes.
chaos: .venv/test.stamp
	$(BIN)/python -m tests.server.jobs.storm

# The same with jobs that last from a second to minutes, two of which end their engines themselves: an hour.
chaos-long: .venv/test.stamp
	$(BIN)/python -m tests.server.jobs.long_storm

# Flips a bit in, or cuts off, the journal, its log or a picture of a killed server, 200 times: a minute.
flips: .venv/test.stamp
	$(BIN)/python -m tests.server.store.flips

# Hostile input, for longer than tests may take: `fuzz` runs for minutes, `soak` for half an hour.
fuzz: .venv/test.stamp
	$(PIP) --editable client --editable '.[test,fuzz]'
	$(BIN)/python -m tests.fuzz.checkpoint --runs 100000
	$(BIN)/python -m tests.fuzz.sockets --runs 20000
	$(BIN)/python -m tests.fuzz.api --cases 5000

soak: .venv/test.stamp
	ABORTS=10000 $(BIN)/python -m pytest tests/server/web/test_protocol.py -k thousands
	FILES=1024 $(BIN)/python -m pytest tests/server/test_pressure.py
	$(BIN)/python -m tests.fuzz.soak --minutes 30

# Builds the Dockerfile and runs the image without a Docker engine: as root, with buildah and debootstrap; takes minutes
# and 10 GB.
image:
	$(PYTHON) -m tests.deploy.image --torch-index "$(CPU_WHEELS)"

.venv/torch.stamp: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed, as PYTHON=...")'
	$(PYTHON) -m venv .venv
	@$(BIN)/python deploy/torch_build.py --index $(CPU_WHEELS) $(if $(TORCH),--build $(TORCH))
	touch $@

.venv/serve.stamp: .venv/torch.stamp client/pyproject.toml constraints.txt
	$(PIP) --editable client --editable .
	touch $@

.venv/test.stamp: .venv/torch.stamp client/pyproject.toml constraints.txt
	$(PIP) --editable client --editable '.[test]'
	touch .venv/serve.stamp $@

.venv/bench.stamp: .venv/test.stamp
	$(PIP) --editable client --editable '.[bench]'
	touch $@

# Checks and measures everything that needs a GPU, with the Python of that machine (torch 2.11 or later) and no network.
# `make gpu-wheels` beforehand, on a machine with a network, downloads the packages that Python may lack into .gpu/.
gpu:
	$(PYTHON) -m benchmarks.gpu

# HAS=FILE: the packages of that Python, from `pip list --format=freeze`; default: torch, Triton and their requirements.
# KERNELS=PYTHON: a Python 3.12 with torch 2.11 and Triton 3.6, like that one, which compiles kernels for that machine.
KERNELS ?= $(PYTHON)

gpu-wheels: .venv/test.stamp
	rm -rf .gpu build/wheels && mkdir -p .gpu build
	$(BIN)/python -m benchmarks.closure > build/wheels.txt
	$(BIN)/pip download --quiet --no-deps --only-binary :all: --python-version 3.12 --dest build/wheels \
		--requirement build/wheels.txt --constraint constraints.txt
	$(BIN)/python -m benchmarks.closure --wheels build/wheels --into .gpu $(if $(HAS),--has $(HAS))
	$(KERNELS) -m benchmarks.unpack build/wheels --run -m benchmarks.warm_cache --out .gpu/kernels.tar.xz || true
	du -sh .gpu

clean:
	rm -rf .venv .gpu build client/build *.egg-info client/*.egg-info .pytest_cache .mypy_cache .ruff_cache
