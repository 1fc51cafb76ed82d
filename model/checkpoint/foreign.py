"""Checkpoints of other kinds: what they are, in words, where the general checks would only call an option wrong."""

from dataclasses import fields
from pathlib import Path

from model.checkpoint.weighing import is_served
from model.errors import ModelRefused
from model.nets.config import DIFFUSERS, OPENAI, RENAMED, Architecture, with_todays_names
from model.nets.lucidrains_config import LUCIDRAINS
from model.options import Json, Options, whole

# The classes that are served: diffusers' of today and of 2022, and ours.
CLASSES = (*DIFFUSERS, OPENAI, LUCIDRAINS)
_TEXT, _CODER = "a net that needs a text or another condition", "an autoencoder"
_STEERS, _SDE = "a part that steers another net", "a net for another process (a variance-exploding SDE)"
KINDS = {
    **dict.fromkeys(("UNet2DConditionModel", "FlaxUNet2DConditionModel", "UNet3DConditionModel", "GlideUNet"), _TEXT),
    **dict.fromkeys(("AutoencoderKL", "AutoencoderTiny", "VQModel", "ConsistencyDecoderVAE"), _CODER),
    **dict.fromkeys(("ControlNetModel", "T2IAdapter", "MotionAdapter"), _STEERS),
    "UNetLDMModel": "a net of latents",
    "UNet1DModel": "a net for sound",
    "NCSNpp": _SDE,
}
# Options with which a U-Net of diffusers is another kind, and what it is then.
_CONDITION = "it is a net that needs a text or another condition, and such nets are not served"
WHY = {
    "class_embeddings_concat": "the embedding of a label is added to that of the timestep in the nets that are served",
    **dict.fromkeys(("cross_attention_dim", "encoder_hid_dim", "encoder_hid_dim_type"), _CONDITION),
    **dict.fromkeys(("addition_embed_type", "addition_time_embed_dim", "only_cross_attention"), _CONDITION),
    "quantization_config": "its weights are quantized, and only floats are read",
}
UNKNOWN = "UNet2DModel has no such option, and it may change pictures"
# What diffusers' EMAModel adds to the configuration of the net that it averages.
OF_AVERAGES = {"decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma", "power"}
# Options of UNet2DModel besides those of `Architecture`: checked elsewhere, or without any effect on pictures.
OTHERS = {"sample_size", "act_fn", "time_embedding_type", "center_input_sample", "conv_resample"}
OTHERS |= {"dropout", "num_train_timesteps", "resamp_with_conv", *RENAMED, *OF_AVERAGES}
# What may lie where weights are looked for, by the end of its name.
_PICKLE = "is a pickle, which is never read; `ddpm convert` makes safetensors of it"
FOUND = {
    **dict.fromkeys((".bin", ".pt", ".ckpt", ".pth", ".pkl"), _PICKLE),
    ".safetensors": "is not looked for under this name",
    ".onnx": "is an ONNX graph, which is not read",
    ".gguf": "is a GGUF file, which is not read",
    ".msgpack": "is a file of Flax, which is not read; diffusers' from_pretrained(…, from_flax=True) can save it anew",
    **dict.fromkeys((".h5", ".keras"), "is a file of Keras, which is not read"),
    **dict.fromkeys((".index", ".pb"), "is a file of TensorFlow, which is not read"),
}


def found_instead(folder: Path) -> str:
    """Words about a file of another format in a folder, or nothing."""
    others = sorted(path.name for path in folder.iterdir() if not is_served(path.name))
    for suffix, what in FOUND.items():
        names = [name for name in others if name.endswith(suffix)]
        if names:
            return f" ({names[0]!r} {what})"
    return ""


def require_served_kind(config: Json) -> None:
    """Raises ModelRefused, saying what it is, for any `config.json` but that of a U-Net of pictures."""
    kind = config.get("_class_name")
    if kind is None and isinstance(config.get("model_type"), str):
        raise ModelRefused("config.json: it is a model of the transformers library; served are U-Nets of diffusers")
    if kind is not None and kind not in CLASSES:
        name = ascii(kind)[:60].strip("'")
        what = KINDS.get(name) or ("a transformer" if "Transformer" in name else "no U-Net that this server knows")
        served = f"served are U-Nets of pictures ({DIFFUSERS[0]}, {OPENAI}, {LUCIDRAINS})"
        raise ModelRefused(f"config.json: {name} is {what}; {served}")
    if kind in (None, *DIFFUSERS) and "ch_mult" not in config:
        _require_served_options(Options("config.json", with_todays_names(config)))


def _require_served_options(options: Options) -> None:
    known = {field.name for field in fields(Architecture)} | OTHERS
    for option, value in options.values.items():
        if option in WHY and value is not None and value is not False:
            raise options.refuse(option, "null", WHY[option])
        if value in (None, False) or option.startswith("_"):
            continue
        if option not in known:
            raise options.refuse(option, "absent", UNKNOWN)
        words = [word for word in (value if isinstance(value, list) else [value]) if isinstance(word, str)]
        if any("CrossAttn" in word for word in words):
            raise options.refuse(option, "without cross attention", _CONDITION)
        if any("Skip" in word or word == "fourier" for word in words):
            raise options.refuse(option, "of another kind", f"it is {_SDE}")
    channels = whole(options.values.get("in_channels", 3))
    if channels == 4:
        raise options.refuse("in_channels", "1 or 3", "it is a net of latents, of which an autoencoder makes pictures")
    if channels in (2, 6, 7, 8, 9):
        raise options.refuse("in_channels", "1 or 3", "it reads a picture or a mask beside the noise, as upsamplers do")
