"""A directory of diffusers or accelerate: several nets, several files of one, the schedule in a folder above."""

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from model.checkpoint.card import shard_names
from model.checkpoint.labels import OPTIONS as OF_LABELS
from model.checkpoint.pipeline import read_index
from model.checkpoint.weighing import INDEX, SHADOW, SUFFIXES, Candidate, told
from model.convert import choice, formats
from model.convert.protocol import OF_THE_SCHEDULER, Converted, Options, refuse_unread
from model.convert.sources import read_state
from model.errors import ModelRefused
from model.options import read_json, whole

READS = OF_THE_SCHEDULER | {"image_size", "config"}
# The words of tensors' names in the order in which diffusers registers them; numbers come in their own.
ORDER = (
    *("conv_in", "time_embedding", "class_embedding", "linear_1", "linear_2", "down_blocks", "up_blocks", "mid_block"),
    *("conv_norm_out", "conv_out", "attentions", "resnets", "downsamplers", "upsamplers"),
    *("norm1", "conv1", "time_emb_proj", "norm2", "conv2", "conv_shortcut", "conv"),
    *("group_norm", "to_q", "to_k", "to_v", "to_out", "weight", "bias"),
)


def convert(directory: Path, options: Options, part: str | None = None) -> tuple[Converted, list[Path]]:
    """The model directory, and the files that its weights were read from. Raises ModelRefused."""
    refuse_unread(options, READS, "a directory of diffusers")
    found, fitting = choice.fitting(directory, part)
    for taken in fitting:
        if (read := _read(taken, found)) is not None:
            break
    else:
        raise ModelRefused(f"{fitting[0].name} holds no net")
    state, files = read
    file, schedule = options.config or choice.config_of(taken, directory), choice.above(directory, "scheduler")
    config = choice.read_net_config(file)
    options = replace(options, config=file, scheduler=options.scheduler or schedule)
    if "ch_mult" in config:  # the very first layout: that of pesser's port
        options = replace(options, config=None, image_size=options.image_size or whole(config.get("resolution")))
    made = formats.convert(state, options, where=taken.name)
    index = read_index(directory)
    steps, presets = index.get("default_steps"), index.get("presets")
    presets = presets if isinstance(presets, dict) else {}
    notes = (told(taken.name, [each.name for each in found if each is not taken]), *made.notes)
    of_labels = {name: index[name] for name in OF_LABELS if index.get(name) is not None}
    made = replace(made, default_steps=steps, presets=presets, of_labels=of_labels)
    return replace(made, origin="Saved by diffusers", notes=notes), files


def _read(taken: Candidate, found: list[Candidate]) -> tuple[dict[str, Tensor], list[Path]] | None:
    """(tensors by name, the files they were read from); None if it is something else that a training kept.

    Raises ModelRefused.
    """
    if INDEX.search(taken.path.name):
        return _read_shards(taken.path)
    if SHADOW not in taken.name:
        return read_state(taken.path)[0], [taken.path]
    try:
        average = read_state(taken.path)[0]
    except ModelRefused:
        return None
    for net in (each for each in found if each.path.parent == taken.path.parent and SHADOW not in each.name):
        state = read_state(net.path)[0]
        if average.keys() == {str(i) for i in range(len(state))}:  # in the order of the net's own, without names
            return _named(average, state, taken.name), [taken.path, net.path]
    return None


def _read_shards(index: Path) -> tuple[dict[str, Tensor], list[Path]]:
    told = read_json(index)
    files = shard_names(told, index.name, SUFFIXES)
    state: dict[str, Tensor] = {}
    for file in files:
        state |= read_state(index.parent / file)[0]
    if state.keys() != told["weight_map"].keys():
        raise ModelRefused(f"{index.name} and the files that it names do not hold the same tensors")
    return state, [index.parent / file for file in files]


def _named(average: dict[str, Tensor], net: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """An average's tensors by the names of the net's, which has them in the order that diffusers registers them in."""
    words = {word for key in net for word in key.split(".") if not word.isdecimal()}
    if not words <= set(ORDER):
        raise ModelRefused(f"{name} has no names for its tensors, and the net beside it has names that are not today's")
    names = sorted(
        net, key=lambda key: [int(word) if word.isdecimal() else ORDER.index(word) for word in key.split(".")]
    )
    if [net[key].shape for key in names] != [average[str(i)].shape for i in range(len(average))]:
        raise ModelRefused(f"{name}: its tensors do not have the shapes of the net's; --part takes the net itself")
    return dict(zip(names, (average[str(i)] for i in range(len(average))), strict=True))
