"""Our U-Net computes the same as diffusers' `UNet2DModel` with the same weights, for every configuration."""

from typing import Any

import pytest
import torch

from model.nets.config import architecture
from model.nets.unet import UNet
from tests.model.worlds import CIFAR10, relative_error, shaken, small, twin

PLAIN_ONLY: dict[str, Any] = {
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
}
THREE_LEVELS: dict[str, Any] = {"block_out_channels": [8, 16, 24], "sample_size": 16}
RESNETS: dict[str, Any] = {
    "down_block_types": ["ResnetDownsampleBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "ResnetUpsampleBlock2D"],
}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "as diffusers defaults": small(),
    "one grey channel": small(in_channels=1, out_channels=1),
    "a learned variance": small(in_channels=1, out_channels=2),
    "no attention on the way": small(**PLAIN_ONLY),
    "no attention at all": small(**PLAIN_ONLY, add_attention=False),
    "attention, then none below": small(
        down_block_types=["AttnDownBlock2D", "DownBlock2D"], up_block_types=["UpBlock2D", "AttnUpBlock2D"]
    ),
    "every kind of block": small(
        **THREE_LEVELS,
        down_block_types=["ResnetDownsampleBlock2D", "AttnDownBlock2D", "DownBlock2D"],
        up_block_types=["AttnUpBlock2D", "ResnetUpsampleBlock2D", "UpBlock2D"],
    ),
    "attention only": small(
        **THREE_LEVELS,
        layers_per_block=2,
        down_block_types=["AttnDownBlock2D"] * 3,
        up_block_types=["AttnUpBlock2D"] * 3,
    ),
    "a level that is wider above than below": small(block_out_channels=[24, 8], layers_per_block=2),
    "one level": small(block_out_channels=[8], down_block_types=["AttnDownBlock2D"], up_block_types=["AttnUpBlock2D"]),
    "two layers a block": small(layers_per_block=2),
    "Ho's padding": small(downsample_padding=0),
    "Ho's embedding": small(flip_sin_to_cos=False, freq_shift=1),
    "sines first, unshifted": small(flip_sin_to_cos=False, freq_shift=0),
    "cosines first, shifted": small(flip_sin_to_cos=True, freq_shift=1),
    "an embedding of another width": small(time_embedding_dim=20),
    "one head": small(attention_head_dim=None),
    "four heads": small(attention_head_dim=4, block_out_channels=[8, 16]),
    "one group": small(norm_num_groups=1),
    "Ho's epsilon": small(norm_eps=1e-6),
    "a large epsilon": small(norm_eps=0.1),
    "resnets change the size": small(**RESNETS, layers_per_block=2),
    "attention blocks change the size by resnets": small(
        down_block_types=["AttnDownBlock2D", "DownBlock2D"],
        up_block_types=["AttnUpBlock2D", "UpBlock2D"],
        downsample_type="resnet",
        upsample_type="resnet",
    ),
    "scale and shift": small(resnet_time_scale_shift="scale_shift"),
    "scale and shift, with a norm in the middle": small(
        **RESNETS, resnet_time_scale_shift="scale_shift", attn_norm_num_groups=8
    ),
    "another norm in the middle": small(attn_norm_num_groups=2),
    "a scaled middle": small(mid_block_scale_factor=1.7),
    "no middle": small(mid_block_type=None),
    "a wide picture": small(sample_size=[8, 16]),
    "a tall picture with Ho's padding": small(sample_size=[12, 6], downsample_padding=0),
}
CONDITIONAL: dict[str, dict[str, Any]] = {
    "an embedding for each label": small(num_class_embeds=10),
    "scale and shift, an embedding of another width": small(
        num_class_embeds=10, resnet_time_scale_shift="scale_shift", time_embedding_dim=20
    ),
    "labels as if they were timesteps": small(num_class_embeds=10, class_embed_type="timestep", freq_shift=1),
    "embeddings from elsewhere": small(num_class_embeds=10, class_embed_type="identity"),
}


def difference(config: dict[str, Any]) -> float:
    """How far our forward pass is from diffusers', three timesteps in one batch."""
    theirs = shaken(config)
    ours = twin(theirs)
    x, timesteps = torch.randn(3, *ours.arch.shape), torch.tensor([0, 17, 999])
    with torch.inference_mode():
        return relative_error(ours(x, ours.embed(timesteps)), theirs(x, timesteps).sample)


@pytest.mark.parametrize("config", CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())
def test_a_small_net_computes_the_same_as_in_diffusers(config: dict[str, Any]) -> None:
    assert difference(config) < 2e-5


@pytest.mark.parametrize("config", CONDITIONAL.values(), ids=CONDITIONAL.keys())
@pytest.mark.parametrize("fused", [False, True], ids=["as trained", "as served"])
@torch.inference_mode()
def test_a_conditional_net_computes_the_same_as_in_diffusers_for_each_label(
    config: dict[str, Any], fused: bool
) -> None:
    theirs, labels = shaken(config), torch.tensor([9, 0, 4])
    weights, told = dict(theirs.state_dict()), labels
    if config.get("class_embed_type") == "identity":
        weights["class_embedding.weight"] = torch.randn(10, 32)
        told = weights["class_embedding.weight"][labels]
    ours: Any = UNet(architecture(dict(theirs.config))).eval()
    ours.load_state_dict(weights, strict=True)
    table, rows = ours.embed(torch.arange(1000)), ours.embed_labels()
    if fused:
        ours.fuse()
    x, k = torch.randn(3, *ours.arch.shape), torch.tensor([0, 17, 999])
    made = ours(x, table[k] + rows[labels])

    assert (table.shape[1], rows.shape) == (ours.embedding_width, (10, ours.embedding_width))
    assert relative_error(made, theirs(x, k, class_labels=told).sample) < 2e-5
    assert relative_error(ours(x, table[k] + rows[labels.flip(0)]), made) > 1e-2


def test_the_cifar10_net_computes_the_same_as_in_diffusers() -> None:
    assert difference(CIFAR10) < 2e-5


def test_the_cifar10_net_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        ours = UNet(architecture(CIFAR10))
    assert sum(p.numel() for p in ours.parameters()) == 35_746_307


def test_a_picture_is_computed_for_its_own_timestep_whatever_its_neighbours_have() -> None:
    ours = twin(shaken(small()))
    x, timesteps = torch.randn(3, 3, 8, 8), torch.tensor([999, 0, 500])
    with torch.inference_mode():
        together = ours(x, ours.embed(timesteps))
        alone = torch.cat([ours(x[i : i + 1], ours.embed(timesteps[i : i + 1])) for i in range(3)])
    assert relative_error(together, alone) < 2e-6


def test_the_timestep_matters() -> None:
    ours = twin(shaken(small()))
    x = torch.randn(1, 3, 8, 8)
    with torch.inference_mode():
        early, late = (ours(x, ours.embed(torch.tensor([k]))) for k in (10, 900))
    assert relative_error(early, late) > 1e-2
