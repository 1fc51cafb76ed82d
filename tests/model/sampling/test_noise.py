"""Noise is a function of (seed, step, element) and of nothing else, and it is Gaussian."""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.engine.slots import Slots
from model.sampling.noise import INITIAL, STEP, TorchNoise, gaussian, philox

# Random123's kat_vectors for philox4x32-10: counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
MILLION = 1_000_000


def one(seed: int, step: int, shape: tuple[int, ...], domain: int = STEP) -> Tensor:
    """The noise of one sample."""
    return gaussian(torch.tensor([seed]), torch.tensor([step]), shape, domain)[0]


def many(seed: int, step: int = 0, domain: int = STEP) -> NDArray[np.float64]:
    """A million draws."""
    return one(seed, step, (MILLION,), domain).double().numpy()


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(counter: str, key: str, result: str) -> None:
    c0, c1, c2, c3, k0, k1 = (torch.tensor([int(word, 16)]) for word in f"{counter} {key}".split())
    assert [f"{int(word):08x}" for word in philox((c0, c1, c2, c3), (k0, k1))] == result.split()


def test_the_words_of_a_sample_are_those_of_its_seed_step_and_domain() -> None:
    """Key = seed, counter = (element / 4, step, domain, 0), Box-Muller: spelled out for the fifth to eighth element."""
    seed, step = 0x1234567890ABCDEF, 41
    counter = (torch.tensor([1]), torch.tensor([step]), torch.tensor([STEP]), torch.tensor([0]))
    words = philox(counter, (torch.tensor([0x90ABCDEF]), torch.tensor([0x12345678])))
    a, b, c, d = ((int(word) + 0.5) / 2**32 for word in words)
    near, far = math.sqrt(-2 * math.log(a)), math.sqrt(-2 * math.log(c))
    expected = [
        near * math.cos(2 * math.pi * b),
        near * math.sin(2 * math.pi * b),
        far * math.cos(2 * math.pi * d),
        far * math.sin(2 * math.pi * d),
    ]
    np.testing.assert_allclose(one(seed, step, (12,))[4:8].numpy(), expected, rtol=1e-6)


def test_a_sample_gets_the_same_noise_in_any_company() -> None:
    seeds, steps = torch.tensor([7, 0, 2**62, 7]), torch.tensor([0, 999, 3, 1])
    together = gaussian(seeds, steps, (3, 5, 7))
    alone = torch.stack([one(int(seed), int(step), (3, 5, 7)) for seed, step in zip(seeds, steps, strict=True)])
    assert torch.equal(together, alone)


def test_an_element_does_not_know_how_large_its_picture_is() -> None:
    assert torch.equal(one(1, 2, (3, 16, 16)).flatten()[:50], one(1, 2, (50,)))


def test_noise_drawn_ahead_is_the_noise_of_its_steps() -> None:
    slots = Slots(2, (3, 8, 8), 100, torch.device("cpu"))
    slots.draw_ahead([1], seed=5, step=32)
    expected = torch.stack([one(5, 32 + i, (3, 8, 8)) for i in range(slots.ahead_steps)])
    assert torch.equal(slots.ahead[1], expected)


def test_a_seed_is_more_than_its_low_word() -> None:
    draws = [one(seed, 0, (64,)) for seed in (5, 5 + 2**32, 5 + 2**33, 5 + 2**62)]
    assert len({tuple(draw.tolist()) for draw in draws}) == 4


def test_a_million_draws_have_the_moments_of_a_normal_distribution() -> None:
    z = many(seed=42)
    moments = [np.mean(z), np.mean(z**2), np.mean(z**3), np.mean(z**4)]
    deviations = [math.sqrt(v / MILLION) for v in (1, 2, 15, 96)]  # of these moments, from E z^2k - (E z^k)^2
    for moment, expected, deviation in zip(moments, (0, 1, 0, 3), deviations, strict=True):
        assert abs(moment - expected) < 4 * deviation


def test_a_million_draws_are_distributed_normally() -> None:
    """Kolmogorov's distance; 1.95 / sqrt(n) is passed once in a thousand times."""
    z = np.sort(many(seed=42))
    normal = 0.5 * (1 + torch.erf(torch.from_numpy(z) / math.sqrt(2)).numpy())
    assert np.abs(normal - (np.arange(MILLION) + 0.5) / MILLION).max() < 1.95 / math.sqrt(MILLION)


def test_steps_seeds_domains_and_neighbours_are_independent() -> None:
    z = many(seed=42)
    others = {
        "the next step": many(42, step=1),
        "the next seed": many(43),
        "the high word": many(42 + 2**32),
        "x_T": many(42, domain=INITIAL),
        "the next element": np.roll(z, 1),
        "the same place in the next four": np.roll(z, 4),
    }
    for other in others.values():
        assert abs(np.mean(z * other)) < 4 / math.sqrt(MILLION)
        assert abs(np.mean((z**2 - 1) * (other**2 - 1))) < 4 * 2 / math.sqrt(MILLION)


def test_torch_noise_draws_the_same_as_diffusers() -> None:
    """7 x 7 is not a multiple of 16, where one draw of two pictures would differ from two draws of one."""
    twin, generator = TorchNoise(11, (1, 7, 7)), torch.Generator("cpu").manual_seed(11)
    expected = [torch.randn(1, 1, 7, 7, generator=generator)[0] for _ in range(3)]
    assert all(torch.equal(twin.draw(), draw) for draw in expected)
