"""A `scheduler_config.json`: the process that a net was trained for, with the defaults of the class that it names.

The file of any diffusers scheduler for Ho's process will do. Options of its sampler are passed over, because requests
choose the sampler; options that this server lacks, and options that it does not know, are refused by name.
"""

from typing import Any, get_args

from model.errors import ModelRefused
from model.options import Json, Options
from model.sampling.schedule import BY_NAME, NoiseSchedule, Prediction, Process, Spacing, Thresholding, Variance

FILE = "scheduler_config.json"
MAX_T = 10_000
MIN_ALPHA_BAR = 1e-30  # the least amplitude of the picture at T: float32 must hold its inverse
BETAS = ("beta_schedule", "beta_start", "beta_end", "trained_betas")  # one of them must be told if no class is
# Names of options in 2022, and now.
RENAMED = {"timesteps": "num_train_timesteps", "clip_predicted_image": "clip_sample"}

# What an option is where the file does not say, by class (diffusers 0.42); first, what it is for all.
DEFAULTS: Json = {
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "prediction_type": "epsilon",
    "variance_type": "fixed_small",
    "clip_sample_range": 1.0,
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
}
_ANCESTRAL = {"timestep_spacing": "leading", "clip_sample": True}
_SOLVER = {"timestep_spacing": "linspace", "clip_sample": False}
_KARRAS = _SOLVER | {"beta_start": 0.00085, "beta_end": 0.012}
CLASSES: dict[str, Json] = {
    **dict.fromkeys(("DDPM", "DDIM", "GaussianDDPM", "DDPMParallel", "DDIMParallel", "RePaint"), _ANCESTRAL),
    "PNDM": {"timestep_spacing": "leading", "clip_sample": False},
    **dict.fromkeys(("DPMSolverMultistep", "DPMSolverSinglestep", "DEISMultistep", "UniPCMultistep"), _SOLVER),
    **dict.fromkeys(("SASolver", "EulerDiscrete", "EulerAncestralDiscrete", "LMSDiscrete"), _SOLVER),
    **dict.fromkeys(("DPMSolverSDE", "HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete"), _KARRAS),
}

# Options that this server lacks, with the values that mean they are not used.
_OFF: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("rescale_betas_zero_snr", "use_dynamic_shifting"), (False, None)),
    **dict.fromkeys(("use_flow_sigmas", "use_karras_sigmas", "use_exponential_sigmas"), (False, None)),
    **dict.fromkeys(("use_beta_sigmas", "use_lu_lambdas"), (False, None)),
    "timestep_type": ("discrete", None),
    "lambda_min_clipped": (float("-inf"), None),
}
# Options of a scheduler's own sampler, or of something that is off; and their types. null is one for all.
_PASSED_OVER: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("solver_order", "predictor_order", "corrector_order", "steps_offset"), (int,)),
    **dict.fromkeys(("algorithm_type", "solver_type", "final_sigmas_type", "interpolation_type"), (str,)),
    **dict.fromkeys(("time_shift_type", "tensor_format"), (str,)),
    **dict.fromkeys(("lower_order_final", "euler_at_final", "skip_prk_steps", "predict_x0"), (bool,)),
    **dict.fromkeys(("set_alpha_to_one",), (bool,)),
    **dict.fromkeys(("dynamic_thresholding_ratio", "sample_max_value", "flow_shift", "eta"), (int, float)),
    "disable_corrector": (list,),
    "noise_sampler_seed": (int,),
}
_KNOWN = (
    DEFAULTS.keys() | _ANCESTRAL.keys() | _OFF.keys() | _PASSED_OVER.keys() | {"num_train_timesteps", "trained_betas"}
)
_TYPES = {int: "an integer", float: "a number", str: "a word", bool: "true or false", list: "a list"}


def todays(scheduler: Json) -> dict[str, Any]:
    """The options of a file of any age under their names of today. Raises ModelRefused.

    Beside today's name an old one has no meaning, as in today's diffusers; what a net predicts must not be in doubt.
    """
    values = {new: scheduler[old] for old, new in RENAMED.items() if old in scheduler}
    values |= {option: value for option, value in scheduler.items() if option not in RENAMED}
    if values.pop("predict_epsilon", None) is not None:  # before diffusers 0.11
        options = Options(FILE, scheduler)
        predicts = "epsilon" if options.boolean("predict_epsilon", True) else "sample"
        if values.setdefault("prediction_type", predicts) != predicts:
            raise options.refuse("predict_epsilon", "absent beside a prediction_type that says something else")
    return values


def _read(scheduler: Json, index: Json) -> tuple[str, Options]:
    """(class without "Scheduler", all options under their names of today). Raises ModelRefused."""
    part, given = index.get("scheduler"), scheduler.get("_class_name")
    if given is None and isinstance(part, list) and len(part) == 2:
        given = part[1]  # a file of 2022 may leave it to the pipeline
    options = Options(FILE, {**scheduler, "_class_name": given})
    kind = given.removeprefix("Flax").removesuffix("Scheduler") if isinstance(given, str) else "DDPM"
    tells_betas = any(scheduler.get(option) is not None for option in BETAS)
    if kind not in CLASSES or not (isinstance(given, str) or (given is None and tells_betas)):
        others = "or another for Ho's process; flow matching, EDM and score SDEs are other processes"
        raise options.refuse("_class_name", f"one of DDPMScheduler, DDIMScheduler {others}")
    read = Options(FILE, {**DEFAULTS, **CLASSES[kind], **todays(scheduler)})
    _check(read)
    return kind, read


def _check(options: Options) -> None:
    """Checks that nothing that could change pictures is passed over. Raises ModelRefused."""
    for option, value in options.values.items():
        if option in _OFF:
            options.word(option, _OFF[option], None)
        elif option in _PASSED_OVER and value is not None:
            types = _PASSED_OVER[option]
            if not isinstance(value, types) or isinstance(value, bool) != (types == (bool,)):
                raise options.refuse(option, _TYPES[types[-1]])
        elif option not in _KNOWN and value is not None and not option.startswith("_"):
            raise options.refuse(option, "absent", "it may change pictures, and this server has no such option")


def noise_schedule(scheduler: Json) -> NoiseSchedule:
    """The schedule that a `scheduler_config.json` describes. Raises ModelRefused naming the option."""
    return _schedule(_read(scheduler, {})[1])


def _schedule(options: Options) -> NoiseSchedule:
    if options.values.get("trained_betas") is not None:
        betas = options.items("trained_betas", None, MAX_T)
        if any(isinstance(b, bool) or not isinstance(b, int | float) or not 0 < b < 1 for b in betas):
            raise ModelRefused(f"{FILE}: trained_betas must be numbers between 0 and 1")
        T = options.integer("num_train_timesteps", 1, MAX_T, len(betas))
        if len(betas) != T:
            wanted = f"trained_betas must be as many as num_train_timesteps ({T}), got {len(betas)}"
            raise ModelRefused(f"{FILE}: {wanted}")
        return _usable(NoiseSchedule.of(betas), "trained_betas")
    T = options.integer("num_train_timesteps", 1, MAX_T, 1000)
    name = options.word("beta_schedule", tuple(BY_NAME), None)
    low = options.number("beta_start", 1e-12, 0.999)
    return _usable(BY_NAME[name](T, low, options.number("beta_end", low, 0.999)), "beta_end")


def _usable(schedule: NoiseSchedule, option: str) -> NoiseSchedule:
    """The schedule. Raises ModelRefused if rounding would ruin plans, which divide by the picture's amplitude."""
    falling = bool((schedule.alpha_bar[1:] < schedule.alpha_bar[:-1]).all())
    if not falling or schedule.alpha_bar[-1] < MIN_ALPHA_BAR:
        raise ModelRefused(f"{FILE}: {option} must add noise in every step and leave a trace of the picture")
    return schedule


def _thresholding(options: Options) -> Thresholding | None:
    if not options.word("thresholding", (True, False, None), None):
        return None
    ratio = options.number("dynamic_thresholding_ratio", 1e-6, 1)
    return Thresholding(ratio, options.number("sample_max_value", 1, 1e6))


def read_process(scheduler: Json, index: Json, learned: bool) -> Process:
    """The process that `scheduler_config.json` and `model_index.json` describe. Raises ModelRefused naming the option.

    learned: whether the net has learned a variance
    """
    kind, options = _read(scheduler, index)
    schedule = _schedule(options)
    spacing = options.word("timestep_spacing", get_args(Spacing), None)
    if spacing == "leading":  # the only spacing that an offset shifts
        options.word("steps_offset", (0, None), 0)
    if kind.startswith("DDIM"):  # the sampler of that name is served, and others do not ask where the last step ends
        options.word("set_alpha_to_one", (True, None), True)
    known: dict[str | None, Variance] = {
        None: "small",
        "fixed_small": "small",
        "fixed_small_log": "small",
        "fixed_large": "large",
        "learned_range": "learned",
    }
    variance = known[options.word("variance_type", tuple(known), None)]
    if learned != (variance == "learned"):
        raise options.refuse("variance_type", "learned_range if and only if the net has twice as many channels out")
    thresholding = _thresholding(options)  # which takes the place of clipping, whatever the file says of that
    return Process(
        schedule,
        options.word("prediction_type", get_args(Prediction), None),
        learned_variance=learned,
        variance=variance,
        spacing=spacing,
        clip=options.boolean("clip_sample") or thresholding is not None,
        clip_range=1.0 if thresholding else options.number("clip_sample_range", 1e-3, 1e3),
        thresholding=thresholding,
        default_steps=Options("model_index.json", index).integer("default_steps", 1, schedule.T, schedule.T),
    )
