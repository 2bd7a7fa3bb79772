"""Surrogate: what a few measured configs say about all others: a Gaussian process over the logarithm of their times.

A search space of a template has some hundreds of feasible configs, few enough to ask about every one of them, and so uneven
(3 % of the points of the selection's are feasible) that a sampler of points mostly proposes what cannot be built.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_LENGTHS = (0.15, 0.35, 0.8, 2.0, 8.0)
"""How far along a parameter's range (1 is all of it) times are alike; 8: the parameter does not matter."""
_NOISES = (1e-4, 1e-3, 1e-2, 1e-1)
"""Shares of the variance: what two visits of one config differ by, and what the parameters do not explain."""


@dataclass(frozen=True)
class Posterior:
    """Mean and standard deviation for every config asked about."""

    mean: Array
    deviation: Array

    def improvement(self, best: float) -> Array:
        """The expected improvement on ``best`` (times are minimised)."""
        gain = best - self.mean
        z = gain / self.deviation
        density = np.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
        return gain * _normal(z) + self.deviation * density


class Surrogate:
    """Gaussian process with a Matérn kernel (ν = 5/2) whose lengths are chosen, one parameter after another, by likelihood.

    Args:
        width: number of parameters.
    """

    def __init__(self, width: int) -> None:
        self._lengths = np.full(width, _LENGTHS[2])
        self._noise = _NOISES[2]

    def fit(self, points: Array, values: Array, doubt: Array | None = None) -> None:
        """Take over the values of ``[configs, parameters]`` points, every parameter scaled to [0, 1].

        Args:
            doubt: for each value how far it may be off, beyond noise, as a share of the variance.
        """
        self._level = float(np.median(values))
        self._points, self._targets = points, values - self._level
        self._doubt = np.zeros(len(values)) if doubt is None else doubt
        self._choose()
        self._factor, self._weights, self._scale = self._solve(self._correlations(), self._noise)

    def imagine(self, points: Array) -> None:
        """Take the values expected of these points for known: nothing more is expected to be learned there."""
        expected = self.predict(points).mean - self._level
        self._points, self._targets = np.vstack([self._points, points]), np.concatenate([self._targets, expected])
        self._doubt = np.concatenate([self._doubt, np.zeros(len(points))])
        self._factor, self._weights, _ = self._solve(self._correlations(), self._noise)

    def predict(self, points: Array) -> Posterior:
        """What is expected of points."""
        across = _kernel(points, self._points, self._lengths)
        half = np.linalg.solve(self._factor, across.T)
        variance = self._scale * np.maximum(1.0 - np.einsum("ij,ij->j", half, half), 1e-9)
        return Posterior(self._level + across @ self._weights, np.sqrt(variance))

    def _choose(self) -> None:
        """Lengths and noise, one after another, by likelihood."""
        apart = (self._points[:, None, :] - self._points[None, :, :]) ** 2
        squares = (apart / self._lengths**2).sum(axis=2)
        for parameter, length in enumerate(self._lengths):
            along, others = apart[:, :, parameter], np.maximum(squares - apart[:, :, parameter] / length**2, 0.0)
            found = {each: others + along / each**2 for each in _LENGTHS}
            self._lengths[parameter] = chosen = max(found, key=lambda each: self._likelihood(_matern(found[each]), self._noise))
            squares = found[chosen]
        correlations = _matern(squares)
        self._noise = max(_NOISES, key=lambda noise: self._likelihood(correlations, noise))

    def _correlations(self) -> Array:
        return _kernel(self._points, self._points, self._lengths)

    def _likelihood(self, correlations: Array, noise: float) -> float:
        factor, _, scale = self._solve(correlations, noise)
        return -0.5 * len(self._targets) * math.log(scale) - float(np.log(np.diag(factor)).sum())

    def _solve(self, correlations: Array, noise: float) -> tuple[Array, Array, float]:
        """Cholesky factor of the correlations, weights of the points, and the variance that fits best."""
        factor: Array = np.asarray(np.linalg.cholesky(correlations + np.diag(noise + self._doubt)), dtype=np.float64)
        half = np.linalg.solve(factor, self._targets)
        weights = np.linalg.solve(factor.T, half)
        # Two pseudo-observations of a spread of 20 %: with few configs known the variance is not taken to be tiny.
        scale = (float(half @ half) + 2 * 0.2**2) / (len(half) + 2)
        return factor, weights, scale


def _kernel(left: Array, right: Array, lengths: Array) -> Array:
    return _matern((((left[:, None, :] - right[None, :, :]) / lengths) ** 2).sum(axis=2))


def _matern(squares: Array) -> Array:
    """The correlation at squared distances."""
    root = np.sqrt(5 * squares)
    found: Array = (1 + root + root * root / 3) * np.exp(-root)
    return found


def _normal(z: Array) -> Array:
    """The normal distribution function, to 1e-7 (Abramowitz and Stegun 26.2.17)."""
    t = 1 / (1 + 0.2316419 * np.abs(z))
    series = t * (0.319381530 + t * (-0.356563782 + t * (1.781477937 + t * (-1.821255978 + t * 1.330274429))))
    tail = np.exp(-0.5 * z * z) / math.sqrt(2 * math.pi) * series
    found: Array = np.where(z >= 0, 1 - tail, tail)
    return found
