"""The U-Net of lucidrains' `denoising_diffusion_pytorch.classifier_free_guidance`, version 2.

It has the layers of the package's unconditional U-Net under other names, with linear attention in every level, without
memories, and halves the picture by convolutions of 4 x 4. Its labels are numbers; the null label follows the last.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from model.checkpoint.weighing import averaged
from model.convert.layouts import lucidrains
from model.convert.layouts.lucidrains import Usual
from model.convert.nets import Net
from model.convert.protocol import Converted, Options
from model.errors import ModelRefused

READS = lucidrains.READS
NAMES = frozenset({"classes_emb.weight", "classes_mlp.0.weight", "init_conv.weight", "mid_attn.fn.fn.to_qkv.weight"})
USUAL = Usual("squaredcos_cap_v2", "epsilon")
HEADS, HEAD_DIM = 4, 32  # of every attention; the file tells their product alone


def _refuse_variants(net: Mapping[str, Tensor]) -> None:
    """Refuses nets that `model.nets.lucidrains` cannot express. Raises ModelRefused."""
    lucidrains.refuse_fourier(net)
    if "downs.0.0.block1.norm.g" not in net:
        raise ModelRefused("a net for classifier-free guidance of version 1 (group norms) cannot be converted")
    attended = {tensor.shape[0] // 3 for key, tensor in net.items() if key.endswith(".to_qkv.weight")}
    if attended != {HEADS * HEAD_DIM}:
        raise ModelRefused(
            f"a net for classifier-free guidance with other attention than {HEADS} heads of {HEAD_DIM} channels "
            "(attn_heads, attn_dim_head) cannot be converted"
        )


def _config(net: Mapping[str, Tensor], options: Options) -> dict[str, Any]:
    widths = list[int]()
    while (resize := net.get(f"downs.{len(widths)}.3.weight")) is not None:
        widths.append(resize.shape[0])
    levels = len(widths)
    return lucidrains.shared_config(net, options, widths) | {
        "full_attn": [False] * levels,
        "attn_heads": [HEADS] * levels,
        "attn_dim_head": [HEAD_DIM] * levels,
        "num_mem_kv": 0,
        "downsample_kernel": 4,
        "num_classes": net["classes_emb.weight"].shape[0],
    }


def _renamed(key: str) -> str:
    """A tensor's name in `model.nets.lucidrains`, whose attention contains its norm and its residual connection."""
    return lucidrains.without_resizing(key.replace(".fn.fn.", ".").replace(".fn.norm.", ".norm."))


def convert(net: Net, options: Options, tables: Mapping[str, Tensor]) -> Converted:
    """The same net with a `config.json` for `model.nets.lucidrains`."""
    _refuse_variants(net.tensors)
    config = _config(net.tensors, options)
    scheduler = lucidrains.process(tables, options, config["out_channels"] == 2 * config["in_channels"], USUAL)
    tensors = {_renamed(key): tensor for key, tensor in net.tensors.items()}
    labels, size, T = config["num_classes"], config["sample_size"], scheduler["num_train_timesteps"]
    heads = f"{HEADS} heads of {HEAD_DIM} channels assumed"
    facts = (
        "averaged" if averaged(net.prefix) else "not averaged",
        f"{labels} labels",
        heads,
        scheduler["prediction_type"],
    )
    origin = f"lucidrains' U-Net for classifier-free guidance ({', '.join(facts)}), {size} x {size}, T = {T}"
    return Converted(config, scheduler, tensors, origin, of_labels={"null_label": labels})
