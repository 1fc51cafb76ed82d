"""Plans as files: what a sound one says is used, and one that is not sound is refused by the name of what is wrong."""

import errno
import json
import math
import os
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.checkpoint.card import read_card
from model.checkpoint.plans import FOLDER, MAX_PLANS, read_plans
from model.digests import file_digest
from model.errors import ModelRefused, PlanError
from model.options import MAX_CONFIG_BYTES
from model.sampling.plan import SAMPLERS, plan, resolve
from model.sampling.schedule import Process, cosine
from model.sampling.table import COLUMNS, E, M, N, S, U
from tests.model.convert.directories import AMPLITUDES, LEVELS, PLAN, write_model, write_plan
from tests.model.tiny import PROCESS, T

ROOT = Path(__file__).parents[3]
ROWS: dict[str, Any] = PLAN | {"columns": "ms", "rows": [[1, 0.5], [2.5, 0.25], [-3, 0]]}
LEARNED = replace(PROCESS, learned_variance=True)


def planning(directory: Path, content: Any, process: Process = PROCESS) -> Process:
    """The process with the plan `fast` of this content, which is sound."""
    write_plan(directory, content)
    plans, refused = read_plans(directory, process)
    assert refused == {}
    return replace(process, plans=plans)


def why(directory: Path, process: Process = PROCESS) -> str:
    """The line with which the plan `fast` is refused."""
    plans, refused = read_plans(directory, process)
    assert plans == {} and refused.keys() == {"fast"}
    assert "\n" not in refused["fast"] and len(refused["fast"]) < 250
    return refused["fast"]


# Good ones


def test_a_plan_makes_every_choice_but_the_noise(tmp_path: Path) -> None:
    process = planning(tmp_path, {**PLAN, "eta": 0.5, "clip": False, "source": "by hand", "measured": {"fid": 3.7}})
    path = tmp_path / FOLDER / "fast.json"
    choice = resolve(process, plan="fast", noise="torch")

    assert choice == replace(
        resolve(PROCESS, "ddim", eta=0.5, clip=False, timesteps=LEVELS, noise="torch"),
        plan="fast",
        plan_digest=file_digest(path)[:16],
    )
    assert (process.plans["fast"].source, process.plans["fast"].measured) == ("by hand", {"fid": 3.7})


@pytest.mark.parametrize("noise", ["philox", "torch"])
@pytest.mark.parametrize(
    "fields", [{"sampler": "ddpm", "variance": "large"}, {"sampler": "ddim", "eta": 0.5}, {"sampler": "dpmpp_2m"}]
)
def test_a_file_that_repeats_a_solvers_rows_gives_its_table(tmp_path: Path, fields: Any, noise: Any) -> None:
    """On top of its own rows, and of those of another solver."""
    columns = "sadmbnehg"
    table = plan(PROCESS, resolve(PROCESS, timesteps=LEVELS, **fields)).rows
    rows = {"columns": columns, "rows": table[:, [COLUMNS.index(column) for column in columns]].tolist()}
    expected = plan(PROCESS, resolve(PROCESS, timesteps=LEVELS, noise=noise, clip=True, **fields))

    for solver in (fields, {"sampler": "greedy"}):
        process = planning(tmp_path, PLAN | solver | rows | {"clip": True})
        made = plan(process, resolve(process, plan="fast", noise=noise))
        assert np.array_equal(made.rows, expected.rows)
        assert (made.t.tolist(), made.noise) == ([*LEVELS, 0], noise)


def test_the_columns_of_a_file_take_the_place_of_the_solvers(tmp_path: Path) -> None:
    process = planning(tmp_path, ROWS)
    usual = plan(PROCESS, resolve(PROCESS, "ddim", timesteps=LEVELS)).rows
    ours, given = (plan(process, resolve(process, plan="fast", noise=noise)).rows for noise in ("philox", "torch"))

    assert ours[:, M].tolist() == given[:, M].tolist() == [1, 2.5, -3]
    assert (ours[:, S].tolist(), ours[:, U].tolist()) == ([0.5, 0.25, 0], [0, 0, 0])
    assert (given[:, S].tolist(), given[:, U].tolist()) == ([0, 0, 0], [0.5, 0.25, 0])
    assert np.array_equal(ours[:, [N, E]], usual[:, [N, E]])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_noise_decides_nothing_else_of_a_plan(tmp_path: Path, sampler: str) -> None:
    process = planning(tmp_path, PLAN | {"sampler": sampler})
    ours, given = (plan(process, resolve(process, plan="fast", noise=noise)).rows for noise in ("philox", "torch"))

    assert np.array_equal(given[:, U], ours[:, S])
    assert np.array_equal(np.delete(given, [S, U], 1), np.delete(ours, [S, U], 1))


def test_levels_alone_need_not_say_which_amplitudes_they_were_chosen_for(tmp_path: Path) -> None:
    process = planning(tmp_path, PLAN | {"process": {"T": T, "prediction": "epsilon"}})

    assert resolve(process, plan="fast").timesteps == tuple(LEVELS)


def test_amplitudes_may_be_rounded(tmp_path: Path) -> None:
    rounded = [round(amplitude, 4) for amplitude in AMPLITUDES]

    assert planning(tmp_path, ROWS | {"process": PLAN["process"] | {"alpha_bar": rounded}}).plans.keys() == {"fast"}


def test_a_card_has_the_plans_of_its_directory_whose_digest_is_the_same(tmp_path: Path) -> None:
    before = read_card(write_model(tmp_path))
    write_plan(tmp_path, PLAN, "a")
    write_plan(tmp_path, PLAN | {"timesteps": [31]}, "b")
    write_plan(tmp_path, ROWS, "config")  # no configuration of a net
    for name in (".half.json", "README.md", "c.json.part"):
        (tmp_path / FOLDER / name).write_text("no plan")
    card = read_card(tmp_path)

    assert [*card.process.plans] == ["a", "config"]
    assert [*card.process.refused_plans] == ["b"]
    assert (before.process.plans, before.process.refused_plans) == ({}, {})
    assert card.digest == before.digest
    assert read_card(tmp_path, plans=before.process.plans).process.plans == {}


# Bad files

WITHOUT_LEVELS = {key: value for key, value in PLAN.items() if key != "timesteps"}
BAD: list[tuple[str, Any]] = [
    ("fast.json is not valid JSON: Unterminated string starting at: line 1 column", json.dumps(ROWS).encode()[:-40]),
    ("fast.json is not valid JSON: Expecting value: line 1 column 1", b""),
    ("fast.json is not valid JSON: 'utf-8' codec can't decode byte 0xff in position 13", b'{"sampler": "\xff"}'),
    ("fast.json is not valid JSON: it is nested too deeply", b'{"measured": ' + b"[" * 200_000),
    ("fast.json is not valid JSON: a key occurs twice", b'{"sampler": "ddim", "sampler": "ddpm"}'),
    (f"fast.json is larger than {MAX_CONFIG_BYTES} bytes", b" " * MAX_CONFIG_BYTES + b"{}"),
    ("fast.json must be a JSON object", [PLAN]),
    ("fast.json: steps must be absent, got 3: a plan has clip, columns, ", PLAN | {"steps": 3}),
    ("fast.json: _use_default_values must be absent", ROWS | {"_use_default_values": ["rows", "columns"]}),
    ("fast.json: sampler must be one of ", PLAN | {"sampler": "euler"}),
    ("fast.json: sampler must be one of ", PLAN | {"sampler": ["ddim"]}),
    ("fast.json: timesteps must be a list of 1..30 items, got null", WITHOUT_LEVELS),
    ("fast.json: timesteps must be a list of 1..30 items, got []", PLAN | {"timesteps": []}),
    ("fast.json: timesteps must be a list of 1..30 items, got [30, ", PLAN | {"timesteps": [*range(30, 0, -1), 1]}),
    ("fast.json: timesteps must be integers in 1..30, got [31, 2]", PLAN | {"timesteps": [31, 2]}),
    ("fast.json: timesteps must be integers in 1..30, got [2, 0]", PLAN | {"timesteps": [2, 0]}),
    ("fast.json: timesteps must be integers in 1..30, got [2.5]", PLAN | {"timesteps": [2.5]}),
    ("fast.json: timesteps must be integers in 1..30, got [NaN]", PLAN | {"timesteps": [math.nan]}),
    ("fast.json: timesteps must descend without repeats, got 5 behind 5", PLAN | {"timesteps": [5, 5]}),
    ("fast.json: timesteps must descend without repeats, got 6 behind 5", PLAN | {"timesteps": [5, 6]}),
    ("fast.json: order applies to", PLAN | {"order": 2}),
    ("fast.json: order must be an integer in 1..", PLAN | {"order": "2"}),
    ("fast.json: eta must be a number in 0..1, got 1.5", PLAN | {"eta": 1.5}),
    ("fast.json: eta must be a number in 0..1, got NaN", PLAN | {"eta": math.nan}),
    ("fast.json: eta applies to ddim only, not to ddpm", PLAN | {"sampler": "ddpm", "eta": 0.5}),
    ("fast.json: variance must be small or large: this net", PLAN | {"sampler": "ddpm", "variance": "learned"}),
    ('fast.json: variance must be one of null, "small"', PLAN | {"sampler": "ddpm", "variance": "huge"}),
    ("fast.json: clip must be one of null, true, false, got 1", PLAN | {"clip": 1}),
    ('fast.json: columns must be different letters of mhneswgdab, got "mk"', ROWS | {"columns": "mk"}),
    ('fast.json: columns must be different letters of mhneswgdab, got "mm"', ROWS | {"columns": "mm"}),
    ('fast.json: columns must be different letters of mhneswgdab, got ["m"]', ROWS | {"columns": ["m"]}),
    ('fast.json: columns must be without w, got "mw": this net', ROWS | {"columns": "mw"}),
    ("fast.json: rows must be a list of 1..200 items, got null", PLAN | {"columns": "ms"}),
    ("fast.json: rows must be one of null, got [[", PLAN | {"rows": ROWS["rows"]}),
    ("fast.json: rows must be 3 lists, a row for each level, of 2 numbers", ROWS | {"rows": ROWS["rows"][:2]}),
    ("fast.json: rows must be 3 lists, a row for each level, of 1 numbers", ROWS | {"columns": "m"}),
    ("fast.json: rows must be 3 lists, a row for each level, of 2 numbers", ROWS | {"rows": [1, 2, 3]}),
    ("fast.json: rows[1]: m must be a number in -1000000.0..1000000.0, got NaN", (1, "m", math.nan)),
    ("fast.json: rows[1]: m must be a number in -1000000.0..1000000.0, got -Infinity", (1, "m", -math.inf)),
    ("fast.json: rows[0]: m must be a number in -1000000.0..1000000.0, got 1000001.0", (0, "m", 1000001.0)),
    ("fast.json: rows[0]: m must be a number in -1000000.0..1000000.0, got 1000000000", (0, "m", 10**400)),
    ("fast.json: rows[0]: m must be a number in -1000000.0..1000000.0, got true", (0, "m", True)),
    ("fast.json: rows[0]: m must be a number in -1000000.0..1000000.0, got null", (0, "m", None)),
    ("fast.json: rows[0]: s must be a number in 0..1000000.0, got -0.5", (0, "s", -0.5)),
    ("fast.json: rows[2]: s must be a number in 0..0, got 0.5", (2, "s", 0.5)),
    ("fast.json: process must be an object of T, prediction and alpha_bar, got null", PLAN | {"process": None}),
    ("fast.json: process: T must be one of 30, got 1000", PLAN | {"process": PLAN["process"] | {"T": 1000}}),
    ('fast.json: process: prediction must be one of "epsilon", got "sample"', {"prediction": "sample"}),
    ("fast.json: process: beta must be absent, got 1", {"beta": 1}),
    ("fast.json: process: alpha_bar must be a list of 1..200 items, got null", {"alpha_bar": None}),
    ("fast.json: process: alpha_bar must be 3 numbers, one of each level", {"alpha_bar": AMPLITUDES[:2]}),
    ("fast.json: process: alpha_bar_17 must be a number in 0.", {"alpha_bar": [AMPLITUDES[0], 0.9, AMPLITUDES[2]]}),
    ("fast.json: process: alpha_bar_17 must be a number in 0.", {"alpha_bar": [AMPLITUDES[0], math.nan, 0.5]}),
    ("fast.json: source must be a text that JSON can hold in 4096 bytes", PLAN | {"source": "s" * 4096}),
    ("fast.json: source must be a text that JSON can hold in 4096 bytes", PLAN | {"source": "\ud800"}),
    ("fast.json: measured must be an object that JSON can hold in 4096 bytes", PLAN | {"measured": [1]}),
    ("fast.json: measured must be an object of numbers and texts, or of ", PLAN | {"measured": {"fid": [1]}}),
    ("fast.json: measured must be an object of numbers and texts, or of ", PLAN | {"measured": {"a": {"b": {}}}}),
    ("fast.json: measured must be an object that JSON can hold in 4096 bytes", PLAN | {"measured": {"fid": math.inf}}),
]


def content(bad: Any) -> Any:
    """What the file holds: a row with one number changed, a process with one field changed, or all of it."""
    if isinstance(bad, tuple):
        i, column, value = bad
        rows = [
            [value if (i, column) == (j, c) else number for c, number in zip("ms", row, strict=True)]
            for j, row in enumerate(ROWS["rows"])
        ]
        return ROWS | {"rows": rows}
    return ROWS | {"process": PLAN["process"] | bad} if isinstance(bad, dict) and "sampler" not in bad else bad


@pytest.mark.parametrize(("reason", "bad"), BAD)
def test_a_bad_file_is_refused_with_the_field_and_its_bounds(tmp_path: Path, reason: str, bad: Any) -> None:
    write_plan(tmp_path, content(bad))
    began = time.process_time()

    assert why(tmp_path).startswith(reason)
    assert time.process_time() - began < 1


def test_a_plan_for_another_noise_schedule_is_refused(tmp_path: Path) -> None:
    write_plan(tmp_path, PLAN)

    told = why(tmp_path, replace(PROCESS, schedule=cosine(T)))
    assert told == f"fast.json: process: alpha_bar_30 must be a number in 0.00154..0.001744, got {AMPLITUDES[0]}"


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "link to nothing", "link out"])
def test_only_a_regular_file_of_the_directory_is_read(tmp_path: Path, kind: str) -> None:
    outside = write_plan(tmp_path, PLAN).rename(tmp_path / "outside.json")
    (tmp_path / "model" / FOLDER).mkdir(parents=True)
    path = tmp_path / "model" / FOLDER / "fast.json"
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case _:
            path.symlink_to({"device": "/dev/zero", "link to nothing": "nothing", "link out": str(outside)}[kind])

    out = kind == "link out"
    assert (
        why(tmp_path / "model") == f"fast.json {'leads out of the model directory' if out else 'is not a regular file'}"
    )


def test_a_file_that_must_not_be_read_is_refused_and_a_disk_that_fails_is_the_models_trouble(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(path: Path, *given: Any) -> None:
        raise error

    write_plan(tmp_path, PLAN)
    monkeypatch.setattr(Path, "open", fails)
    error: OSError = PermissionError(errno.EACCES, "Permission denied")
    assert why(tmp_path) == "fast.json could not be read: Permission denied"

    error = OSError(errno.EIO, "damaged")
    with pytest.raises(ModelRefused, match="^fast.json could not be read: damaged$"):
        read_plans(tmp_path, PROCESS)


def test_a_link_within_the_directory_is_followed(tmp_path: Path) -> None:
    write_plan(tmp_path, PLAN, "fast").rename(tmp_path / "shared.json")
    (tmp_path / FOLDER / "fast.json").symlink_to("../shared.json")

    assert read_plans(tmp_path, PROCESS)[0].keys() == {"fast"}


def test_names_that_no_request_could_have_and_too_many_plans_are_refused(tmp_path: Path) -> None:
    write_plan(tmp_path, PLAN, "a plan")
    (tmp_path / FOLDER / "\udcff.json").write_text("{}")
    assert read_plans(tmp_path, PROCESS)[1].keys() == {"a plan", r"\udcff"}

    for i in range(MAX_PLANS):
        write_plan(tmp_path, PLAN, f"b{i:02}")
    plans, refused = read_plans(tmp_path, PROCESS)
    assert (len(plans), plans.keys() & {"b62", "b63"}) == (MAX_PLANS - 1, {"b62"})
    assert refused["b63"] == f"the first {MAX_PLANS} plans are read, and there are {MAX_PLANS + 2}"


def test_what_stands_in_the_place_of_the_folder_is_told_of(tmp_path: Path) -> None:
    (tmp_path / FOLDER).write_text("no folder")

    assert read_plans(tmp_path, PROCESS) == ({}, {FOLDER: "plans is not a directory"})


# Bad choices


@pytest.mark.parametrize(
    ("field", "beside"),
    [
        ("sampler", "ddim"),
        ("steps", 3),
        ("order", 2),
        ("timesteps", LEVELS),
        ("spacing", "trailing"),
        ("clip", True),
        ("eta", 0.0),
        ("variance", "small"),
    ],
)
def test_whatever_a_plan_chooses_is_refused_beside_it(tmp_path: Path, field: str, beside: Any) -> None:
    with pytest.raises(PlanError, match=f"^{field} must be left out beside plan, which chooses it$") as refused:
        resolve(planning(tmp_path, PLAN), plan="fast", **{field: beside})
    assert refused.value.field == field


def test_a_plan_that_there_is_not_is_refused_with_those_that_there_are(tmp_path: Path) -> None:
    write_plan(tmp_path, PLAN, "slow")
    process = replace(planning(tmp_path, PLAN), refused_plans={"bad": "bad.json must be a JSON object"})
    wrong = [("none", process), ("bad", process), ("none", PROCESS)]
    reasons = ["plan must be one of fast, slow", "plan bad is refused: bad.json must be a JSON object"]
    reasons += ["plan must be left out, for this model has none"]
    for (name, of), reason in zip(wrong, reasons, strict=True):
        with pytest.raises(PlanError) as refused:
            resolve(of, plan=name)
        assert (refused.value.field, str(refused.value)) == ("plan", reason)


def test_an_exponent_that_would_make_every_picture_infinite_is_refused(tmp_path: Path) -> None:
    write_plan(tmp_path, ROWS | {"columns": "mw", "rows": [[1, 20], [1, -20.5], [1, 0]]})

    assert why(tmp_path, LEARNED) == "fast.json: rows[1]: w must be a number in -20.0..20.0, got -20.5"


@pytest.mark.parametrize("fields", [{"sampler": "ddpm"}, {"columns": "w", "rows": [[0.5], [0.5], [0]]}])
def test_a_learned_variance_leaves_no_room_for_noise_from_outside(tmp_path: Path, fields: dict[str, Any]) -> None:
    process = planning(tmp_path, PLAN | fields, LEARNED)
    plan(process, resolve(process, plan="fast"))

    with pytest.raises(PlanError, match="^noise must be philox with plan fast, which adds") as refused:
        resolve(process, plan="fast", noise="torch")
    assert refused.value.field == "noise"


def test_a_table_is_never_made_of_another_file_than_was_chosen(tmp_path: Path) -> None:
    choice = resolve(planning(tmp_path, ROWS), plan="fast")
    changed = planning(tmp_path, ROWS | {"source": "another"})

    for process in (changed, PROCESS):
        with pytest.raises(PlanError, match="^plan fast is not what it was when it was chosen$"):
            plan(process, choice)


def test_the_example_of_the_documentation_is_a_plan_for_the_digits(tmp_path: Path) -> None:
    (example,) = re.findall("```json\n(.*?)```", (ROOT / "docs" / "models.md").read_text(), re.DOTALL)
    write_plan(tmp_path, example.encode())
    plans, refused = read_plans(tmp_path, read_card(ROOT / "benchmarks" / "digits").process)

    assert ([*plans], refused) == (["fast"], {})
