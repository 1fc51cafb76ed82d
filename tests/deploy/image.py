"""Builds the image of the CPU target and runs it as it is meant to run, on a machine without a Docker engine.

`make image`, as root, on a Debian-like machine with buildah, debootstrap, util-linux and Python 3.11. The Dockerfile is
built as it is, by buildah, without a network: on a base that debootstrap makes under the name of the real one, from
wheels that pip fetched before. Then the image runs as its configuration says, with a read-only root, no capabilities
and a /tmp from which nothing can be executed; what is seen is printed, a line of JSON each. Takes minutes.
"""

import argparse
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SUITE, MIRROR = "bookworm", "http://deb.debian.org/debian"
IMAGE = "localhost/ddpm-server:cpu"
MOST_BYTES = 1_500_000_000
GRACE_S = 60  # of docker-compose.yml
COMPILERS = ("cc", "gcc", "g++", "clang", "tcc", "ld", "as")
PNG = b"\x89PNG\r\n\x1a\n"

# What a container runtime does before it starts a process: a root that is read-only, and little else to be seen.
CONTAIN = """
set -e
mount --make-rprivate /
mount --bind "$1" "$1"
mount -t proc proc "$1/proc"
mount -t sysfs -o ro,nosuid,nodev,noexec sysfs "$1/sys"
mount -t tmpfs -o mode=755,nosuid tmpfs "$1/dev"
for device in null zero full random urandom; do touch "$1/dev/$device"; mount --bind /dev/$device "$1/dev/$device"; done
mkdir "$1/dev/shm" && mount -t tmpfs -o mode=1777,nosuid,nodev,noexec,size=64m tmpfs "$1/dev/shm"
mount -t tmpfs -o mode=1777,nosuid,nodev,noexec,size=256m tmpfs "$1/tmp"
mount --bind "$2" "$1/data"
mount -o remount,ro,bind "$1"
shift 2
exec "$@"
"""


def run(*command: str | Path) -> str:
    """What a command prints. Raises CalledProcessError."""
    words = [str(word) for word in command]
    return subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout


class Buildah:
    """buildah, with all that it keeps in one folder."""

    def __init__(self, folder: Path) -> None:
        places = ["--root", str(folder / "storage"), "--runroot", str(folder / "run")]
        self._command = ["buildah", *places, "--storage-driver", "vfs"]

    def __call__(self, *words: str | Path) -> str:
        return run(*self._command, *words).strip()

    def offline(self, *words: str) -> None:
        """The same without a network; what it prints is shown."""
        subprocess.run(["unshare", "--net", *self._command, *words], check=True, stdout=sys.stderr)


def make_base(buildah: Buildah, folder: Path, name: str) -> None:
    """An image that has the name of Python's, and Debian with Debian's Python in it."""
    if name in buildah("images", "--format", "{{.Name}}:{{.Tag}}").split():
        return
    root = folder / "base"
    shutil.rmtree(root, ignore_errors=True)
    packages = "python3,python3-venv,python3-pip,ca-certificates"
    run("debootstrap", "--variant=minbase", f"--include={packages}", SUITE, root, MIRROR)
    for leftover in [*root.glob("var/cache/apt/*.bin"), *root.glob("var/cache/apt/archives/*.deb")]:
        leftover.unlink()
    shutil.rmtree(root / "var/lib/apt/lists")  # Python's images have none of it either
    (root / "usr/local/bin/python").symlink_to("/usr/bin/python3")
    container = buildah("from", "scratch")
    buildah("add", "--quiet", container, root, "/")
    buildah("commit", "--quiet", "--rm", container, name)
    shutil.rmtree(root)


def fetch_wheels(folder: Path, torch_index: str) -> None:
    """Everything that the image installs, by this machine's pip. torch without CUDA is another wheel than PyPI's: it is
    looked for in `torch_index` too, unless that is empty."""
    folder.mkdir(exist_ok=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    dependencies: list[str] = project["project"]["dependencies"]
    wanted = [line for line in dependencies if not line.startswith("ddpm-client==")]  # it is built from client/
    torch = next(line for line in wanted if line.startswith("torch=="))
    download = (sys.executable, "-m", "pip", "download", "-qq", "--dest", folder, "--find-links", folder)
    if not list(folder.glob("torch-*+cpu-*")):
        also = ("--extra-index-url", torch_index) if torch_index else ()
        run(*download, "--no-deps", "--retries", "1", *also, torch)
    if not list(folder.glob("torch-*+cpu-*")):
        raise SystemExit(f"pip found no CPU build of {torch}")
    constraints = ("--constraint", ROOT / "constraints.txt")
    run(*download, *constraints, "--only-binary", ":all:", *wanted, *project["build-system"]["requires"])


def build(buildah: Buildah, wheels: Path) -> None:
    """The image, from the Dockerfile as it is."""
    arguments = ("--build-arg", "PIP_NO_INDEX=1", "--build-arg", "PIP_FIND_LINKS=/wheels")
    how = ("--isolation", "chroot", "--format", "docker", "--target", "cpu", "--tag", IMAGE, "--pull=never")
    buildah.offline("build", *how, "--volume", f"{wheels}:/wheels:ro", *arguments, str(ROOT))


class Container:
    """A process that runs as an image's configuration says."""

    def __init__(self, root: Path, data: Path, configuration: dict[str, Any], port: int) -> None:
        uid, gid = configuration["User"].split(":")
        self.confined = ["setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups", "--no-new-privs"]
        self.confined += ["--bounding-set=-all", "--inh-caps=-all", "--ambient-caps=-all"]
        self.confined += [
            "env",
            "-i",
            *configuration["Env"],
            "DDPM_HOST=127.0.0.1",
            f"DDPM_PORT={port}",
            "DDPM_THREADS=1",
        ]
        inside = [*self.confined, *configuration["Entrypoint"], *configuration["Cmd"]]
        unshare = ["unshare", "--mount", "--pid", "--ipc", "--uts", "--fork", "--kill-child"]
        words = [*unshare, "sh", "-c", CONTAIN, "sh", str(root), str(data), "chroot", str(root), *inside]
        self._outer = subprocess.Popen(words)
        self.url = f"http://127.0.0.1:{port}"

    @property
    def pid(self) -> int:
        """The process that is the container's first."""
        return self._children(self._outer.pid)[0]

    @property
    def pids(self) -> list[int]:
        """All of its processes."""
        found = [self.pid]
        for pid in found:
            found += self._children(pid)
        return found

    @staticmethod
    def _children(pid: int) -> list[int]:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def execute(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Runs a command inside, as the same user."""
        enter = ["nsenter", "--target", str(self.pid), "--mount", "--pid", "--root", "--wd"]
        return subprocess.run([*enter, *self.confined, *command], capture_output=True, text=True)

    def ask(self, path: str, body: Any = None, **headers: str) -> tuple[int, bytes]:
        """The status and the body of an answer; (0, b"") if there is none."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json", **headers})
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as refusal:
            return refusal.code, refusal.read()
        except OSError:
            return 0, b""

    def wait_until_ready(self) -> float:
        """Seconds until it takes work."""
        began = time.monotonic()
        while self.ask("/readyz")[0] != 200:
            if self._outer.poll() is not None or time.monotonic() > began + 120:
                raise SystemExit("the container did not become ready")
            time.sleep(0.1)
        return time.monotonic() - began

    def stop(self, times: int = 1) -> tuple[int, float]:
        """SIGTERM, perhaps twice; the exit code, and how long it took."""
        began, pid = time.monotonic(), self.pid
        for _ in range(times):
            os.kill(pid, signal.SIGTERM)
            time.sleep(0.5)
        return self._outer.wait(GRACE_S), time.monotonic() - began

    def kill(self) -> None:
        """Ends what is left of it."""
        self._outer.kill()
        self._outer.wait()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def status_of(pid: int) -> dict[str, str]:
    """What /proc says of a process."""
    return dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line)


@contextmanager
def started(*arguments: Any) -> Iterator[Container]:
    """A container that is gone in the end."""
    container = Container(*arguments)
    try:
        yield container
    finally:
        container.kill()


def saw(what: str, holds: bool, **facts: Any) -> None:
    """Prints what was seen. Raises SystemExit if it is not as promised."""
    print(json.dumps({"seen": what, "holds": holds, **facts}), flush=True)
    if not holds:
        raise SystemExit(f"not so: {what}")


def check_image(root: Path, configuration: dict[str, Any]) -> None:
    """What can be said of an image that does not run."""
    size = int(run("du", "--summarize", "--block-size=1", "--one-file-system", root).split()[0])
    saw("the image has at most 1.5 GB", size <= MOST_BYTES, bytes=size)
    folders = [root / folder for folder in ("venv/bin", "app/bin", "usr/local/bin", "usr/bin", "bin")]
    compilers = [name for name in COMPILERS for folder in folders if (folder / name).exists()]
    saw("it has no compiler", not compilers, compilers=compilers)
    saw("it does not run as root", re.fullmatch(r"[1-9]\d*:[1-9]\d*", configuration["User"]) is not None)


def check_confinement(container: Container) -> None:
    """What its processes may do: nothing but their work."""
    statuses = [status_of(pid) for pid in container.pids]
    uids = sorted({uid for status in statuses for uid in status["Uid"].split()})
    capabilities = {status[name] for status in statuses for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")}
    saw("nobody in it is root", len(statuses) > 1 and "0" not in uids, uids=uids, processes=len(statuses))
    saw("nobody in it has a capability", capabilities == {"0" * 16})
    saw("nobody in it can get one", {status["NoNewPrivs"] for status in statuses} == {"1"})
    tried = container.execute("touch", "/here", "/app/here", "/venv/here", "/weights/here")
    saw("its root is read-only", tried.stderr.count("Read-only file system") == 4)


def check_service(container: Container, health: list[str]) -> str:
    """What it does. Gives the id of a job that is not done yet."""
    saw("it becomes ready", True, seconds=round(container.wait_until_ready(), 1))
    check_confinement(container)
    saw("its health check passes", container.execute(*health).returncode == 0)
    order = {"seed": 42, "steps": 100}
    status, picture = container.ask("/generate", order)
    again = container.ask("/generate", order, **{"Cache-Control": "no-cache"})
    saw("it makes a picture", status == 200 and picture.startswith(PNG), bytes=len(picture))
    saw("and the same one again", again == (status, picture))
    maps = "".join(Path(f"/proc/{pid}/maps").read_text() for pid in container.pids)
    saw("its net is run by OpenVINO", "libopenvino_intel_cpu_plugin" in maps)
    status, job = container.ask("/generate", {"seed": 7, "steps": 1000, "n": 64}, Prefer="respond-async")
    saw("it takes a job", status == 202)
    return str(json.loads(job)["id"])


def check_restart(container: Container, job: str) -> None:
    """What it has kept."""
    container.wait_until_ready()
    deadline = time.monotonic() + 60
    while (document := json.loads(container.ask(f"/jobs/{job}")[1]))["progress"]["step"] == 0:
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    saw("after the next start it goes on with the job", document["status"] == "running", **document["progress"])


def prepare(folder: Path, built: bool, torch_index: str) -> Buildah:
    """The image, in a folder."""
    missing = [tool for tool in ("buildah", "debootstrap", "unshare", "setpriv", "nsenter") if not shutil.which(tool)]
    if missing or os.getuid() != 0 or sys.version_info[:2] != (3, 11):
        raise SystemExit(f"it takes root, Python 3.11, and {', '.join(missing) or 'nothing else'}")
    folder.mkdir(parents=True, exist_ok=True)
    buildah = Buildah(folder)
    if not built:
        name = re.search(r"^ARG PYTHON=(\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
        assert name is not None
        make_base(buildah, folder, f"docker.io/library/{name[1]}")
        fetch_wheels(folder / "wheels", torch_index)
        began = time.monotonic()
        build(buildah, folder / "wheels")
        saw("the Dockerfile was built as it is, without a network", True, seconds=round(time.monotonic() - began))
    return buildah


def make_volume(root: Path, data: Path) -> None:
    """An empty /data that belongs to whom it belongs to in the image, as a named volume would."""
    shutil.rmtree(data, ignore_errors=True)
    data.mkdir(mode=0o700)
    owner = (root / "data").stat()
    os.chown(data, owner.st_uid, owner.st_gid)


def main() -> None:
    """Builds, runs, looks, and ends at the first thing that is not so."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "image", help="where all of it is put")
    parser.add_argument("--built", action="store_true", help="take the image that was built there before")
    parser.add_argument("--torch-index", default="", help="where pip also looks for torch without CUDA")
    arguments = parser.parse_args()
    folder: Path = arguments.folder.resolve()
    buildah = prepare(folder, arguments.built, arguments.torch_index)
    configuration = json.loads(buildah("inspect", "--type", "image", IMAGE))["Docker"]["config"]
    mounted = buildah("from", "--pull=never", IMAGE)
    try:
        root, data, port = Path(buildah("mount", mounted)), folder / "data", free_port()
        make_volume(root, data)
        check_image(root, configuration)
        with started(root, data, configuration, port) as container:
            job = check_service(container, configuration["Healthcheck"]["Test"][1:])
            code, seconds = container.stop()
            saw("it survives SIGTERM with a job under way", code == 0, seconds=round(seconds, 1), grace_s=GRACE_S)
        with started(root, data, configuration, port) as container:
            check_restart(container, job)
            code, seconds = container.stop(times=2)
            saw("a second SIGTERM ends it at once", code == 0 and seconds < 10, seconds=round(seconds, 1))
    finally:
        buildah("rm", mounted)


if __name__ == "__main__":
    main()
