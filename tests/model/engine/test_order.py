"""How long requests wait by rank, by the engine's scheduler and the step times of two machines."""

import pytest

from benchmarks.order import CPU, GPU, World, beside_a_flood, equal_steps, late, poisson, seated_by_rank


@pytest.mark.parametrize("world", [CPU, GPU], ids=["cpu", "gpu"])
def test_short_requests_take_at_most_a_tenth_of_what_they_take_in_batches_of_equal_step_counts(world: World) -> None:
    ours, theirs = poisson(world, 0.8, 2000), poisson(world, 0.8, 2000)
    seated_by_rank(world, ours)
    equal_steps(world, theirs)

    assert late(ours, 50) <= 0.1 * late(theirs, 50)
    assert late(ours, 1000) <= 1.5 * late(theirs, 1000)  # and the long ones do not pay for it


@pytest.mark.parametrize("slots", [1, 2, 8])
@pytest.mark.parametrize("steps", [50, 1000])
def test_beside_a_flood_of_another_owner_a_picture_takes_as_long_as_with_half_the_slots(slots: int, steps: int) -> None:
    assert max(beside_a_flood(World(slots, CPU.step_s), steps)) <= 1.5


def test_without_owners_it_would_wait_for_all_earlier_requests() -> None:
    assert max(beside_a_flood(CPU, 50, apart=False)) > 10
