"""Rényi differential privacy, our own implementation: what the ledger stops by, and the check on every other accountant.

Sampled Gaussian   Mironov, Talwar and Zhang 2019, "Rényi differential privacy of the sampled Gaussian mechanism", section 3:
                   A(alpha) = E[((1 - q) + q exp((2 z - 1) / (2 sigma^2)))^alpha], z ~ N(0, sigma^2), here by quadrature for all alpha
Without replacement  Wang, Balle and Kasiviswanathan 2019, "Subsampled Rényi differential privacy", theorem 27, integer alpha
Skellam            Agarwal, Kairouz and Liu 2021, "The Skellam mechanism for differentially private federated learning", corollary 3.6, integer alpha
Discrete Gaussians  Kairouz, Liu and Steinke 2021, "The distributed discrete Gaussian mechanism for federated learning", proposition 14
Conversion         Canonne, Kamath and Steinke 2020, "The discrete Gaussian", proposition 12
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt
from scipy.special import gammaln, logsumexp

from fedlearn.errors import UnsupportedError
from fedlearn.privacy.events import (
    DiscreteGaussians,
    Gaussian,
    Leaf,
    PoissonSampled,
    Relation,
    SampledWithoutReplacement,
    Skellam,
    ZeroConcentrated,
)

FloatArray = npt.NDArray[np.float64]

ORDERS: Final = tuple(
    [1 + x / 10 for x in range(1, 100)] + [float(x) for x in range(11, 64)] + [96.0, 128.0, 192.0, 256.0, 512.0, 1024.0]
)
"""Orders at which divergences are tracked."""

_INTEGRAL_SPAN: Final = 13.0  # standard deviations beyond which the integrand is below exp(-84) of its peak
_EXACT_DIGITS: Final = 400  # of the alternating sums of theorem 27; beyond, its simpler bound is taken


def rdp_of(leaf: Leaf, relation: Relation, orders: tuple[float, ...] = ORDERS) -> FloatArray:
    """Rényi divergence of one elementary release.

    Args:
        leaf: the release.
        relation: which data sets are neighbours.
        orders: above 1.

    Returns:
        One divergence an order, float64, shape (orders,); infinite where no bound is known.

    Raises:
        UnsupportedError: there is no bound for this release under this relation.
    """
    return _rdp_of(leaf, relation, orders).copy()


@lru_cache(maxsize=4096)
def _rdp_of(leaf: Leaf, relation: Relation, orders: tuple[float, ...]) -> FloatArray:
    match leaf:
        case Gaussian(sigma):
            return _gaussian(sigma, orders)
        case ZeroConcentrated(rho, xi):
            return xi + rho * np.array(orders)
        case PoissonSampled(rate, Gaussian(sigma)) if relation is Relation.ADD_OR_REMOVE_ONE:
            return _gaussian(sigma, orders) if rate == 1 else _poisson(rate, sigma, orders)
        case SampledWithoutReplacement(size, population, Gaussian(sigma)) if relation is Relation.REPLACE_ONE:
            whole = size == population
            return _gaussian(sigma, orders) if whole else _without_replacement(size / population, sigma, orders)
        case Skellam():
            return _between_integers(lambda alpha: _skellam(leaf, alpha), orders)
        case DiscreteGaussians():
            return _between_integers(lambda alpha: _discrete_gaussians(leaf, alpha), orders)
    raise UnsupportedError(
        f"accounting: no bound is known for {type(leaf).__name__} when neighbours {relation.value.replace('-', ' ')}",
        hint="Poisson sampling goes with add-or-remove-one, a fixed cohort with replace-one",
    )


def total_rdp(counts: Mapping[Leaf, int], relation: Relation, orders: tuple[float, ...] = ORDERS) -> FloatArray:
    """Divergence of a composition: at every order it is the sum, also when later releases depend on earlier ones."""
    total = np.zeros(len(orders))
    for leaf, count in counts.items():
        total += count * _rdp_of(leaf, relation, orders)
    return total


def overhead(delta: float, orders: tuple[float, ...] = ORDERS) -> FloatArray:
    """What converting divergence to (epsilon, delta) adds at each order: epsilon = divergence + overhead."""
    alpha = np.array(orders)
    added: FloatArray = np.log1p(-1 / alpha) - (math.log(delta) + np.log(alpha)) / (alpha - 1)
    return added


def epsilon_of(divergence: FloatArray, delta: float, orders: tuple[float, ...] = ORDERS) -> float:
    """The smallest epsilon over all orders: valid for releases whose parameters were fixed in advance.

    Args:
        divergence: shape (orders,).
        delta: above 0.
        orders: of the divergences.
    """
    if not divergence.any():
        return 0.0
    return max(0.0, float(np.min(divergence + overhead(delta, orders))))


def _gaussian(sigma: float, orders: tuple[float, ...]) -> FloatArray:
    return np.array(orders) / (2 * sigma**2)


def _poisson(q: float, sigma: float, orders: tuple[float, ...]) -> FloatArray:
    """The trapezoidal rule converges exponentially here: the integrand is analytic within |Im z| < pi sigma^2."""
    step = min(sigma / 8, sigma**2 / 3)
    found = np.empty(len(orders))
    for i, alpha in enumerate(orders):
        # All mass lies between the peaks at 0 and, when every factor is exp((2 z - 1) / 2 sigma^2), at alpha.
        count = math.ceil((alpha + 2 * _INTEGRAL_SPAN * sigma) / step)
        if count > 20_000_000:  # noise so small that nothing is left to bound
            found[i] = math.inf
            continue
        z = -_INTEGRAL_SPAN * sigma + step * np.arange(count + 1)
        factor = np.logaddexp(math.log1p(-q), math.log(q) + (2 * z - 1) / (2 * sigma**2))
        log_density = -(z**2) / (2 * sigma**2) - math.log(sigma * math.sqrt(2 * math.pi))
        log_a = float(logsumexp(log_density + alpha * factor)) + math.log(step)
        found[i] = max(0.0, log_a) / (alpha - 1)
    return found


def _without_replacement(q: float, sigma: float, orders: tuple[float, ...]) -> FloatArray:
    """Never above taking part every time.

    The outputs on two neighbours, cohorts drawn together, are mixtures of pairs that are each at most as far apart as that, and the
    divergence is jointly quasi-convex (van Erven and Harremoes 2014, theorem 13).
    """
    sampled = _between_integers(lambda alpha: _log_a_without_replacement(q, sigma, alpha) / (alpha - 1), orders)
    return np.minimum(sampled, _gaussian(sigma, orders))


def _between_integers(divergence: Callable[[int], float], orders: tuple[float, ...]) -> FloatArray:
    """Between integers (alpha - 1) times the divergence is convex and 0 at 1, so its chord is a bound (Wang et al. 2019, corollary 10)."""
    found = np.empty(len(orders))
    for i, alpha in enumerate(orders):
        below, above = math.floor(alpha), math.ceil(alpha)
        low, high = ((one - 1) * divergence(one) if one > 1 else 0.0 for one in (below, above))
        found[i] = (low + (alpha - below) * (high - low)) / (alpha - 1)
    return found


def _skellam(leaf: Skellam, alpha: int) -> float:
    mu, squared = leaf.variance, leaf.l2**2
    extra = min(((2 * alpha - 1) * squared + 6 * leaf.l1) / (4 * mu**2), 3 * leaf.l1 / (2 * mu))
    return alpha * squared / (2 * mu) + extra


def _discrete_gaussians(leaf: DiscreteGaussians, alpha: int) -> float:
    """tau bounds how far a sum of discrete Gaussians is from one, at every value."""
    whole, tau = math.sqrt(leaf.shares * leaf.variance), tau_of(leaf.variance, leaf.shares)
    l2, l1 = leaf.l2 / whole, leaf.l1 / whole
    return min(
        alpha / 2 * l2**2 + tau * leaf.dimension,
        alpha / 2 * (l2**2 + 2 * l1 * tau + tau**2 * leaf.dimension),
        alpha / 2 * (l2 + tau * math.sqrt(leaf.dimension)) ** 2,
    )


@lru_cache(maxsize=256)
def tau_of(variance: float, shares: int) -> float:
    """10 times the sum over k = 1 ... shares - 1 of exp(-2 pi^2 v k / (k + 1)): Kairouz, Liu and Steinke 2021, theorem 1."""
    k = np.arange(1, shares)
    return 10 * float(np.exp(-2 * math.pi**2 * variance * k / (k + 1)).sum())


@lru_cache(maxsize=8192)
def _log_a_without_replacement(q: float, sigma: float, alpha: int) -> float:
    if alpha == 1:
        return 0.0
    cumulant = [j * (j - 1) / (2 * sigma**2) for j in range(alpha + 2)]  # (j - 1) times the Gaussian's divergence at j
    ternary = _ternary(sigma)
    terms = [0.0]
    for j in range(2, alpha + 1):
        binomial = float(gammaln(alpha + 1) - gammaln(j + 1) - gammaln(alpha - j + 1))
        bound = math.log(2) + cumulant[j]
        if j == 2:
            bound = min(bound, math.log(4) + cumulant[2] + math.log(-math.expm1(-cumulant[2])))
        elif j + 1 < len(ternary):
            bound = min(bound, math.log(4) + (ternary[2 * (j // 2)] + ternary[2 * math.ceil(j / 2)]) / 2)
        terms.append(j * math.log(q) + binomial + bound)
    return float(logsumexp(terms))


@lru_cache(maxsize=64)
def _ternary(sigma: float) -> tuple[float, ...]:
    """log of the l-th forward difference of exp(cumulant) at 0, for as many l as `_EXACT_DIGITS` digits can tell.

    The terms cancel to far below double precision, so they are summed with as many digits as the largest one has.
    """
    import mpmath

    last = 2
    while (last + 2) * (last + 1) / (2 * sigma**2) / math.log(10) + last < _EXACT_DIGITS - 30 and last < ORDERS[-1]:
        last += 2
    with mpmath.workdps(_EXACT_DIGITS):
        powers = [mpmath.exp(mpmath.mpf(j * (j - 1)) / (2 * mpmath.mpf(sigma) ** 2)) for j in range(last + 1)]
        found = [-math.inf, -math.inf]
        for order in range(2, last + 1):
            total = mpmath.fsum((-1) ** (order - j) * math.comb(order, j) * powers[j] for j in range(order + 1))
            found.append(float(mpmath.log(abs(total))))
    return tuple(found)
