"""Compiles Triton's kernels on all cores, beside the first stages: a net that is loaded compiles its own one by one.

    python -m benchmarks.gpu.kernels SETTING

as `benchmarks.gpu` starts it. It gives the GPU nothing to do. What has been compiled before is found, and only counted.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

from benchmarks.gpu.facts import Fact, Setting, tell
from benchmarks.gpu.run import LOG, ROOT
from server.worker.cpus import cores

STAGES = {"smoke", "correctness", "speed", "server", "tiles", "compiled"}  # which launch kernels
KEPT_CORES = 2  # for the stages,
NICE = 10  # which go first on all others
DRY_ARCH = 90
DRY_PATIENCE_S = 60.0


@dataclass(frozen=True, slots=True)
class Job:
    """One of the nets of `benchmarks.kernels_used`, in one batch, by our convolutions or the library's."""

    use: int
    bucket: int
    invariant: bool
    arch: int


def jobs(setting: Setting, arch: int) -> list[Job]:
    """All there are, the net that is measured most first; dry, one of the smallest net."""
    from benchmarks.kernels_used import uses

    if setting.dry:
        return [Job(0, 1, True, DRY_ARCH)]
    used = list(enumerate(uses()))
    used.sort(key=lambda each: each[1].card.architecture.height != 32 or each[1].card.architecture.in_channels != 3)
    return [Job(i, bucket, ours, arch) for ours in (True, False) for i, use in used for bucket in use.buckets]


def compile_all_of(job: Job) -> list[str]:
    """The kernels of a job, compiled as a launch would compile them. -> their hashes"""
    import torch

    from benchmarks.absent_gpu import compile_launchers, launching
    from benchmarks.kernels_used import META, run, uses

    torch.set_num_threads(1)
    found: dict[str, object] = {}
    use = replace(uses()[job.use], buckets=(job.bucket,))
    with launching(job.arch, lambda kernel: found.setdefault(kernel.hash, kernel), META):
        run(use, job.invariant, META)
    try:
        compile_launchers(found.values())
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        print(f"kernels without what launches them: {error}", file=sys.stderr)
    return list(found)


@contextmanager
def compiling(setting: Setting, environ: Mapping[str, str]) -> Iterator[None]:
    """Compiles in processes beside whatever is done meanwhile; what is not compiled at the end is not."""
    if find_spec("triton") is None:
        yield
        return
    command = [sys.executable, "-m", "benchmarks.gpu.kernels", setting.as_json()]
    with (Path(setting.out) / LOG).open("ab") as log:
        streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
        process = subprocess.Popen(command, cwd=ROOT, env=environ, start_new_session=True, **streams)  # type: ignore[call-overload]
    try:
        yield
        if setting.dry:
            with suppress(subprocess.TimeoutExpired):
                process.wait(DRY_PATIENCE_S)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def main() -> None:
    """Compiles, and tells how many kernels there are."""
    setting, began = Setting.from_json(sys.argv[1]), time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        if setting.dry:
            os.environ["TRITON_CACHE_DIR"] = scratch
        cache = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
        before, hashes = len(list(cache.glob("*/*.cubin"))), set[str]()
        workers = 1 if setting.dry else max(1, cores() - KEPT_CORES)
        with ProcessPoolExecutor(workers, get_context("spawn"), os.nice, (NICE,)) as pool:
            for done in as_completed([pool.submit(compile_all_of, job) for job in jobs(setting, _arch(setting))]):
                if (error := done.exception()) is None:
                    hashes.update(done.result())
                else:  # it must not cost the others
                    traceback.print_exception(error)
        new = len(list(cache.glob("*/*.cubin"))) - before
    more = {"new": new, "seconds": round(time.monotonic() - began, 1), "processes": workers}
    tell(setting, Fact("kernels compiled beforehand", len(hashes), more=more, main=True))


def _arch(setting: Setting) -> int:
    """90 for sm_90."""
    import torch

    if setting.dry:
        return DRY_ARCH
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


if __name__ == "__main__":
    main()
