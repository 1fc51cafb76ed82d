"""What a model directory says of itself, and how it is refused: in one line, quickly, and without spending memory."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.checkpoint.card import WEIGHTS, read_card
from model.errors import ModelRefused
from model.options import MAX_CONFIG_BYTES
from model.sampling.schedule import NoiseSchedule, Process, Thresholding, cosine, linear, scaled_linear, sigmoid
from tests.model.convert.directories import CONFIG, SCHEDULER, weights, write_model
from tests.model.convert.refusals import refusal
from tests.model.tiny import ARCHITECTURE, PROCESS, T


def why(directory: Path) -> str:
    """The line with which `read_card` refuses this directory."""
    return refusal(lambda: read_card(directory))


# Good ones


def test_a_directory_saved_by_diffusers_is_understood(tmp_path: Path) -> None:
    card = read_card(write_model(tmp_path / "digits"))

    assert (card.name, card.weights) == ("digits", tmp_path / "digits" / WEIGHTS)
    assert card.architecture == ARCHITECTURE
    assert np.array_equal(card.process.schedule.alpha_bar, PROCESS.schedule.alpha_bar)
    assert (card.process.variance, card.process.prediction, card.process.clip) == ("small", "epsilon", True)
    assert card.process.default_steps == T


def test_folders_say_the_same_as_a_flat_directory(tmp_path: Path) -> None:
    flat, folders = read_card(write_model(tmp_path / "a")), read_card(write_model(tmp_path / "b", folders=True))

    assert folders.architecture == flat.architecture
    assert folders.digest == flat.digest
    assert folders.weights == tmp_path / "b" / "unet" / WEIGHTS


def test_the_card_is_read_without_torch(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from model.checkpoint.card import read_card\n"
    code += "read_card(Path(sys.argv[1])).digest"
    lines = [code, "sys.exit('torch' in sys.modules)"]

    assert subprocess.run([sys.executable, "-c", "\n".join(lines), write_model(tmp_path)]).returncode == 0


def test_options_that_diffusers_passes_over_are_passed_over(tmp_path: Path) -> None:
    """A file may list options that were not given when it was made: `from_config` takes today's defaults for them."""
    write_model(tmp_path, {"_use_default_values": ["freq_shift"], "freq_shift": 1.0}, {"_use_default_values": 7})
    assert asdict(read_card(tmp_path).architecture)["freq_shift"] == 0.0

    write_model(tmp_path, scheduler={"_use_default_values": ["clip_sample", "prediction_type"], "clip_sample": False})
    assert read_card(tmp_path).process.clip


def test_the_index_may_name_the_default_steps(tmp_path: Path) -> None:
    write_model(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "DDPMPipeline", "default_steps": 7}')

    assert read_card(tmp_path).process.default_steps == 7


@pytest.mark.parametrize("steps", [0, T + 1, True, "7", 1e999])
def test_default_steps_must_be_possible(tmp_path: Path, steps: object) -> None:
    write_model(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({"default_steps": steps}))

    assert why(tmp_path).startswith(f"model_index.json: default_steps must be an integer in 1..{T}, got")


def test_keys_of_2022_are_read_and_unknown_ones_passed_over(tmp_path: Path) -> None:
    write_model(tmp_path, config={"_module": "modeling_ddpm.py", "_class_name": "UNetModel", "resamp_with_conv": True})
    old = {"_class_name": "GaussianDDPMScheduler", "timesteps": 50, "timestep_values": None, "beta_schedule": "linear"}
    (tmp_path / "scheduler_config.json").write_text(json.dumps(old))
    schedule = read_card(tmp_path).process.schedule

    assert np.array_equal(schedule.alpha_bar, linear(50).alpha_bar)


def test_the_options_of_the_summer_of_2022_are_those_of_today(tmp_path: Path) -> None:
    old = {"image_size": 8, "block_channels": [8, 16], "num_res_blocks": 1, "resnet_num_groups": 4, "resnet_eps": 1e-5}
    old |= {"down_blocks": ["UNetResDownBlock2D", "UNetResAttnDownBlock2D"], "downscale_freq_shift": 0}
    old |= {"up_blocks": ["UNetResAttnUpBlock2D", "UNetResUpBlock2D"], "num_head_channels": 8, "resnet_act_fn": "silu"}
    old |= {"_class_name": "UNetUnconditionalModel", "in_channels": 1, "out_channels": 1, "conv_resample": True}
    (write_model(tmp_path) / "config.json").write_text(json.dumps(old))

    assert read_card(tmp_path).architecture == ARCHITECTURE


@pytest.mark.parametrize("size", [[16, 24], (16.0, 24.0)])
def test_a_picture_may_be_higher_than_wide(tmp_path: Path, size: object) -> None:
    assert read_card(write_model(tmp_path, {"sample_size": size})).shape == (1, 16, 24)


def test_whole_numbers_may_be_written_as_floats(tmp_path: Path) -> None:
    floats = {"sample_size": 8.0, "in_channels": 1.0, "block_out_channels": [8.0, 16.0], "layers_per_block": 1.0}
    card = read_card(write_model(tmp_path, floats | {"downsample_padding": 1.0}, {"num_train_timesteps": float(T)}))

    assert card.architecture == ARCHITECTURE
    assert card.process.schedule.T == T


def test_the_file_of_another_scheduler_for_the_same_process_will_do(tmp_path: Path) -> None:
    assert read_card(write_model(tmp_path, scheduler={"_class_name": "DDIMScheduler"})).process.schedule.T == T


def test_the_schedule_is_the_one_that_is_named(tmp_path: Path) -> None:
    card = read_card(write_model(tmp_path, scheduler={"beta_schedule": "squaredcos_cap_v2"}))

    assert np.array_equal(card.process.schedule.alpha_bar, cosine(T).alpha_bar)


# The digest


def test_the_digest_is_that_of_weights_and_configurations_only(tmp_path: Path) -> None:
    before = read_card(write_model(tmp_path)).digest
    (tmp_path / "README.md").write_text("A model of digits.")
    (tmp_path / "training.jsonl").write_text("{}")

    assert before.startswith("sha256:") and len(before) == 71
    assert read_card(tmp_path).digest == before


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "scheduler_config.json"])
def test_the_digest_changes_with_a_single_byte(tmp_path: Path, name: str) -> None:
    before = read_card(write_model(tmp_path)).digest
    text = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(text[:-1] + bytes([text[-1] ^ 1]) if name == WEIGHTS else text + b" ")

    assert read_card(tmp_path).digest != before


def test_the_digest_is_that_of_the_schedulers_class_too_wherever_it_is_told(tmp_path: Path) -> None:
    (write_model(tmp_path) / "scheduler_config.json").write_text('{"beta_end": 0.02}')
    before = read_card(tmp_path).digest
    (tmp_path / "model_index.json").write_text('{"scheduler": ["diffusers", "HeunDiscreteScheduler"]}')

    assert read_card(tmp_path).digest != before


def test_the_readme_is_shown_but_no_file_outside_the_directory_that_it_links_to(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("root:x:0:0")
    model = write_model(tmp_path / "model")
    assert read_card(model).readme == ""

    (model / "README.md").write_bytes(b"Digits \xff" + b"!" * 2 * MAX_CONFIG_BYTES)
    assert read_card(model).readme.startswith("Digits \ufffd!")
    assert len(read_card(model).readme) == MAX_CONFIG_BYTES

    (model / "README.md").unlink()
    (model / "README.md").symlink_to(secret)
    assert read_card(model).readme == ""


# What is missing, or not a file


@pytest.mark.parametrize("name", ["config.json", "scheduler_config.json", WEIGHTS])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    (write_model(tmp_path) / name).unlink()

    assert why(tmp_path) == f"{name} is missing"


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    assert why(tmp_path / "nothing") == "nothing is not a directory"
    (tmp_path / "file").write_text("")
    assert why(tmp_path / "file") == "file is not a directory"


def test_a_pickle_is_never_read_and_the_refusal_says_so(tmp_path: Path) -> None:
    (write_model(tmp_path) / WEIGHTS).rename(tmp_path / "diffusion_pytorch_model.bin")

    assert why(tmp_path) == (
        f"{WEIGHTS} is missing ('diffusion_pytorch_model.bin' is a pickle, which is never read; "
        "`ddpm convert` makes safetensors of it)"
    )


def test_even_a_hostile_file_name_stays_on_one_line(tmp_path: Path) -> None:
    (write_model(tmp_path) / WEIGHTS).rename(tmp_path / "a\nb.bin")

    assert "'a\\nb.bin' is a pickle" in why(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "scheduler_config.json", "model_index.json", WEIGHTS])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "link to itself"])
def test_only_regular_files_are_opened(tmp_path: Path, name: str, kind: str) -> None:
    path = write_model(tmp_path) / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif name == "model_index.json":
        pytest.skip("a link that leads nowhere is as good as no index")
    else:
        path.symlink_to(path)

    assert why(tmp_path) == f"{name} is not a regular file"


def test_links_to_files_are_followed_as_the_cache_of_the_hub_needs(tmp_path: Path) -> None:
    blobs, model = write_model(tmp_path / "blobs"), tmp_path / "snapshot"
    model.mkdir()
    for path in blobs.iterdir():
        (model / path.name).symlink_to(path)

    assert read_card(model).digest == read_card(blobs).digest


# Absurd configurations

HUGE = 2**31
CONFIG_ABSURDITIES: list[tuple[str, object]] = [
    *((option, value) for option in ("in_channels", "out_channels", "layers_per_block") for value in (0, -1, HUGE)),
    *((option, True) for option in ("in_channels", "layers_per_block", "norm_num_groups", "sample_size", "freq_shift")),
    *((option, "8") for option in ("in_channels", "sample_size", "attention_head_dim", "norm_eps", "freq_shift")),
    ("in_channels", None),
    ("in_channels", 1.5),
    ("in_channels", 10**400),
    ("in_channels", [1]),
    ("out_channels", 3),
    ("sample_size", 3),
    ("sample_size", 9),
    ("sample_size", 0),
    ("sample_size", -8),
    ("sample_size", 8192),
    ("sample_size", None),
    ("sample_size", [8]),
    ("sample_size", [8, 8, 8]),
    ("sample_size", [8] * 10**5),
    ("sample_size", {"height": 8}),
    ("block_out_channels", []),
    ("block_out_channels", [1] * 100_000),
    ("block_out_channels", [8, HUGE]),
    ("block_out_channels", [8, 16.5]),
    ("block_out_channels", [8, True]),
    ("block_out_channels", [8, "16"]),
    ("block_out_channels", "8, 16"),
    ("block_out_channels", 8),
    ("down_block_types", ["DownBlock2D"]),
    ("down_block_types", ["DownBlock2D", "CrossAttnDownBlock2D"]),
    ("down_block_types", ["DownBlock2D", ["DownBlock2D"]]),
    ("down_block_types", ["SkipDownBlock2D", "AttnSkipDownBlock2D"]),
    ("up_block_types", ["UpBlock2D", "DownBlock2D"]),
    ("up_block_types", None),
    ("mid_block_type", "UNetMidBlock2DCrossAttn"),
    ("norm_num_groups", 3),
    ("norm_num_groups", None),
    ("norm_num_groups", 0),
    ("attn_norm_num_groups", 5),
    ("attention_head_dim", 5),
    ("attention_head_dim", 0),
    ("norm_eps", 0),
    ("norm_eps", float("nan")),
    ("norm_eps", float("inf")),
    ("mid_block_scale_factor", 0),
    ("mid_block_scale_factor", float("-inf")),
    ("freq_shift", 4),
    ("downsample_padding", 2),
    ("act_fn", "gelu"),
    ("center_input_sample", True),
    ("center_input_sample", 0),
    ("time_embedding_type", "fourier"),
    ("time_embedding_type", "learned"),
    ("class_embed_type", "timestep"),
    ("class_embed_type", "projection"),
    ("num_class_embeds", 0),
    ("num_class_embeds", 65_537),
    ("num_class_embeds", True),
    ("resnet_time_scale_shift", "ada_group"),
    ("downsample_type", "avg"),
    ("upsample_type", {}),
    ("add_attention", 1),
    ("flip_sin_to_cos", "true"),
    ("time_embedding_dim", 10**6),
]


def named(option: str, message: str) -> bool:
    """Whether the message is about this option of this file. Some options are only wrong beside another."""
    beside = {"up_block_types": "down_block_types", "freq_shift": "block_out_channels"}
    beside |= {"class_embed_type": "num_class_embeds"}
    return any(f": {name} must be " in message for name in (option, beside.get(option, option)))


@pytest.mark.parametrize(("option", "value"), CONFIG_ABSURDITIES, ids=lambda value: repr(value)[:30])
def test_an_absurd_net_is_refused_by_option(tmp_path: Path, option: str, value: object) -> None:
    message = why(write_model(tmp_path, config={option: value}))

    assert message.startswith("config.json: ") and named(option, message)
    assert len(message) < 300


SCHEDULER_ABSURDITIES: list[tuple[str, object]] = [
    *(("num_train_timesteps", value) for value in (0, -5, HUGE, 10_001, True, "1000", None, 2.5, 1e999)),
    *(("beta_start", value) for value in (0, 1, -0.1, "0.1", True, float("nan"), None)),
    *(("beta_end", value) for value in (1e-4, 1, 1e999, float("nan"), [0.02])),
    ("beta_schedule", "karras"),
    ("beta_schedule", ["linear"]),
    ("trained_betas", []),
    ("trained_betas", [0.5, 1.0]),
    ("trained_betas", [0.5, True]),
    ("trained_betas", [0.5, "0.5"]),
    ("trained_betas", [0.5, float("nan")]),
    ("trained_betas", [0.01] * 100_000),
    ("trained_betas", [0.999] * 1000),  # leaves 10^-1500 of the picture
    ("trained_betas", [1e-20] * 10),  # adds no noise at all, in float64
    ("trained_betas", 0.5),
    ("variance_type", "learned_range"),
    ("variance_type", "learned"),
    ("variance_type", 1),
    ("prediction_type", "flow"),
    ("prediction_type", None),
    ("timestep_spacing", "karras"),
    ("clip_sample", 1),
    ("clip_sample", None),
    ("clip_sample_range", 0),
    ("clip_sample_range", float("inf")),
    ("thresholding", 1),
    ("thresholding", "true"),
    ("rescale_betas_zero_snr", True),
    ("use_flow_sigmas", True),
    ("steps_offset", 1),
]


@pytest.mark.parametrize(("option", "value"), SCHEDULER_ABSURDITIES, ids=lambda value: repr(value)[:30])
def test_an_absurd_schedule_is_refused_by_option(tmp_path: Path, option: str, value: object) -> None:
    message = why(write_model(tmp_path, scheduler={option: value}))

    assert message.startswith(f"scheduler_config.json: {option} must ")
    assert len(message) < 300


# As diffusers saves them: the classes that have no betas, or have them elsewhere.
OTHER_PROCESSES: list[dict[str, Any]] = [
    {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0},
    {"_class_name": "FlowMapEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0},
    {"_class_name": "ScoreSdeVeScheduler", "num_train_timesteps": 2000, "snr": 0.15, "sigma_min": 0.01},
    {"_class_name": "DDPMWuerstchenScheduler", "scaler": 1.0, "s": 0.008},
    {"_class_name": "IPNDMScheduler", "num_train_timesteps": 1000, "trained_betas": None},
    {"_class_name": "CosineDPMSolverMultistepScheduler", "sigma_min": 0.3, "prediction_type": "v_prediction"},
    {"_class_name": "UnCLIPScheduler", "num_train_timesteps": 1000, "variance_type": "fixed_small_log"},
    {},
]


@pytest.mark.parametrize("scheduler", OTHER_PROCESSES, ids=lambda scheduler: scheduler.get("_class_name", "no class"))
def test_a_file_that_tells_no_betas_is_not_taken_for_hos(tmp_path: Path, scheduler: dict[str, Any]) -> None:
    (write_model(tmp_path) / "scheduler_config.json").write_text(json.dumps(scheduler))

    assert why(tmp_path).startswith("scheduler_config.json: _class_name must be one of DDPMScheduler, ")


@pytest.mark.parametrize("scheduler", [{"_class_name": "DDIMScheduler"}, {"_class_name": "PNDM", "beta_start": 1e-4}])
def test_hos_numbers_are_taken_where_they_are_meant(tmp_path: Path, scheduler: dict[str, Any]) -> None:
    (write_model(tmp_path) / "scheduler_config.json").write_text(json.dumps(scheduler))

    assert np.array_equal(read_card(tmp_path).process.schedule.alpha_bar, linear(1000).alpha_bar)


def test_options_that_change_no_picture_are_ignored(tmp_path: Path) -> None:
    """The offset shifts `leading` alone, and only the step of DDIM asks where the last one ends."""
    harmless = {"timestep_spacing": "trailing", "steps_offset": 1, "set_alpha_to_one": False}

    assert read_card(write_model(tmp_path, scheduler=harmless)).process.spacing == "trailing"
    assert why(write_model(tmp_path, scheduler=harmless | {"_class_name": "DDIMScheduler"})) == (
        "scheduler_config.json: set_alpha_to_one must be one of true, null, got false"
    )


def test_betas_are_as_many_as_there_are_timesteps(tmp_path: Path) -> None:
    betas = {"trained_betas": [0.01] * 50}

    assert why(write_model(tmp_path, scheduler=betas)) == (
        f"scheduler_config.json: trained_betas must be as many as num_train_timesteps ({T}), got 50"
    )
    assert read_card(write_model(tmp_path, scheduler=betas | {"num_train_timesteps": 50})).process.schedule.T == 50


# The scheduler's file as google/ddpm-cifar10-32 and google/ddpm-ema-*-256 have it
PUBLISHED = {
    "_class_name": "DDPMScheduler",
    "_diffusers_version": "0.1.1",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "clip_sample": True,
    "num_train_timesteps": 1000,
    "trained_betas": None,
}
HO = Process(linear(), prediction="epsilon", variance="small", spacing="leading", clip=True, clip_range=1.0)


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ({}, HO),
        ({"variance_type": None}, HO),
        ({"variance_type": "fixed_small_log"}, HO),
        ({"variance_type": "fixed_large"}, replace(HO, variance="large")),
        ({"prediction_type": "v_prediction"}, replace(HO, prediction="v_prediction")),
        ({"prediction_type": "sample"}, replace(HO, prediction="sample")),
        ({"timestep_spacing": "linspace"}, replace(HO, spacing="linspace")),
        ({"timestep_spacing": "trailing"}, replace(HO, spacing="trailing")),
        ({"clip_sample": False}, replace(HO, clip=False)),
        ({"clip_sample_range": 2.5}, replace(HO, clip_range=2.5)),
        ({"thresholding": True}, replace(HO, thresholding=Thresholding(0.995, 1.0))),
        (
            {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5, "clip_sample": False},
            replace(HO, thresholding=Thresholding(0.9, 1.5)),
        ),
        ({"thresholding": True, "clip_sample_range": 2.5}, replace(HO, thresholding=Thresholding())),
        ({"thresholding": False, "dynamic_thresholding_ratio": 7, "sample_max_value": 0}, HO),
        ({"thresholding": None}, HO),
        ({"num_train_timesteps": 40}, replace(HO, schedule=linear(40), default_steps=40)),
        ({"beta_start": 0.01}, replace(HO, schedule=linear(beta_start=0.01))),
        ({"beta_end": 0.01}, replace(HO, schedule=linear(beta_end=0.01))),
        ({"beta_schedule": "scaled_linear"}, replace(HO, schedule=scaled_linear())),
        ({"beta_schedule": "sigmoid"}, replace(HO, schedule=sigmoid())),
        (
            {"trained_betas": [0.1, 0.2], "num_train_timesteps": 2},
            replace(HO, schedule=NoiseSchedule.of([0.1, 0.2]), default_steps=2),
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_each_option_of_the_scheduler_is_one_of_the_process(
    tmp_path: Path, option: dict[str, Any], expected: Process
) -> None:
    (write_model(tmp_path) / "scheduler_config.json").write_text(json.dumps(PUBLISHED | option))
    process = read_card(tmp_path).process

    assert np.array_equal(process.schedule.alpha_bar, expected.schedule.alpha_bar)
    assert asdict(process) | {"schedule": None} == asdict(expected) | {"schedule": None}


def test_a_schedule_that_leaves_nothing_of_the_picture_is_refused(tmp_path: Path) -> None:
    vanishing = {"num_train_timesteps": 10_000, "beta_start": 0.9, "beta_end": 0.9}

    assert "beta_end must add noise in every step and leave a trace" in why(write_model(tmp_path, scheduler=vanishing))


def test_twice_the_channels_mean_a_learned_variance_and_must_say_so(tmp_path: Path) -> None:
    assert "variance_type must be learned_range if and only if" in why(write_model(tmp_path, {"out_channels": 2}))
    tensors = weights() | {"conv_out.weight": torch.zeros(2, 8, 3, 3), "conv_out.bias": torch.zeros(2)}
    learned = read_card(write_model(tmp_path, {"out_channels": 2}, {"variance_type": "learned_range"}, tensors))
    assert (learned.process.learned_variance, learned.process.variance) == (True, "learned")


# Absurd JSON


def doubled(config: dict[str, Any], key: str) -> str:
    """The JSON of a configuration in which a key occurs twice."""
    return json.dumps(config)[:-1] + f', "{key}": {json.dumps(config[key])}}}'


TEXTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is not valid JSON: Expecting value: line 1 column 1"),
    "cut off": (json.dumps(CONFIG).encode()[:-5], "is not valid JSON: Expecting"),
    "a list": (b"[]", "must be a JSON object"),
    "null": (b"null", "must be a JSON object"),
    "not UTF-8": (b'{"sample_size": "\xff\xfe\xff"}', "is not valid JSON: 'utf-8' codec can't decode byte"),
    "duplicate key": (doubled(CONFIG, "in_channels").encode(), "is not valid JSON: a key occurs twice"),
    "nested duplicate": (b'{"a": {"b": 1, "b": 2}}', "is not valid JSON: a key occurs twice"),
    "deeply nested": (b'{"a": ' + b"[" * 500_000, "is not valid JSON: it is nested too deeply"),
    "deeply nested objects": (b'{"a": ' * 150_000, "is not valid JSON: it is nested too deeply"),
    "a number of a million digits": (
        b'{"in_channels": ' + b"9" * 1_000_000 + b"}",
        "is not valid JSON: Exceeds the limit (4300 digits)",
    ),
    "two megabytes": (b" " * (2 << 20), f"is larger than {MAX_CONFIG_BYTES} bytes"),
    "a pickle": (b"\x80\x04\x95\x00\x00", "is not valid JSON: 'utf-8' codec can't decode byte"),
}


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("name", ["config.json", "scheduler_config.json", "model_index.json"])
def test_malformed_json_is_refused(tmp_path: Path, name: str, kind: str) -> None:
    text, expected = TEXTS[kind]
    (write_model(tmp_path) / name).write_bytes(text)

    assert why(tmp_path).startswith(f"{name} {expected}")


@pytest.mark.parametrize("depth", range(100, 1500, 100))
def test_an_option_that_nests_deeply_is_refused_at_any_depth(tmp_path: Path, depth: int) -> None:
    write_model(tmp_path)
    (tmp_path / "config.json").write_text('{"sample_size": ' + "[" * depth + "]" * depth + "}")

    assert why(tmp_path).startswith("config.json")


def test_infinity_by_overflow_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG).replace('"norm_eps": 1e-05', '"norm_eps": 1e999'))

    assert why(tmp_path) == "config.json: norm_eps must be a number in 1e-12..1.0, got Infinity"


def test_a_sparse_gigabyte_of_configuration_is_not_read(tmp_path: Path) -> None:
    write_model(tmp_path)
    with (tmp_path / "config.json").open("r+b") as file:
        file.truncate(1 << 30)

    assert why(tmp_path) == f"config.json is larger than {MAX_CONFIG_BYTES} bytes"


def test_the_sound_directory_of_these_tests_is_sound(tmp_path: Path) -> None:
    assert {"sample_size", "block_out_channels"} <= set(CONFIG) and "beta_schedule" in SCHEDULER
    try:
        read_card(write_model(tmp_path))
    except ModelRefused as refused:
        pytest.fail(str(refused))
