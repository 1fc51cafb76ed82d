"""How far made pictures are from real ones: the Fréchet distance of Heusel et al. (2017), on a judge's features."""

from dataclasses import dataclass

import numpy as np

from model.sampling.schedule import FloatArray

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


def distance(made: FloatArray, real: Gaussian, weights: FloatArray | None = None) -> Distance:
    """How far these features are from the real ones. made: [N, D], in a random order; weights: [N], as in `Gaussian`"""
    weights = np.ones(len(made)) if weights is None else weights
    plain = frechet(Gaussian.of(made, weights), real)
    rest = [np.arange(len(made)) % GROUPS != tenth for tenth in range(GROUPS)]
    without = np.array([frechet(Gaussian.of(made[chosen], weights[chosen]), real) for chosen in rest])
    corrected = GROUPS * plain - (GROUPS - 1) * without.mean()
    error = np.sqrt((GROUPS - 1) * without.var())
    return Distance(plain, float(corrected), float(error))
