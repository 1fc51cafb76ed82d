"""Makes a picture: from a seed and a step count, or once more from a picture that was made before (--like)."""

import sys
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from ddpm_client import Client, Picture, Pictures, Progress, Queued, Request
from ddpm_client.types import Frames, Gathering, texts

from server.cli import connect
from server.cli.progress import Bar
from server.errors import SettingsError
from server.jobs.schemas import GenerateRequest

FIELDS: dict[str, type] = {
    "model": str,
    "seed": int,
    "steps": int,
    "n": int,
    "sampler": str,
    "eta": float,
    "variance": str,
    "spacing": str,
    "noise": str,
    "priority": int,
    "deadline_s": float,
}
ANIMATIONS = {".gif": "gif", ".apng": "apng", ".png": "apng", ".webp": "webp"}
STDOUT = Path("-")


def _parser() -> ArgumentParser:
    parser = ArgumentParser("ddpm generate", description=__doc__)
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        default=Path("out.png"),
        metavar="FILE",
        help="the picture; of several, each goes to FILE with -SEED before its ending; - is standard output (out.png)",
    )
    parser.add_argument("--like", type=Path, metavar="PNG", help="a picture to make again; flags change what it says")
    fields = parser.add_argument_group("request", "What is left out is for the model to choose; a seed is drawn.")
    for name, kind in FIELDS.items():
        field = GenerateRequest.model_fields[name]
        text = f"{field.description}" + (f" ({field.default})" if field.default is not None else "")
        metavar = {int: "N", float: "X", str: "WORD"}[kind]
        fields.add_argument(f"--{name.replace('_', '-')}", dest=name, type=kind, metavar=metavar, help=text)
    clip = GenerateRequest.model_fields["clip"].description
    fields.add_argument("--clip", action=BooleanOptionalAction, help=clip)
    frames = parser.add_argument_group("frames")
    frames.add_argument(
        "--frames", type=Path, metavar="FILE", help=f"an animation of the denoising: {', '.join(ANIMATIONS)}"
    )
    frames.add_argument("--frames-count", type=int, metavar="N", help="so many frames in it (30)")
    frames.add_argument("--frames-every", type=int, metavar="N", help="instead: one after so many updates each")
    frames.add_argument("--frames-kind", choices=["x_t", "x0"], help="the noisy picture, or the one seen in it (x_t)")
    connect.add_arguments(parser)
    return parser


def main(arguments: Sequence[str]) -> int:
    """Makes pictures and writes them down. Returns the exit code."""
    given = _parser().parse_args(arguments)
    before = _texts(given.like) if given.like is not None else {}
    request = _request(given, before)
    for path in (given.out, given.frames):
        if path is not None and not path.absolute().parent.is_dir():
            raise SettingsError(f"{path.parent} is not a folder")
    if given.out == STDOUT and request.get("n", 1) > 1:
        raise SettingsError("-o - takes one picture: with -o FILE each goes to a file of its own")
    with Bar() as bar, connect.server(given, bar) as client:
        made = _make(client, request, bar)
        for warning in _differences(before, made):
            print(f"ddpm: {warning}", file=sys.stderr)
        for path, picture in _files(given.out, made):
            if (
                given.like is not None
                and path.absolute() == given.like.absolute()
                and before["digest"] != _digest(made)
            ):
                raise SettingsError(f"{path} is kept, and the other picture is not written: name another file with -o")
            _write(path, picture.png)
            words = f"{made.job['model']}, seed {picture.seed}, {made.job['request']['steps']} steps"
            print(f"{path}: {words}", file=sys.stderr)
        if given.frames is not None:
            _write(given.frames, client.job(made.job["id"]).trajectory(ANIMATIONS[given.frames.suffix.lower()]))
            points = {frame.step for frame in made.frames}  # one frame holds all pictures, as they were then
            print(f"{given.frames}: {len(points)} frames", file=sys.stderr)
    return 0


def _texts(path: Path) -> dict[str, str]:
    """What made a picture. Raises SettingsError."""
    try:
        found = texts(path.read_bytes())
    except OSError as error:
        raise SettingsError(f"--like: {path} could not be read: {error.strerror}") from None
    except ValueError:
        raise SettingsError(f"--like: {path} is not a PNG") from None
    if not {"model", "digest", "seed", "steps", "sampler", "numerics"} <= found.keys():
        raise SettingsError(f"--like: {path} does not say what made it; was it edited, or made by something else?")
    return found


def _request(given: Namespace, before: dict[str, str]) -> Request:
    """What the flags say, and where they are silent, what made the picture before. Raises SettingsError."""
    try:
        request: dict[str, Any] = {name: kind(before[name]) for name, kind in FIELDS.items() if name in before}
    except ValueError:
        raise SettingsError("--like: the picture does not say in numbers what made it") from None
    if given.sampler not in (None, before.get("sampler")):
        request = {name: value for name, value in request.items() if name not in ("eta", "variance")}
    if "clip" in before:
        request["clip"] = before["clip"] == "true"
    request |= {name: vars(given)[name] for name in (*FIELDS, "clip") if vars(given)[name] is not None}
    return cast(Request, request | {"frames": _frames(given)})


def _frames(given: Namespace) -> Frames | None:
    if given.frames is None:
        if (given.frames_count, given.frames_every, given.frames_kind) != (None, None, None):
            raise SettingsError("--frames-count, --frames-every and --frames-kind need --frames FILE")
        return None
    if given.frames.suffix.lower() not in ANIMATIONS:
        raise SettingsError(f"--frames must end in {', '.join(ANIMATIONS)}")
    if given.frames_count is not None and given.frames_every is not None:
        raise SettingsError("give either --frames-count or --frames-every")
    frames: Frames = {"kind": given.frames_kind or "x_t"}
    if given.frames_every is not None:
        return {**frames, "every": given.frames_every}
    return {**frames, "count": 30 if given.frames_count is None else given.frames_count}


def _make(client: Client, request: Request, bar: Bar) -> Pictures:
    """The pictures, with a bar meanwhile."""
    gathering = Gathering()
    with client.stream(**request) as events:
        for event in events:
            match event:
                case Queued(position=position):
                    bar.say(f"waiting, {position} before")
                case Progress(step=step, steps=steps, eta_s=eta_s):
                    bar.draw(step, steps, f"about {eta_s:.0f} s")
            if (made := gathering.take(event)) is not None:
                return made
    raise AssertionError("a stream has an end")


def _files(out: Path, made: Pictures) -> list[tuple[Path, Picture]]:
    """Where each picture goes."""
    if len(made) == 1 or out == STDOUT:
        return [(out, picture) for picture in made]
    return [(out.with_stem(f"{out.stem}-{picture.seed}"), picture) for picture in made]


def _write(path: Path, data: bytes) -> None:
    """Raises SettingsError"""
    if path == STDOUT:
        sys.stdout.buffer.write(data)
        return
    try:
        path.write_bytes(data)
    except OSError as error:
        raise SettingsError(f"{path} could not be written: {error.strerror}") from None


def _digest(made: Pictures) -> str:
    return made[0].texts["digest"]


def _differences(before: dict[str, str], made: Pictures) -> list[str]:
    """Why a picture that was made again may not be the same."""
    now = made[0].texts
    found = []
    if before and before["digest"] != _digest(made):
        found.append(f"this is another picture: model {now['model']} has other weights than the one that made it")
    if before and before["numerics"] != now["numerics"]:
        found.append(f"pixels may differ: it was made in {before['numerics']}, and now in {now['numerics']}")
    return found
