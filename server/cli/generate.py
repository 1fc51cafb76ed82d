"""Makes a picture from a seed and a step count, or repeats an earlier picture from its PNG (--like)."""

import sys
from argparse import ArgumentTypeError, BooleanOptionalAction, Namespace
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from ddpm_client import Event, Frames, Picture, Pictures, Progress, Queued, Request
from ddpm_client.protocol import Animation
from ddpm_client.types import png_texts
from tqdm import tqdm

from model.usage import Parser
from server.cli import connect
from server.cli.fields import FIELDS, METAVARS, WRITTEN
from server.cli.progress import COUNTED, progress_bar
from server.errors import SettingsError
from server.jobs.request import CHOICES
from server.jobs.schemas import GenerateRequest

ANIMATIONS: dict[str, Animation] = {".gif": "gif", ".apng": "apng", ".png": "apng", ".webp": "webp"}
OTHER_FORMATS = (".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".npy", ".zip")  # none is written by -o
PRESET = "fast"
MOST_BYTES = 1 << 26  # of a picture that is repeated
STDOUT = Path("-")


def _parser() -> Parser:
    parser = Parser("ddpm generate", description=__doc__)
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        default=Path("out.png"),
        metavar="FILE",
        help="file for the picture; several pictures get -SEED before its ending; - is standard output (out.png)",
    )
    parser.add_argument("--like", type=Path, metavar="PNG", help="picture to repeat; other flags override its request")
    told = f"The preset is {PRESET} unless a flag says how to sample; the model's defaults fill in the rest."
    fields = parser.add_argument_group("request", f"{told} The seed is random.")
    for name, kind in FIELDS.items():
        field = GenerateRequest.model_fields[name]
        text = f"{field.description}" + (f" ({field.default})" if field.default is not None else "")
        flag = f"--{name.replace('_', '-')}"
        fields.add_argument(flag, dest=name, type=kind, metavar=METAVARS[kind], help=text)
    clip = GenerateRequest.model_fields["clip"].description
    fields.add_argument("--clip", action=BooleanOptionalAction, help=clip)
    frames = parser.add_argument_group("frames")
    endings = ", ".join(ANIMATIONS)
    frames.add_argument(
        "--frames", type=Path, metavar="FILE", help=f"file for an animation of the denoising: {endings}"
    )
    frames.add_argument("--frames-count", type=int, metavar="N", help="number of its frames (30)")
    frames.add_argument("--frames-every", type=int, metavar="N", help="steps from one frame to the next, instead")
    frames.add_argument(
        "--frames-kind",
        choices=["x_t", "x0", "both"],
        help="the noisy state, the prediction of x0, or both side by side (x_t)",
    )
    connect.add_arguments(parser)
    return parser


def main(arguments: Sequence[str]) -> int:
    """Makes pictures and writes their files. Returns the exit code."""
    given = _parser().parse_args(arguments)
    before = _read_texts(given.like) if given.like is not None else {}
    request = _request(given, before)
    _check_files(given)
    if given.out == STDOUT and request.get("n", 1) > 1:
        raise SettingsError("-o - takes one picture: with -o FILE each goes to a file of its own")
    with progress_bar() as bar, connect.server(given, bar) as client:
        made = client.stream(**request).pictures(partial(_show, bar))
        bar.close()
        for warning in _differences(before, made[0].texts):
            print(f"ddpm: {warning}", file=sys.stderr)
        for path, picture in _files(given.out, made):
            overwrites = given.like is not None and path.absolute() == given.like.absolute()
            if overwrites and _other(before, made[0].texts) is not None:
                raise SettingsError(f"{path} is kept, and the other picture is not written: name another file with -o")
            _write(path, picture.png)
            words = f"{made.job['model']}, seed {picture.seed}, {made.job['request']['steps']} steps"
            print(f"{path}: {words}", file=sys.stderr)
        if given.frames is not None:
            _write(given.frames, client.job(made.job["id"]).trajectory(ANIMATIONS[given.frames.suffix.lower()]))
            points = {frame.step for frame in made.frames}  # one frame of the animation shows all pictures
            print(f"{given.frames}: {len(points)} frames", file=sys.stderr)
    return 0


def _check_files(given: Namespace) -> None:
    """Raises SettingsError for files that cannot be written, before anything is made for them."""
    for path in (given.out, given.frames):
        if path is not None and not path.absolute().parent.is_dir():
            raise SettingsError(f"{path.parent} is not a folder")
        if path is not None and path.is_dir():
            raise SettingsError(f"{path} is a folder")
    if given.out.suffix.lower() in OTHER_FORMATS:
        raise SettingsError(f"-o {given.out}: pictures are written as PNG, not as {given.out.suffix}")
    if given.frames is not None and given.frames.absolute() == given.out.absolute():
        raise SettingsError("-o and --frames must name two files")


def _read_texts(path: Path) -> dict[str, str]:
    """The text chunks of a picture that ddpm made. Raises SettingsError."""
    try:
        with path.open("rb") as file:
            found = png_texts(file.read(MOST_BYTES))
    except OSError as error:
        raise SettingsError(f"--like: {path} could not be read: {error.strerror}") from None
    except ValueError:
        raise SettingsError(f"--like: {path} is not a PNG") from None
    if not {"model", "digest", "seed", "steps", "sampler", "numerics"} <= found.keys():
        raise SettingsError(f"--like: {path} does not say what made it; was it edited, or made by something else?")
    return found


def _request(given: Namespace, before: Mapping[str, str]) -> Request:
    """The request that the flags make, completed by the texts of the picture before. Raises SettingsError."""
    told = {name: vars(given)[name] for name in (*FIELDS, "clip") if vars(given)[name] is not None}
    usual = {"preset": PRESET} if not before and not told.keys() & {*CHOICES, "preset"} else {}
    return cast(Request, _repeated(before, told) | usual | told | {"frames": _frames(given)})


def _repeated(before: Mapping[str, str], told: Mapping[str, Any]) -> dict[str, Any]:
    """The request that made the picture before, without what the flags replace. Raises SettingsError."""
    try:
        request: dict[str, Any] = {name: read(before[name]) for name, read in WRITTEN.items() if name in before}
    except (ValueError, ArgumentTypeError):
        raise SettingsError("--like: the picture does not say in numbers what made it") from None
    if "clip" in before:
        request["clip"] = before["clip"] == "true"
    if told.keys() & {"preset", "plan"}:
        gone = {*CHOICES}
    else:  # a plan makes all the choices, or none
        gone = CHOICES - {"plan"} if "plan" in request and not told.keys() & CHOICES else {"plan"}
    if told.get("sampler", request.get("sampler")) != request.get("sampler"):
        gone |= {"eta", "variance", "order", "clip"}  # each has a default of its own for the other sampler
    if told.keys() & {"steps", "spacing"}:
        gone |= {"timesteps"}
    elif "timesteps" in {**request, **told}:
        gone |= {"steps", "spacing"}
    if told.keys() & {"label", "labels"}:
        gone |= {"label", "labels"}
    elif "n" in told and "labels" in request:
        request["labels"] = request["labels"][: told["n"]]
    if told.get("guidance") == 1:
        gone |= {"guidance_interval"}
    return {name: value for name, value in request.items() if name not in gone}


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


def _show(bar: "tqdm[None]", event: Event) -> None:
    """Draws an event of the job on the progress bar."""
    match event:
        case Queued(position=position):
            bar.set_description_str(f"waiting, {position} before")
        case Progress(step=step, steps=steps, eta_s=eta_s):
            bar.bar_format, bar.total, bar.n = COUNTED, steps, step
            bar.set_postfix_str(f"about {eta_s:.0f} s")


def _files(out: Path, made: Pictures) -> list[tuple[Path, Picture]]:
    """The file of each picture."""
    if len(made) == 1 or out == STDOUT:
        return [(out, picture) for picture in made]
    return [(out.with_stem(f"{out.stem}-{picture.seed}"), picture) for picture in made]


def _write(path: Path, data: bytes) -> None:
    """Writes a file or standard output. Raises SettingsError."""
    if path == STDOUT:
        sys.stdout.buffer.write(data)
        return
    try:
        path.write_bytes(data)
    except OSError as error:
        raise SettingsError(f"{path} could not be written: {error.strerror}") from None


def _other(before: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """The reason why the same request made another picture than before, if it did."""
    if before["digest"] != now["digest"]:
        return f"this is another picture: model {now['model']} has other weights than the one that made it"
    if before.get("plan") == now.get("plan") and before.get("plan_digest") != now.get("plan_digest"):
        return f"this is another picture: plan {now['plan']} was changed since"
    both = {before["sampler"], now["sampler"]} == {"dpmpp_2m"}
    if both and "order" not in before and now.get("spacing") in ("leading", "linspace"):
        return "this is another picture: the version that made it had other levels for dpmpp_2m"
    return None


def _differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The reasons why a repeated picture may differ from the one before. Both are given by their texts."""
    found = []
    if before and (other := _other(before, now)) is not None:
        found.append(other)
    if before and before["numerics"] != now["numerics"]:
        found.append(f"pixels may differ: it was made in {before['numerics']}, and now in {now['numerics']}")
    return found
