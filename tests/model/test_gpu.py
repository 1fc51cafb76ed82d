"""What only a GPU can show: captured graphs beside the eager step, and the same noise and pictures as on a CPU."""

import pytest
import torch

from model.engine import Engine
from model.events import Finished, Request
from model.noise import gaussian
from model.plan import plan, resolve
from model.runner import Runner, denoise
from tests.model.tiny import CPU, PROCESS, tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none here"),
]


@torch.inference_mode()
def test_a_replay_of_every_bucket_is_the_eager_step_bit_for_bit() -> None:
    gpu = torch.device("cuda")
    captured = Runner(tiny_model(torch.bfloat16, gpu), 8)
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


def test_noise_is_the_same_as_on_a_cpu_but_for_the_last_bit_of_a_few() -> None:
    seed, step = torch.arange(64) * 2**40 + 7, torch.arange(64)
    ours, theirs = (gaussian(seed.to(d), step.to(d), (3, 32, 32)).cpu() for d in ("cpu", "cuda"))

    assert (ours != theirs).float().mean() < 1e-5
    assert (ours - theirs).abs().max() < 1e-6


def test_float32_pictures_are_those_of_a_cpu_to_a_grey_level() -> None:
    def pictures(device: torch.device) -> list[Finished]:
        engine, made = Engine(Runner(tiny_model(torch.float32, device), 4)), []
        for i, sampler in enumerate(("ddpm", "ddim", "greedy", "dpmpp_2m")):
            engine.submit(Request(i, i, plan(PROCESS, resolve(PROCESS, sampler, 10))))
        while engine.busy:
            made += [event for event in engine.step() if isinstance(event, Finished)]
        return sorted(made, key=lambda event: str(event.id))

    for ours, theirs in zip(pictures(CPU), pictures(torch.device("cuda")), strict=True):
        assert abs(ours.picture.astype(int) - theirs.picture.astype(int)).max() <= 1
