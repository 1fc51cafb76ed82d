"""Every scheduler's file, as diffusers has written it over the years, is understood or refused by option."""

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest

from model.checkpoint.card import read_card
from model.checkpoint.scheduler import CLASSES, noise_schedule, read_process
from model.errors import ModelRefused
from model.sampling.schedule import Thresholding, linear
from tests.model.convert.directories import write_model

# of July 2022; and two that need packages which the tests do without
NOT_HERE = {"GaussianDDPM", "DPMSolverSDE", "LMSDiscrete"}


def theirs(name: str) -> dict[str, Any]:
    """The options of a scheduler of diffusers, and their defaults."""
    parameters = inspect.signature(getattr(diffusers, f"{name}Scheduler")).parameters
    return {option: parameter.default for option, parameter in parameters.items()}


@pytest.mark.parametrize("name", sorted(CLASSES.keys() - NOT_HERE))
def test_what_a_file_leaves_out_is_what_its_class_has_in_diffusers(name: str) -> None:
    defaults = theirs(name)
    process = read_process({"_class_name": f"{name}Scheduler"}, {}, learned=False)

    ours = linear(1000, defaults["beta_start"], defaults["beta_end"])
    assert np.array_equal(process.schedule.alpha_bar, ours.alpha_bar)
    assert defaults["beta_schedule"] == "linear"
    assert process.prediction == defaults.get("prediction_type", "epsilon")
    assert process.clip == defaults.get("clip_sample", False)
    assert process.spacing == defaults.get("timestep_spacing", "leading" if name == "RePaint" else "linspace")


@pytest.mark.parametrize("name", sorted(CLASSES.keys() - NOT_HERE))
def test_every_file_that_diffusers_saves_with_defaults_is_understood(tmp_path: Path, name: str) -> None:
    saved = {option: value for option, value in theirs(name).items() if option not in ("tau_func", "solver_p")}
    (write_model(tmp_path) / "scheduler_config.json").write_text(
        json.dumps({"_class_name": f"{name}Scheduler"} | saved)
    )

    assert read_card(tmp_path).process.schedule.T == 1000


def refused(**options: Any) -> str:
    """The line with which a scheduler's file of these options is refused."""
    with pytest.raises(ModelRefused) as error:
        read_process({"_class_name": "DDPMScheduler"} | options, {}, learned=False)
    return str(error.value)


@pytest.mark.parametrize(
    ("old", "option", "value"),
    [
        ({"predict_epsilon": False}, "prediction", "sample"),
        ({"predict_epsilon": True}, "prediction", "epsilon"),
        ({"predict_epsilon": None}, "prediction", "epsilon"),
        ({"predict_epsilon": False, "prediction_type": "sample"}, "prediction", "sample"),
        ({"clip_predicted_image": False}, "clip", False),
        ({"clip_predicted_image": False, "clip_sample": True}, "clip", True),
        ({"timesteps": 50}, "default_steps", 50),
        ({"tensor_format": "pt", "timestep_values": None}, "clip", True),
        ({"_class_name": "FlaxDDPMScheduler"}, "spacing", "leading"),
    ],
    ids=str,
)
def test_options_of_former_versions_are_those_of_today(old: dict[str, Any], option: str, value: object) -> None:
    assert getattr(read_process({"_class_name": "DDPMScheduler"} | old, {}, learned=False), option) == value


def test_the_pipeline_may_name_the_class() -> None:
    index = {"scheduler": ["diffusers", "HeunDiscreteScheduler"]}

    assert read_process({}, index, learned=False).spacing == "linspace"
    assert read_process({"_class_name": "DDIMScheduler"}, index, learned=False).spacing == "leading"


def test_a_file_of_betas_alone_is_read_as_hos() -> None:
    assert read_process({"beta_end": 0.01}, {}, learned=False).clip
    assert np.array_equal(noise_schedule({"beta_end": 0.01}).alpha_bar, linear(1000, 1e-4, 0.01).alpha_bar)


REFUSED: list[dict[str, Any]] = [
    {"predict_epsilon": "false"},
    {"predict_epsilon": 0},
    {"clip_predicted_image": "no"},
    {"snr_shift_scale": 3.0},
    {"timestep_values": [999, 500, 0]},
    {"sigma_min": 0.1},
    {"sigma_data": 0.5},
    {"shift": 3.0},
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True},
    {"use_lu_lambdas": True},
    {"use_dynamic_shifting": True},
    {"use_karras_sigmas": 0},
    {"timestep_type": "continuous"},
    {"lambda_min_clipped": -5.1},
    {"solver_order": "2"},
    {"lower_order_final": 1},
    {"algorithm_type": 1},
    {"disable_corrector": "none"},
    {"flow_shift": True},
    {"variance_type": "fixed_large_log"},
    {"beta_schedule": "laplace"},
]


THRESHOLDS: list[tuple[str, Any]]
THRESHOLDS = [("dynamic_thresholding_ratio", value) for value in (0, 1.01, -0.5, float("nan"), None, "0.9", True)]
THRESHOLDS += [("sample_max_value", value) for value in (0.99, -1, float("inf"), float("nan"), None, [1.0], True)]


@pytest.mark.parametrize(("option", "value"), THRESHOLDS)
def test_a_threshold_that_cannot_be_is_refused_with_its_value(option: str, value: object) -> None:
    message = refused(thresholding=True, **{option: value})

    assert message.startswith(f"scheduler_config.json: {option} must be a number")
    assert message.endswith(f", got {json.dumps(value)}")


def test_thresholding_is_on_where_a_solver_would_not_clip() -> None:
    process = read_process({"_class_name": "DPMSolverMultistepScheduler", "thresholding": True}, {}, learned=False)

    assert process.clip and process.thresholding == Thresholding(0.995, 1.0)


@pytest.mark.parametrize("options", REFUSED, ids=str)
def test_what_may_change_pictures_is_refused_with_its_value(options: dict[str, Any]) -> None:
    (option, value), message = next(iter(options.items())), refused(**options)

    assert message.startswith(
        f"scheduler_config.json: {option.replace('clip_predicted_image', 'clip_sample')} must be "
    )
    assert f", got {json.dumps(value)}" in message


def test_two_names_of_one_option_must_agree() -> None:
    assert "predict_epsilon must be absent beside a" in refused(predict_epsilon=False, prediction_type="epsilon")


@pytest.mark.parametrize("name", ["LCM", "TCD", "CogVideoXDDIM", "EDMEuler", "FlowMatchEulerDiscrete", "ScoreSdeVe"])
def test_the_scheduler_of_another_process_is_refused_whatever_betas_it_tells(name: str) -> None:
    message = refused(_class_name=f"{name}Scheduler", beta_start=1e-4, beta_end=0.02)

    assert message.startswith("scheduler_config.json: _class_name must be one of DDPMScheduler, ")
    assert message.endswith(f'got "{name}Scheduler"')
