"""Every plan under two accountants or three: which epsilon is reported, which is shown beside it, and what makes either a defect.

A plan whose parameters were all fixed in advance is reported by its privacy loss distribution (dp-accounting's PLD), where there is
one for its events; our own Rényi bound is shown beside it. PLD above Rényi, or outside the interval of Opacus' PRV accountant, cannot be
right, nor can integer noise that costs less than Gaussian noise of its size: it stops the run. What is charged as it comes is another matter: see budget.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from importlib import metadata
from typing import TYPE_CHECKING, Final

from fedlearn.errors import AccountingError, StudyError
from fedlearn.privacy import rdp
from fedlearn.privacy.events import (
    Cost,
    DiscreteGaussians,
    Gaussian,
    Leaf,
    PoissonSampled,
    Relation,
    Repeated,
    SampledWithoutReplacement,
    Skellam,
    ZeroConcentrated,
    leaves,
)

if TYPE_CHECKING:
    from fedlearn.privacy.plan import PrivacyPlan

CALIBRATION_TOLERANCE: Final = 1e-4
"""How far below the budget a calibrated plan's epsilon may be; it is never above."""
LARGEST_EPSILON: Final = 1000.0
"""Beyond this an epsilon is a number without a meaning, and its distribution takes gigabytes: Rényi bounds suffice."""
_AGREEMENT: Final = 1e-3  # absolute and relative: discretisation of PLD and PRV
PLD_GRID: Final = 1e-4
"""Losses are rounded up to multiples of this."""
_LEAST_NOISE: Final = 1e-3
_MOST_NOISE: Final = 1e9


class Method(Enum):
    """How an accountant works."""

    PLD = "privacy loss distribution"
    RDP = "Rényi divergence"
    PRV = "privacy random variables"
    LEAST = "Rényi divergence of Gaussian noise of that size"
    MOST = "Rényi divergence in double precision"


@dataclass(frozen=True)
class Bound:
    """One accountant's answer.

    Args:
        method: how it works.
        accountant: its name and version.
        epsilon: its bound or estimate.
        lower: of its interval; most give an upper bound only.
        upper: of its interval.
    """

    method: Method
    accountant: str
    epsilon: float
    lower: float = 0.0
    upper: float = math.inf


@dataclass(frozen=True)
class Accounted:
    """The reported bound, and every other one."""

    reported: Bound
    shown: tuple[Bound, ...]


def account(cost: Cost, delta: float, *, prv: bool = False) -> Accounted:
    """Epsilon of something fixed in advance, under two accountants at least.

    Args:
        cost: what is done.
        delta: of the guarantee.
        prv: ask Opacus' PRV accountant too, where it has an answer: see `fedlearn.privacy.prv`. For what is stated; a loop need not.

    Raises:
        AccountingError: two accountants contradict each other.
        UnsupportedError: no accountant knows the events.
    """
    _check_delta(delta)
    own = Bound(Method.RDP, f"fedlearn RDP {_version('fedlearn')}", rdp_epsilon(cost, delta))
    if has_pld(cost) and own.epsilon <= LARGEST_EPSILON:
        reported = Bound(Method.PLD, f"dp-accounting PLD {_version('dp-accounting')}", pld_epsilon(cost, delta))
        shown = [own]
        if prv and (found := _prv_bound(cost, delta)) is not None:
            shown.append(found)
    else:
        reported = own
        # Integer noise is unknown to it: Gaussian noise of that size costs next to as much, and never more.
        integers = any(isinstance(leaf, Skellam | DiscreteGaussians) for leaf in leaves(cost.event))
        # Its alternating sums for fixed cohorts cancel in double precision, and it takes a looser term where ours has more digits.
        fixed = any(isinstance(leaf, SampledWithoutReplacement) for leaf in leaves(cost.event))
        method = Method.LEAST if integers else Method.MOST if fixed else Method.RDP
        shown = [Bound(method, f"dp-accounting RDP {_version('dp-accounting')}", google_rdp_epsilon(cost, delta))]
    answer = Accounted(reported, tuple(shown))
    check_agreement(answer)
    return answer


def check_agreement(answer: Accounted) -> None:
    """Refuse to report what cannot be right.

    Raises:
        AccountingError: PLD is above the Rényi bound; two implementations of the Rényi bound differ; or an accountant is
            outside another one's interval.
    """
    reported = answer.reported
    for other in answer.shown:
        slack = _AGREEMENT * (1 + abs(other.epsilon))
        if other.method is Method.PRV:
            agree = other.lower - slack <= reported.epsilon <= other.upper + slack
        elif other.method is Method.LEAST:
            agree = other.epsilon <= reported.epsilon + slack
        elif other.method is Method.MOST:
            agree = reported.epsilon <= other.epsilon + slack
        elif reported.method is Method.RDP:  # two implementations of one formula
            agree = math.isclose(reported.epsilon, other.epsilon, abs_tol=slack)
        else:
            agree = reported.epsilon <= other.epsilon + slack
        if not agree:
            raise AccountingError(
                f"accounting: {reported.accountant} says epsilon = {reported.epsilon:.6g}, "
                f"{other.accountant} says {other.epsilon:.6g} [{other.lower:.6g}, {other.upper:.6g}]: one of them is wrong",
                hint="report the plan: nothing is trained or claimed until they agree",
            )


def rdp_epsilon(cost: Cost, delta: float) -> float:
    """Our own Rényi bound, at its best order."""
    _check_delta(delta)
    return rdp.epsilon_of(rdp.total_rdp(leaves(cost.event), cost.relation), delta)


def has_pld(cost: Cost) -> bool:
    """Whether the privacy loss distribution of every release is known."""
    poisson = cost.relation is Relation.ADD_OR_REMOVE_ONE
    return all(isinstance(x, Gaussian) or (isinstance(x, PoissonSampled) and poisson) for x in leaves(cost.event))


def pld_epsilon(cost: Cost, delta: float, *, grid: float = PLD_GRID) -> float:
    """dp-accounting's privacy loss distribution; `has_pld` must hold.

    A plain Gaussian's multiplier is already relative to its relation's sensitivity, so its distribution is the same under both. A
    coarser grid of losses is faster and larger: 1e-3 overstates by a few 1e-4.
    """
    import dp_accounting
    from dp_accounting import pld

    _check_delta(delta)
    counts = leaves(cost.event)
    if not counts:
        return 0.0
    accountant = pld.PLDAccountant(
        dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=grid
    )
    for leaf, count in counts.items():
        accountant.compose(_google_event(leaf), count)
    return float(accountant.get_epsilon(delta))


def google_rdp_epsilon(cost: Cost, delta: float) -> float:
    """dp-accounting's Rényi bound at our orders: the second accountant where no privacy loss distribution is known."""
    import dp_accounting
    from dp_accounting import rdp as google

    def epsilon(counts: Mapping[Leaf, int]) -> float:
        accountant = google.RdpAccountant(list(rdp.ORDERS), dp_accounting.NeighboringRelation[cost.relation.name])
        for leaf, count in counts.items():
            accountant.compose(_google_event(leaf), count)
        return float(accountant.get_epsilon(delta))

    counts = leaves(cost.event)
    sampled = epsilon(counts)
    if len(counts) == 1 and isinstance(leaf := next(iter(counts)), SampledWithoutReplacement):
        return min(sampled, epsilon({leaf.event: counts[leaf]}))  # its bound alone may lie above taking part every time
    return sampled


def _prv_bound(cost: Cost, delta: float) -> Bound | None:
    """Opacus' estimate inside its interval, of releases that have a PLD."""
    from fedlearn.privacy.prv import interval

    if not (counts := leaves(cost.event)) or (found := interval(counts, delta)) is None:
        return None
    lower, estimate, upper = found
    return Bound(Method.PRV, f"Opacus PRV {_version('opacus')}", estimate, lower, upper)


def calibrate(cost_of: Callable[[float], Cost], epsilon: float, delta: float) -> float:
    """The smallest noise multiplier whose reported epsilon is within the budget.

    Args:
        cost_of: noise multiplier to cost; more noise must cost less.
        epsilon: the budget.
        delta: of the guarantee.

    Returns:
        A multiplier whose reported epsilon is at most `epsilon`, and at most `CALIBRATION_TOLERANCE` below it.

    Raises:
        StudyError: the budget is not above 0, or no noise meets it.
    """
    if not (math.isfinite(epsilon) and epsilon > 0):
        raise StudyError(f"privacy: epsilon: got {epsilon}, expected a finite number above 0")
    _check_delta(delta)

    def rough(noise: float) -> float:
        return rdp_epsilon(cost_of(noise), delta)

    def reported(noise: float, grid: float = PLD_GRID) -> float:
        cost = cost_of(noise)
        exact = has_pld(cost) and rough(noise) <= LARGEST_EPSILON
        return pld_epsilon(cost, delta, grid=grid) if exact else rough(noise)

    near = _root(rough, epsilon, 1.0, 1e-3, stride=1.5)
    nearer = _root(lambda noise: reported(noise, 10 * PLD_GRID), epsilon, near, 1e-3, stride=1.05)
    return _root(reported, epsilon, nearer, CALIBRATION_TOLERANCE, stride=1.0005)


def calibrated(plan: PrivacyPlan, epsilon: float) -> PrivacyPlan:
    """The plan with the noise that its whole length, evaluations included, needs to stay within `epsilon`.

    Raises:
        StudyError: no noise does; or the evaluations alone cost as much.
    """
    if (times := plan.evaluations()) and plan.evaluation is not None:
        beside = Cost(Repeated(Gaussian(plan.evaluation.noise_multiplier), times), plan.relation)
        if (spent := pld_epsilon(beside, plan.delta, grid=10 * PLD_GRID)) >= epsilon:
            raise StudyError(
                f"privacy.evaluation_noise: {times} evaluations alone cost epsilon {spent:.3g}, the budget is {epsilon:g}",
                hint="more evaluation_noise, or a larger evaluate.every",
            )
    noise = calibrate(lambda noise: replace(plan, noise_multiplier=noise).whole_cost(), epsilon, plan.delta)
    return replace(plan, noise_multiplier=noise)


def _root(
    epsilon_of: Callable[[float], float], target: float, guess: float, tolerance: float, *, stride: float
) -> float:
    """Where a falling function comes to within `tolerance` below its target: bracket from a guess, then false position in log-log.

    Raises:
        StudyError: between `_LEAST_NOISE` and `_MOST_NOISE` it does not.
    """
    low = high = guess
    at_low = at_high = epsilon_of(guess)
    while at_high > target:
        low, at_low, high, stride = high, at_high, high * stride, stride**2
        if high > _MOST_NOISE:
            raise StudyError(f"privacy: no noise meets epsilon = {target:g}; the plan is too long for it")
        at_high = epsilon_of(high)
    while at_low <= target:
        high, at_high, low, stride = low, at_low, low / stride, stride**2
        if low < _LEAST_NOISE:
            raise StudyError(f"privacy: epsilon = {target:g} is met by next to no noise: it promises nothing")
        at_low = epsilon_of(low)
    aim = target - tolerance / 2 if target > tolerance else target / 2
    for turn in range(200):
        if target - tolerance <= at_high:
            return high
        # False position sticks to one end on a curved function: every fourth step halves.
        straight = math.isfinite(at_low) and at_high > 0 and turn % 4 != 3
        share = math.log(at_low / aim) / math.log(at_low / at_high) if straight else 0.5
        middle = low * (high / low) ** share
        value = epsilon_of(middle)
        if value > target:
            low, at_low = middle, value
        else:
            high, at_high = middle, value
    return high


def _google_event(leaf: Leaf) -> object:
    import dp_accounting

    match leaf:
        case Gaussian(noise):
            return dp_accounting.GaussianDpEvent(noise)
        case PoissonSampled(rate, Gaussian(noise)):
            return dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise))
        case SampledWithoutReplacement(size, population, Gaussian(noise)):
            return dp_accounting.SampledWithoutReplacementDpEvent(
                population, size, dp_accounting.GaussianDpEvent(noise)
            )
        case ZeroConcentrated(rho, xi):
            return dp_accounting.ZCDpEvent(rho, xi)
        case Skellam(variance, l2, _):
            return dp_accounting.GaussianDpEvent(math.sqrt(variance) / l2)
        case DiscreteGaussians(variance, shares, _, l2, _):
            return dp_accounting.GaussianDpEvent(math.sqrt(shares * variance) / l2)


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise StudyError(f"privacy: delta: got {delta}, expected above 0 and below 1")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        from fedlearn import __version__

        return __version__
