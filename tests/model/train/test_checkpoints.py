"""Looks at a net in training: as often as they take a small share of the time."""

from model.train.checkpoints import FREE_S, Budget


def test_quick_looks_are_taken_at_every_checkpoint() -> None:
    budget, taken = Budget(1 / 10), list[int]()
    for elapsed in (10, 30, *range(90, 3600, 60)):
        if budget.allows(3.0, elapsed):
            budget.pay(3.0)
            taken.append(elapsed)

    assert taken == [10, 30, *range(90, 3600, 60)]


def test_slow_looks_take_no_more_than_their_share() -> None:
    budget = Budget(1 / 20)
    for elapsed in range(60, 36_000, 60):
        if budget.allows(30.0, elapsed):
            budget.pay(60.0)  # more than was expected

    assert 36_000 / 20 - 60 <= budget.spent_s <= 36_000 / 20 + FREE_S
