"""What is told of a picture in a batch and the same picture alone."""

import numpy as np

from benchmarks.measure import Measure
from benchmarks.neighbours import compared, pictures
from tests.model.worlds import pipeline, shaken, small


def test_floats_that_differ_are_told_apart_from_bytes_that_differ() -> None:
    expected = np.array([[0.1, 0.2, 0.3, 0.9]], np.float32)
    given = expected + np.array([[0, 1e-6, 0, 2 / 255]], np.float32)
    floats, furthest, levels = compared("them", given, expected)

    assert (floats.value, levels) == (50, Measure("them: bytes that differ", 1, "of 4"))
    assert abs(furthest.value - 2) < 1e-3


def test_each_picture_of_a_batch_has_the_noise_of_its_own_seed() -> None:
    pipe = pipeline(shaken(small()))
    both = pictures(pipe, [4, 5], 2)

    for index, seed in enumerate((4, 5)):
        np.testing.assert_allclose(both[index], pictures(pipe, [seed], 2)[0], rtol=0, atol=0.004)
    assert np.abs(both[0] - both[1]).max() > 0.1
