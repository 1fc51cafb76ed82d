"""The other commands that ask a server, or tune: models, bench, tune."""

import json
from pathlib import Path

import pytest

from model.checkpoint.card import read_card
from model.sampling.plan import resolve
from server.cli import main
from server.settings import Settings
from server.web.app import create_app
from tests.model.convert.directories import write_model, write_plan
from tests.server.fakes import FakeBackend
from tests.server.web.lines import threaded
from tests.test_docs import ROOT


def test_models_are_listed_with_and_without_a_server(
    weights: Path, url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DDPM_WEIGHTS", str(weights))
    assert main.main(["models"]) == main.main(["models", "--url", url]) == 0

    _, here, _, there = (line.split() for line in capsys.readouterr().out.splitlines())
    assert here[:6] == there[:6] == ["tiny", "1x8x8", "-", "30", "30", "epsilon"]
    assert here[6:] == ["-", "-", "-", there[-1]]
    assert (there[6], there[-2]) == ("cpu", "yes")


def test_models_that_would_be_refused_are_named_beside_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_model(tmp_path / "weights" / "good").parent
    write_model(folder / "text", {"cross_attention_dim": 10})
    write_plan(folder / "good", b"[]")
    monkeypatch.setenv("DDPM_WEIGHTS", str(folder))
    app = create_app(Settings(weights=str(folder), data_dir=tmp_path / "data"), FakeBackend())
    with threaded(app) as made:
        for command in (["models"], ["models", "--url", made.url]):
            assert main.main(command) == 0

            said = capsys.readouterr()
            assert [line.split()[0] for line in said.out.splitlines()] == ["name", "good"]
            plan, model = said.err.splitlines()
            assert plan == "good: plan fast is refused: fast.json must be a JSON object"
            assert model.startswith("text is refused: config.json: cross_attention_dim must be null, got 10: ")


def test_the_weights_that_were_taken_are_named_where_there_are_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model(tmp_path / "run", folders=True)
    (write_model(tmp_path / "run" / "unet_ema") / "scheduler_config.json").unlink()
    monkeypatch.setenv("DDPM_WEIGHTS", str(tmp_path))
    assert main.main(["models"]) == 0

    name = "diffusion_pytorch_model.safetensors"
    told = f"run: weights: took 'unet_ema/{name}' (an average over training); left 'unet/{name}'\n"
    assert capsys.readouterr().err == told


def test_a_benchmark_goes_up_to_all_slots(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["bench", "--url", url, "--steps", "3", "--times", "1"]) == 0

    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == ["1", "2", "4"]
    assert all(float(rate) > 0 for _, _, rate in rows)


@pytest.mark.parametrize("seconds", ["nan", "0", "-1", "inf", "1e300", "soon"])
def test_a_time_that_cannot_be_waited_for_is_refused(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main.main(["models", "--url", "http://127.0.0.1:1", "--timeout", seconds])

    assert "argument --timeout: must be a positive number of seconds, at most 1e+09" in capsys.readouterr().err


def test_a_plan_is_tuned_into_a_model_that_then_has_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_model(tmp_path / "tiny")
    words = ["tune", str(model), "--steps", "2", "--seeds", "2", "--updates", "1", "--batch", "1", "--device", "cpu"]
    assert main.main(words) == 0

    process = read_card(model).process
    told = json.loads(capsys.readouterr().out.partition(".json: ")[2])
    assert list(process.plans) == ["tuned-2"] and not process.refused_plans
    assert process.plans["tuned-2"].measured == told and told["rms"] <= told["rms_by_hand"]
    assert resolve(process, plan="tuned-2").steps == 2
    assert sorted(path.name for path in (model / "plans").iterdir()) == [".teacher.npz", "tuned-2.json"]


def test_a_plan_has_no_more_steps_than_the_teacher_has_levels(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["tune", str(ROOT / "weights" / "digits"), "--steps", "81"]) == 2
    assert capsys.readouterr().err == "ddpm: --steps must lie in 1..80 for digits, got 81\n"


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (["--steps", "0"], 2, "--steps must lie in 1..30 for tiny, got 0"),
        (["--steps", "31"], 2, "--steps must lie in 1..30 for tiny, got 31"),
        (["--seeds", "5000"], 2, "--seeds must lie in 1..4096, got 5000"),
        (["--name", "../tuned"], 2, "--name must be 1..64 letters, digits, -, _ and ."),
        (["--device", "abacus"], 6, "--device must be auto, cpu, cuda or cuda:N, got 'abacus'"),
        (["--out", "DAMAGED"], 3, ".teacher.npz is damaged; delete it, and tuning begins anew"),
        (["--out", "FILE"], 7, "FILE cannot be written: File exists"),
    ],
)
def test_a_tuning_that_cannot_begin_says_so_in_one_line(
    flags: list[str],
    code: int,
    said: str,
    weights: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").touch()
    (tmp_path / "DAMAGED").mkdir()
    (tmp_path / "DAMAGED" / ".teacher.npz").write_bytes(b"not quite")

    words = ["tune", str(weights / "tiny"), "--out", "new", "--steps", "2", "--batch", "1", "--device", "cpu"]

    assert main.main([*words, *flags]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ddpm: ") and said in line
