"""How far made pictures are from real ones: the Fréchet distance of Heusel et al. (2017), on a judge's features."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.sampling.schedule import FloatArray, IntArray

GROUPS = 10  # of the jackknife


@dataclass(frozen=True, slots=True)
class Gaussian:
    """What the distance reads of a set of features: their mean [D] and covariance [D, D]."""

    mean: FloatArray
    covariance: FloatArray

    @classmethod
    def of(cls, features: FloatArray, weights: FloatArray | None = None) -> "Gaussian":
        """features: [N, D], N > 1; weights: [N] how much each counts, or all alike"""
        return cls(np.average(features, 0, weights), np.cov(features, rowvar=False, aweights=weights))


def root(covariance: FloatArray) -> FloatArray:
    """The symmetric square root. [D, D]"""
    values, vectors = np.linalg.eigh(covariance)
    rooted: FloatArray = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    return rooted


def frechet(a: Gaussian, b: Gaussian) -> float:
    """|mean_a - mean_b|² + tr(C_a + C_b - 2 (C_a C_b)^½): the squared 2-Wasserstein distance of two Gaussians."""
    half = root(a.covariance)
    cross = np.sqrt(np.linalg.eigvalsh(half @ b.covariance @ half).clip(0)).sum()
    return float(np.sum((a.mean - b.mean) ** 2) + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross)


@dataclass(frozen=True, slots=True)
class Distance:
    """A Fréchet distance, with what a jackknife over tenths of the made pictures says of it."""

    plain: float  # as papers give it; too great by about a number over N
    corrected: float  # without this bias: what a jackknife expects of pictures without end
    error: float  # standard error of `corrected`


def alike(groups: IntArray) -> FloatArray:
    """The weight of each picture that lets every group weigh the same. groups: [N] -> [N]"""
    weights: FloatArray = 1.0 / np.bincount(groups)[groups]
    return weights


def distance(made: FloatArray, real: Gaussian, groups: IntArray | None = None) -> Distance:
    """How far these features are from the real ones. made: [N, D], in a random order; groups: [N] of which each is one
    and all weigh the same, or none"""
    groups = np.zeros(len(made), int) if groups is None else groups
    tenth = np.empty(len(made), int)
    tenth[np.argsort(groups, kind="stable")] = np.arange(len(made)) % GROUPS  # about a tenth of each group

    def of(chosen: NDArray[np.bool_]) -> float:
        return frechet(Gaussian.of(made[chosen], alike(groups[chosen])), real)

    plain, without = of(tenth >= 0), np.array([of(tenth != each) for each in range(GROUPS)])
    corrected = GROUPS * plain - (GROUPS - 1) * without.mean()
    error = np.sqrt((GROUPS - 1) * without.var())
    return Distance(plain, float(corrected), float(error))
