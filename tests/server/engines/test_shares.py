"""How much is done before a newcomer's turn comes."""

from server.engines.shares import steps_before


def test_a_tenant_alone_waits_for_its_own_work_only() -> None:
    assert steps_before(30, []) == 30


def test_each_other_tenant_has_had_as_much_by_then_or_all_it_wants() -> None:
    assert steps_before(30, [10, 30, 1000]) == 30 + 10 + 30 + 30
