"""What only a GPU can show: captured graphs beside the eager step, the same noise and pictures as on a CPU, and kernels
of real layers that give a picture the same bits in every batch.
"""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from model.checkpoint.load import Model
from model.engine.engine import Engine
from model.engine.events import Finished, Request
from model.engine.lead import Lead, mark
from model.engine.runner import prepared, usual_buckets
from model.engine.step import denoise
from model.nets.config import Architecture
from model.nets.convolution import Conv
from model.nets.layers import SelfAttention
from model.nets.lucidrains import products_in_groups
from model.nets.unet import UNet
from model.sampling.noise import gaussian
from model.sampling.plan import plan, resolve
from tests.model.tiny import CPU, PROCESS, T, card, tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none here"),
]


# A real net. These take longest, so they come first.


def cifar10_model(dtype: torch.dtype) -> Model:
    """A net of google/ddpm-cifar10-32's shape with random weights, the same ones every time, as it is loaded."""
    shape = Architecture(
        height=32,
        width=32,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        downsample_padding=0,
    )
    torch.manual_seed(0)
    net: Any = UNet(shape).eval().requires_grad_(False).to("cuda")
    with torch.inference_mode():
        table = net.embed(torch.arange(T, device="cuda")).to(dtype)
        net.fuse()
    return Model(card(shape), net.to(dtype).to(memory_format=torch.channels_last), table)


def invariant_layers(model: Model) -> list[str]:
    return [name for name, layer in model.module.named_modules() if getattr(layer, "invariant", False)]


@pytest.mark.parametrize(("dtype", "slots"), [(torch.bfloat16, 64), (torch.float32, 16)], ids=["bfloat16", "float32"])
def test_every_bucket_of_a_real_net_is_exact(dtype: torch.dtype, slots: int) -> None:
    model = cifar10_model(dtype)
    runner = prepared(model, slots)

    assert runner.exact_buckets == runner.buckets, f"{runner.chosen}: {invariant_layers(model)}"


def test_two_starts_choose_the_same_kernels() -> None:
    models = [cifar10_model(torch.bfloat16) for _ in range(2)]
    runners = [prepared(model, 16) for model in models]

    assert runners[0].chosen is not None and runners[0].chosen == runners[1].chosen
    assert runners[0].bits == runners[1].bits
    assert invariant_layers(models[0]) == invariant_layers(models[1])


# Kernels and graphs


@torch.inference_mode()
def test_a_replay_of_every_bucket_is_the_eager_step_bit_for_bit() -> None:
    gpu = torch.device("cuda")
    captured = prepared(tiny_model(torch.bfloat16, gpu), 8)
    table = plan(PROCESS, resolve(PROCESS, "ddpm", 5))
    for bucket in captured.buckets:
        results = []
        for replay in (True, False):
            for slot in range(bucket):
                captured.slots.seat(slot, 100 + slot, table, captured.slots.draw_initial([100 + slot])[0])
            if replay:
                captured.step(bucket)
            else:
                denoise(captured.model.net, captured.model.table, captured.slots, bucket)
            results.append(captured.slots.x[:bucket].clone())
        assert torch.equal(*results), bucket


@torch.inference_mode()
def test_kernels_that_start_early_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    from model.kernels import launch

    model, results = cifar10_model(torch.bfloat16), []
    table = plan(PROCESS, resolve(PROCESS, "ddpm", 5))
    for wanted in (True, False):
        monkeypatch.setattr(launch, "WANTED", wanted)
        runner = prepared(model, 8, buckets=(1, 8))
        for slot in range(8):
            runner.slots.seat(slot, 100 + slot, table, runner.slots.draw_initial([100 + slot])[0])
        for bucket in (8, 1, 8, 1, 8):
            runner.step(bucket)
        results.append(runner.slots.x.clone())

    assert torch.equal(*results)


def test_noise_equals_that_of_a_cpu_except_for_the_last_bit_of_a_few_numbers() -> None:
    seed, step = torch.arange(64) * 2**40 + 7, torch.arange(64)
    ours, theirs = (gaussian(seed.to(d), step.to(d), (3, 32, 32)).cpu() for d in ("cpu", "cuda"))

    assert (ours != theirs).float().mean() < 1e-5
    assert (ours - theirs).abs().max() < 1e-6


def test_float32_pictures_are_those_of_a_cpu_to_a_grey_level() -> None:
    def pictures(device: torch.device) -> list[Finished]:
        engine, made = Engine(prepared(tiny_model(torch.float32, device), 4)), []
        for i, sampler in enumerate(("ddpm", "ddim", "greedy", "dpmpp_2m")):
            engine.submit(Request(i, i, plan(PROCESS, resolve(PROCESS, sampler, 10))))
        while engine.busy:
            made += [event for event in engine.step() if isinstance(event, Finished)]
        return sorted(made, key=lambda event: str(event.id))

    for ours, theirs in zip(pictures(CPU), pictures(torch.device("cuda")), strict=True):
        assert abs(ours.picture.astype(int) - theirs.picture.astype(int)).max() <= 1


# Convolutions and attention at the size of the CIFAR-10 net, and the largest of the one for 256 x 256

LAYERS = {
    "3 to 128": (3, 128, 32, {}),
    "128 to 128": (128, 128, 32, {}),
    "128 to 3": (128, 3, 32, {}),
    "1 x 1": (384, 128, 32, {"kernel_size": 1, "padding": 0}),
    "stride 2": (256, 256, 16, {"stride": 2}),
    "on 16 x 16": (512, 256, 16, {}),
    "on 4 x 4": (512, 256, 4, {}),
}


def agree_in_all_buckets(layer: Conv | SelfAttention, channels: int, side: int, dtype: torch.dtype) -> bool:
    """Whether this layer gives each of 64 pictures the same bits in every batch that the server captures."""
    x = torch.randn(64, channels, side, side, device="cuda").to(dtype).contiguous(memory_format=torch.channels_last)
    expected = layer(x)
    chosen = {b: torch.randint(64, (b,), device="cuda") for b in usual_buckets(64)}
    batches = {b: x[rows].contiguous(memory_format=torch.channels_last) for b, rows in chosen.items()}
    return all(torch.equal(layer(batches[b]), expected[rows]) for b, rows in chosen.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("layer", LAYERS)
@torch.inference_mode()
def test_the_invariant_convolution_is_right_and_the_same_in_every_batch(layer: str, dtype: torch.dtype) -> None:
    channels, outs, side, how = LAYERS[layer]
    arguments: dict[str, Any] = {"kernel_size": 3, "padding": 1} | how
    conv: Any = Conv(channels, outs, device="cuda", **arguments)
    conv = conv.requires_grad_(False).to(dtype).to(memory_format=torch.channels_last)
    conv.use("invariant")
    x = torch.randn(5, channels, side, side, device="cuda").to(dtype).contiguous(memory_format=torch.channels_last)
    expected = F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), conv.stride, conv.padding)

    assert (conv(x).double() - expected).norm() < {torch.bfloat16: 4e-3, torch.float32: 2e-6}[dtype] * expected.norm()
    assert agree_in_all_buckets(conv, channels, side, dtype)


@pytest.mark.parametrize(("channels", "side"), [(256, 16), (256, 4), (512, 16)])
@torch.inference_mode()
def test_pinned_attention_is_the_same_in_every_batch(channels: int, side: int) -> None:
    attend = SelfAttention(1)
    attend.use("invariant")

    assert agree_in_all_buckets(attend, 3 * channels, side, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("side", [32, 8])
@torch.inference_mode()
def test_the_products_of_linear_attention_in_groups_are_the_same_in_every_batch(side: int, dtype: torch.dtype) -> None:
    q, k, v = torch.randn(3, 64, 4, side * side + 4, 32, device="cuda").to(dtype)
    expected = products_in_groups(q, k, v)
    for bucket in usual_buckets(64):
        chosen = torch.randint(64, (bucket,), device="cuda")
        assert torch.equal(products_in_groups(q[chosen], k[chosen], v[chosen]), expected[chosen]), bucket


def test_the_host_is_ahead_of_a_gpu_by_no_more_than_it_may_be() -> None:
    device, matrix = torch.device("cuda", torch.cuda.current_device()), torch.randn(8192, 8192, device="cuda")
    marks: list[Any] = []

    def noted() -> Any:
        marks.append(mark(device))
        return marks[-1]

    lead = Lead(noted)
    for _ in range(12):  # of some tens of milliseconds each
        lead.queue(lambda: [matrix @ matrix for _ in range(4)])
    ended = marks[1::2]

    assert lead.most == 1 and all(event.query() for event in ended[:-1])
