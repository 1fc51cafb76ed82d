"""The tensors of a net are known without torch: they are those of the net that torch builds."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from model.checkpoint.shapes import count, embedding_width, shapes
from model.nets.build import build
from model.nets.config import DOWN_BLOCKS, UP_BLOCKS, architecture
from model.nets.lucidrains_config import AnyArchitecture, LucidrainsArchitecture
from tests.model.tiny import LUCIDRAINS


def some_unet(chance: random.Random) -> AnyArchitecture:
    """Any U-Net of `OpenAIUNet`, which has every option."""
    levels = chance.randint(1, 4)
    config: dict[str, Any] = {
        "_class_name": "OpenAIUNet",
        "sample_size": 16,
        "in_channels": chance.choice([1, 3]),
        "block_out_channels": [chance.choice([16, 32, 48]) for _ in range(levels)],
        "down_block_types": [chance.choice(list(DOWN_BLOCKS)) for _ in range(levels)],
        "up_block_types": [chance.choice(list(UP_BLOCKS)) for _ in range(levels)],
        "layers_per_block": chance.randint(1, 3),
        "mid_block_type": chance.choice(["UNetMidBlock2D", None]),
        "downsample_type": chance.choice(["conv", "resnet", "pool"]),
        "upsample_type": chance.choice(["conv", "resnet", "repeat"]),
        "norm_num_groups": 8,
        "attn_norm_num_groups": chance.choice([None, 4]),
        "resnet_time_scale_shift": chance.choice(["default", "scale_shift"]),
        "add_attention": chance.choice([True, False]),
        "time_embedding_dim": chance.choice([None, 20]),
        "sinusoid_dim": chance.choice([None, 12]),
        "num_class_embeds": chance.choice([None, 7]),
    }
    if config["num_class_embeds"]:
        config["class_embed_type"] = chance.choice([None, "timestep", "identity"])
    config["out_channels"] = config["in_channels"] * chance.choice([1, 2])
    return architecture(config)


def some_lucidrains(chance: random.Random) -> AnyArchitecture:
    """Any U-Net of lucidrains'."""
    levels = chance.randint(1, 4)

    def numbers(*choices: Any) -> tuple[Any, ...]:
        return tuple(chance.choice(choices) for _ in range(levels))

    arch: LucidrainsArchitecture = replace(
        LUCIDRAINS,
        init_dim=chance.choice([16, 24]),
        out_channels=chance.choice([3, 6]),
        dim_mults=numbers(1, 2, 3),
        full_attn=numbers(True, False),
        attn_heads=numbers(1, 4),
        attn_dim_head=numbers(8, 16),
        num_mem_kv=chance.choice([0, 1, 4]),
        downsample_kernel=chance.choice([2, 4]),
        num_classes=chance.choice([None, 7]),
    )
    return arch


@pytest.mark.parametrize("some", [some_unet, some_lucidrains])
def test_the_tensors_of_any_net_are_those_that_torch_builds(some: Any) -> None:
    chance = random.Random(14)
    for _ in range(25):
        arch = some(chance)
        with torch.device("meta"):
            net = build(arch)
        expected = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}

        assert shapes(arch) == expected
        assert count(shapes(arch)) == sum(p.numel() for p in net.parameters())
        assert embedding_width(shapes(arch)) == net.embedding_width
        with torch.device("meta"):
            assert not net.labels or net.embed_labels().shape == (arch.labels, net.embedding_width)
