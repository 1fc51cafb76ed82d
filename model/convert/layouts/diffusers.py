"""The state dict of a `UNet2DModel` of diffusers, of any version. Its `config.json` is another file."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from model.checkpoint.foreign import OF_AVERAGES, require_served_kind
from model.checkpoint.header import modern
from model.checkpoint.pipeline import read_index
from model.convert.nets import Net
from model.convert.protocol import OF_THE_SCHEDULER, Converted, Options, scheduler_config
from model.errors import ModelRefused
from model.nets.config import OPENAI, RENAMED, with_todays_names
from model.options import read_json

READS = OF_THE_SCHEDULER | {"image_size", "config"}
NAMES = frozenset({"conv_in.weight", "conv_norm_out.weight", "time_embedding.linear_1.weight"})


def _config(config: dict[str, Any], options: Options) -> dict[str, Any]:
    kind = OPENAI if config.get("_class_name") == OPENAI else "UNet2DModel"
    todays = dict(with_todays_names(config)) | {"_class_name": kind}
    if options.image_size is not None:
        todays["sample_size"] = options.image_size
    return {name: value for name, value in todays.items() if name not in {*RENAMED, "_module", *OF_AVERAGES}}


def _tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # the resampling layers of 2022 had their convolution under two names
    twice = [key for key in state if ".op." in key and key.replace(".op.", ".conv.") in state]
    named = {modern(key): tensor for key, tensor in state.items() if key not in twice}
    if len(named) != len(state) - len(twice):
        raise ModelRefused("weights are there under both their old and their new names")
    return named


def convert(net: Net, options: Options, tables: Mapping[str, Tensor]) -> Converted:
    """The same net, with the schedule of the given file, or else Ho's unless the options say otherwise."""
    if any(".transformer_blocks." in key for key in net.tensors):
        raise ModelRefused("a net of diffusers that attends to a text (UNet2DConditionModel) cannot be converted")
    if options.config is None:
        raise ModelRefused(
            "a net of diffusers without its config.json: give --config CONFIG.json, or as SRC the directory that it "
            "was saved in"
        )
    read_index(options.config.parent)
    config = read_json(options.config)
    require_served_kind(config)
    config = _config(config, options)
    tensors = _tensors(net.tensors)
    if config.get("class_embed_type") == "identity" and "class_embedding.weight" not in tensors:
        raise ModelRefused(
            "a net with class_embed_type identity is given the embeddings of labels, and the file does not hold them: "
            "add them as class_embedding.weight, a row for each label, and their number to config.json as "
            "num_class_embeds"
        )
    return Converted(config, scheduler_config(options, "fixed_small"), tensors, "A net of diffusers")
