"""Plans in a model directory: `plans/NAME.json`, each a solver with its levels, and perhaps columns of its own.

A plan that cannot be used is left out, with the reason; the model and its other plans are served. Nothing that a file
says is used before it is checked: the columns that it may set are bounded, and the process that it is for is compared.
"""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from model.errors import ModelRefused, PlanError
from model.options import Options, lies_in, read_config, require_file, whole
from model.sampling.plan import SAMPLERS, resolve
from model.sampling.schedule import Process, SavedPlan, Variance

FOLDER = "plans"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
FILE = re.compile(rf"{FOLDER}/[^./][^/]*\.json")  # relative to the model directory
MAX_PLANS, MAX_LEVELS, MAX_TOLD_BYTES = 64, 200, 4096
LARGEST = 1e6  # of the numbers in rows
LARGEST_W = 20.0  # of an exponent: exp(w f) is finite while |f| is below 4, and nets learn f in [-1, 1]
COLUMNS = "mhneswgdab"  # that a file may set: those of the solver, not of the net, of clipping or of given noise
KEYS = {"sampler", "order", "eta", "variance", "timesteps", "clip", "columns", "rows", "process", "source", "measured"}


def read_plans(directory: Path, process: Process) -> tuple[dict[str, SavedPlan], dict[str, str]]:
    """({name: plan}, {name: why it is refused}). Raises OSError or ModelRefused if the disk fails."""
    folder, plans, refused = directory / FOLDER, dict[str, SavedPlan](), dict[str, str]()
    if not folder.is_dir():
        there = folder.exists() or folder.is_symlink()
        return {}, {FOLDER: f"{FOLDER} is not a directory"} if there else {}
    files = sorted(path for path in folder.iterdir() if FILE.fullmatch(f"{FOLDER}/{path.name}"))
    for path in files[: MAX_PLANS + 1]:
        name = path.name.removesuffix(".json")
        try:
            if path in files[MAX_PLANS:]:
                raise ModelRefused(f"the first {MAX_PLANS} plans are read, and there are {len(files)}")
            if not NAME.fullmatch(name):
                raise ModelRefused(f"a plan is named after its file, and {ascii(name)} is not {NAME.pattern}")
            plans[name] = _read(path, directory, process)
        except ModelRefused as error:
            if isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, PermissionError):
                raise
            refused[ascii(name)[1:-1]] = str(error)
    return plans, refused


def _read(path: Path, directory: Path, process: Process) -> SavedPlan:
    """The plan in a file. Raises ModelRefused."""
    require_file(path)
    if not lies_in(path, directory):
        raise ModelRefused(f"{path.name} leads out of the model directory")
    values, digest = read_config(path)
    options = Options(path.name, values)
    if unknown := sorted(values.keys() - KEYS):
        raise options.refuse(unknown[0], "absent", f"a plan has {', '.join(sorted(KEYS))}")
    saved = SavedPlan(
        digest=digest[:16],
        sampler=options.word("sampler", tuple(SAMPLERS), None),
        timesteps=_timesteps(options, process.schedule.T),
        order=options.optional("order", 1, MAX_LEVELS),
        eta=None if values.get("eta") is None else options.number("eta", 0, 1),
        variance=options.word("variance", (None, *get_args(Variance)), None),
        clip=options.word("clip", (None, True, False), None),
        columns=_columns(options, process),
        rows=_rows(options),
        source=_told(options, "source", ""),
        measured=_told(options, "measured", {}),
    )
    try:
        resolve(replace(process, plans={path.stem: saved}), plan=path.stem)
    except PlanError as error:
        raise ModelRefused(f"{path.name}: {error}") from error
    _require_process(options, process, saved)
    return saved


def _timesteps(options: Options, T: int) -> tuple[int, ...]:
    levels = [whole(level) or 0 for level in options.items("timesteps", None, min(T, MAX_LEVELS))]
    if not all(1 <= level <= T for level in levels):
        raise options.refuse("timesteps", f"integers in 1..{T}")
    return tuple(levels)


def _columns(options: Options, process: Process) -> str:
    columns = options.values.get("columns", "")
    if not isinstance(columns, str) or not set(columns) <= set(COLUMNS) or len(set(columns)) < len(columns):
        raise options.refuse("columns", f"different letters of {COLUMNS}")
    if "w" in columns and not process.learned_variance:
        raise options.refuse("columns", "without w", "this net has not learned a variance")
    return columns


def _rows(options: Options) -> tuple[tuple[float, ...], ...]:
    """The rows of the file's columns, if it has any. Raises ModelRefused."""
    columns, levels = options.values.get("columns"), options.values["timesteps"]
    if not columns:
        options.word("rows", (None,), None)
        return ()
    given = options.items("rows", None, MAX_LEVELS)
    if len(given) != len(levels) or any(not isinstance(row, list) or len(row) != len(columns) for row in given):
        raise options.refuse("rows", f"{len(levels)} lists, a row for each level, of {len(columns)} numbers")
    rows = [Options(f"{options.name}: rows[{i}]", dict(zip(columns, row, strict=True))) for i, row in enumerate(given)]
    if "s" in columns:
        for row in rows[:-1]:
            row.number("s", 0, LARGEST)
        rows[-1].number("s", 0, 0)  # noise of the last step would stay in the picture
    bounds = {column: LARGEST_W if column == "w" else LARGEST for column in columns}
    return tuple(tuple(row.number(column, -bound, bound) for column, bound in bounds.items()) for row in rows)


def _told(options: Options, option: str, default: Any) -> Any:
    """What a file tells of itself, which is sent to clients: of the default's type. Raises ModelRefused."""
    value = options.values.get(option, default)
    kind = "a text" if default == "" else "an object"
    try:
        size = len(json.dumps(value, allow_nan=False, ensure_ascii=False).encode())
    except (ValueError, RecursionError):  # not finite; half of a surrogate pair; nested deeply
        size = MAX_TOLD_BYTES + 1
    if not isinstance(value, type(default)) or size > MAX_TOLD_BYTES:
        raise options.refuse(option, f"{kind} that JSON can hold in {MAX_TOLD_BYTES} bytes")
    told = [*value.values()] if isinstance(value, dict) else []
    inner = [one for each in told if isinstance(each, dict) for one in each.values()]
    flat = [each for each in told if not isinstance(each, dict)] + inner
    if any(isinstance(one, list | dict) for one in flat):
        raise options.refuse(option, "an object of numbers and texts, or of objects of these")
    return value


def _require_process(options: Options, process: Process, saved: SavedPlan) -> None:
    """Raises ModelRefused unless the file says that it is for this process. Rows hold only for the amplitudes that they
    were computed from; levels alone may be for others."""
    given = options.values.get("process")
    if not isinstance(given, dict):
        raise options.refuse("process", "an object of T, prediction and alpha_bar")
    of = Options(f"{options.name}: process", given)
    if unknown := sorted(given.keys() - {"T", "prediction", "alpha_bar"}):
        raise of.refuse(unknown[0], "absent")
    of.word("T", (process.schedule.T,), None)
    of.word("prediction", (process.prediction,), None)
    if not saved.rows and "alpha_bar" not in given:
        return
    amplitudes = of.items("alpha_bar", None, MAX_LEVELS)
    if len(amplitudes) != len(saved.timesteps):
        raise of.refuse("alpha_bar", f"{len(saved.timesteps)} numbers, one of each level")
    for t, amplitude in zip(saved.timesteps, amplitudes, strict=True):
        ours = float(process.schedule.alpha_bar[t])
        slack, name = 1e-4 + 1e-3 * ours, f"alpha_bar_{t}"
        Options(of.name, {name: amplitude}).number(name, round(ours - slack, 6), round(ours + slack, 6))
