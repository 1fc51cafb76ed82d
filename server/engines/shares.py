"""Fair shares: tenants take turns by image-steps, so each has had as many as any other, or all it asked for."""

from collections.abc import Iterable


def steps_before(own: float, others: Iterable[float]) -> float:
    """Image-steps that an engine does until a tenant's newest sample is done.

    own: image-steps of that tenant up to and with that sample, in its order; others: what remains of each other tenant.
    """
    return own + sum(min(theirs, own) for theirs in others)
