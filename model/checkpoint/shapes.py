"""The names and shapes of the tensors that a net consists of, from its architecture alone: without torch, and at once.

They are those of the state dicts of `model.nets.build`.
"""

from math import prod

from model.nets.config import ATTENTION, DOWN_BLOCKS, RESNET, UP_BLOCKS, Architecture
from model.nets.lucidrains_config import AnyArchitecture, LucidrainsArchitecture

Shapes = dict[str, tuple[int, ...]]
TIMED = (".time_emb_proj.bias", ".mlp.1.bias")  # each as long as its block's columns of the embedding table


def shapes(architecture: AnyArchitecture) -> Shapes:
    """{name: shape} of every tensor of the net."""
    return _lucidrains(architecture) if isinstance(architecture, LucidrainsArchitecture) else _unet(architecture)


def count(tensors: Shapes) -> int:
    """The number of weights."""
    return sum(map(prod, tensors.values()))


def embedding_width(tensors: Shapes) -> int:
    """The numbers that the net needs to know of a timestep, and of a label: a row of `embed` and of `embed_labels`."""
    if any(name.startswith("class_embedding.") for name in tensors):  # whose forward pass projects the sum of both
        return tensors["time_embedding.linear_2.bias"][0]
    return sum(shape[0] for name, shape in tensors.items() if name.endswith(TIMED))


def _conv(name: str, channels: int, out: int, side: int) -> Shapes:
    return {f"{name}.weight": (out, channels, side, side), f"{name}.bias": (out,)}


def _dense(name: str, channels: int, out: int) -> Shapes:
    return {f"{name}.weight": (out, channels), f"{name}.bias": (out,)}


def _norm(name: str, channels: int) -> Shapes:
    return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}


# Ho's U-Net


def _resnet(arch: Architecture, name: str, channels: int, out: int) -> Shapes:
    shares = 2 if arch.resnet_time_scale_shift == "scale_shift" else 1
    return {
        **_norm(f"{name}.norm1", channels),
        **_conv(f"{name}.conv1", channels, out, 3),
        **_dense(f"{name}.time_emb_proj", arch.embedding_dim, out * shares),
        **_norm(f"{name}.norm2", out),
        **_conv(f"{name}.conv2", out, out, 3),
        **(_conv(f"{name}.conv_shortcut", channels, out, 1) if channels != out else {}),
    }


def _attention(name: str, channels: int, groups: int | None) -> Shapes:
    dense = ("to_q", "to_k", "to_v", "to_out.0")
    made = _norm(f"{name}.group_norm", channels) if groups else {}
    return made | {
        key: shape for layer in dense for key, shape in _dense(f"{name}.{layer}", channels, channels).items()
    }


def _block(arch: Architecture, name: str, kind: str, inputs: list[int], out: int, sampler: str, how: str) -> Shapes:
    """A level. inputs: the channels that its residual blocks read. sampler: what leads to the next, "" if none does"""
    made: Shapes = {}
    for i, channels in enumerate(inputs):
        made |= _resnet(arch, f"{name}.resnets.{i}", channels, out)
        if kind == ATTENTION:
            made |= _attention(f"{name}.attentions.{i}", out, arch.norm_num_groups)
    if sampler and (kind == RESNET or (kind == ATTENTION and how == "resnet")):
        made |= _resnet(arch, f"{name}.{sampler}.0", out, out)
    elif sampler and how not in ("pool", "repeat"):
        made |= _conv(f"{name}.{sampler}.0.conv", out, out, 3)
    return made


def _class_embedding(arch: Architecture) -> Shapes:
    """Of an unconditional net, none."""
    if arch.class_embed_type == "timestep":
        made = _dense("class_embedding.linear_1", arch.sinusoid_dim or arch.block_out_channels[0], arch.embedding_dim)
        return made | _dense("class_embedding.linear_2", arch.embedding_dim, arch.embedding_dim)
    return {"class_embedding.weight": (arch.labels, arch.embedding_dim)} if arch.labels else {}


def _unet(arch: Architecture) -> Shapes:
    widths, layers = arch.block_out_channels, arch.layers_per_block
    first, bottom, last = widths[0], widths[-1], len(widths) - 1
    made = _conv("conv_in", arch.in_channels, first, 3)
    made |= _dense("time_embedding.linear_1", arch.sinusoid_dim or first, arch.embedding_dim)
    made |= _dense("time_embedding.linear_2", arch.embedding_dim, arch.embedding_dim)
    made |= _class_embedding(arch)
    for i, (out, kind) in enumerate(zip(widths, arch.down_block_types, strict=True)):
        inputs, sampler = [widths[max(i - 1, 0)], *[out] * (layers - 1)], "downsamplers" if i < last else ""
        made |= _block(arch, f"down_blocks.{i}", DOWN_BLOCKS[kind], inputs, out, sampler, arch.downsample_type)
    if arch.mid_block_type:
        made |= _resnet(arch, "mid_block.resnets.0", bottom, bottom)
        made |= _resnet(arch, "mid_block.resnets.1", bottom, bottom)
        usual = arch.norm_num_groups if arch.resnet_time_scale_shift == "default" else None
        groups = usual if arch.attn_norm_num_groups is None else arch.attn_norm_num_groups
        made |= _attention("mid_block.attentions.0", bottom, groups) if arch.add_attention else {}
    for i, (out, kind) in enumerate(zip(widths[::-1], arch.up_block_types, strict=True)):
        kept = widths[::-1][min(i + 1, last)]
        inputs, sampler = [widths[::-1][max(i - 1, 0)], *[out] * layers], "upsamplers" if i < last else ""
        inputs = [*(channels + out for channels in inputs[:-1]), inputs[-1] + kept]
        made |= _block(arch, f"up_blocks.{i}", UP_BLOCKS[kind], inputs, out, sampler, arch.upsample_type)
    return made | _norm("conv_norm_out", first) | _conv("conv_out", first, arch.out_channels, 3)


# lucidrains' U-Net


def _lucid_resnet(name: str, channels: int, out: int, embedding: int) -> Shapes:
    made = _dense(f"{name}.mlp.1", embedding, 2 * out)
    for block, reads in (("block1", channels), ("block2", out)):
        made |= _conv(f"{name}.{block}.proj", reads, out, 3) | {f"{name}.{block}.norm.g": (1, out, 1, 1)}
    return made | (_conv(f"{name}.res_conv", channels, out, 1) if channels != out else {})


def _lucid_attention(arch: LucidrainsArchitecture, name: str, channels: int, level: int, full: bool) -> Shapes:
    heads, size, memories = arch.attn_heads[level], arch.attn_dim_head[level], arch.num_mem_kv
    made: Shapes = {f"{name}.norm.g": (1, channels, 1, 1), f"{name}.to_qkv.weight": (3 * heads * size, channels, 1, 1)}
    if full:
        made |= {f"{name}.attend.memory": (2, heads, memories, size)} if memories else {}
        return made | _conv(f"{name}.to_out", heads * size, channels, 1)
    made |= {f"{name}.mem_kv": (2, heads, size, memories)} if memories else {}
    return made | _conv(f"{name}.to_out.0", heads * size, channels, 1) | {f"{name}.to_out.1.g": (1, channels, 1, 1)}


def _lucidrains(arch: LucidrainsArchitecture) -> Shapes:
    widths, embedding, last = arch.widths, arch.embedding_dim, len(arch.dim_mults) - 1
    made = _conv("init_conv", arch.in_channels, arch.init_dim, 7)
    made |= _dense("time_mlp.1", arch.dim, 4 * arch.dim) | _dense("time_mlp.3", 4 * arch.dim, 4 * arch.dim)
    if arch.num_classes is not None:
        made |= {"classes_emb.weight": (arch.num_classes, arch.dim), "null_classes_emb": (arch.dim,)}
        made |= _dense("classes_mlp.0", arch.dim, 4 * arch.dim) | _dense("classes_mlp.2", 4 * arch.dim, 4 * arch.dim)
    for level in range(last + 1):
        above, below = widths[level], widths[level + 1]
        down, up = f"downs.{level}", f"ups.{last - level}"
        for name, channels, out in ((down, above, above), (up, below + above, below)):
            made |= _lucid_resnet(f"{name}.0", channels, out, embedding)
            made |= _lucid_resnet(f"{name}.1", channels, out, embedding)
            made |= _lucid_attention(arch, f"{name}.2", out, level, arch.full_attn[level])
        made |= _conv(f"{down}.3", above, below, 3 if level == last else arch.downsample_kernel) | _conv(
            f"{up}.3", below, above, 3
        )
    for name in ("mid_block1", "mid_block2"):
        made |= _lucid_resnet(name, widths[-1], widths[-1], embedding)
    made |= _lucid_attention(arch, "mid_attn", widths[-1], last, full=True)
    made |= _lucid_resnet("final_res_block", 2 * arch.init_dim, arch.init_dim, embedding)
    return made | _conv("final_conv", arch.init_dim, arch.out_channels, 1)
