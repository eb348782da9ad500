"""How much privacy a mechanism lost at the least, from guesses at who was in its data: statistics alone.

Steinke, Nasr and Jagielski 2023, "Privacy auditing with one (1) training run". Each of m canaries was put into the data, or left out, by a
fair coin of its own. From what was released an auditor guesses some of the coins and abstains from the others. Whoever guesses better than
(epsilon, delta)-DP allows has shown that the mechanism does not have it.

How many to guess has to be settled before the coins are seen. Several counts are tried here, each at its share of the error (Bonferroni).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from fedlearn.errors import StudyError
from fedlearn.privacy.plan import FixedCohort, PoissonSampling, Spaced

if TYPE_CHECKING:
    from fedlearn.privacy.plan import PrivacyPlan

Scores = npt.NDArray[np.float64]
Coins = npt.NDArray[np.bool_]

GUESSED_SHARES: Final = (0.1, 0.2, 0.4, 0.9)
"""Shares of the canaries that are guessed: few catch noise that is a little too small, many catch noise that is missing."""
CONFIDENCE: Final = 0.95
LARGEST_BOUND: Final = 20.0
"""No bound above this is looked for: with m canaries it cannot exceed about ln m."""
_COARSE: Final = 0.125
_FINE: Final = 5e-4
_POWER_SEED: Final = 20230515
FEWEST: Final = 10
"""Canaries; with fewer no guess can be surprising."""


def p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """The most that chance gives `correct` or more right guesses, if the mechanism is (epsilon, delta)-DP.

    Theorem 5.2, conditional on the number of guesses: with W ~ Binomial(guesses, e^epsilon / (1 + e^epsilon)) and v right guesses,
    P[W >= v] + 2 m delta max_i P[v - i <= W < v] / i.

    Args:
        canaries: m, those that were not guessed at too.
        guesses: how many were.
        correct: how many guesses were right.
        epsilon: from 0.
        delta: from 0 to 1.
    """
    if not 0 <= correct <= guesses <= canaries:
        raise ValueError(f"audit: got {correct} right of {guesses} guesses at {canaries} canaries")
    if not (epsilon >= 0 and 0 <= delta <= 1):
        raise ValueError(f"audit: got epsilon {epsilon}, delta {delta}")
    if correct == 0:
        return 1.0
    log_right = -math.log1p(math.exp(-epsilon))
    mass = np.exp(_log_choices(guesses) + log_right * guesses - epsilon * np.arange(guesses, -1, -1))
    tail = float(mass[correct:].sum())
    below = np.cumsum(mass[correct - 1 :: -1])
    worst = float(np.max(below / np.arange(1, correct + 1)))
    return min(1.0, tail + 2 * canaries * delta * worst)


def epsilon_lower_bound(canaries: int, guesses: int, correct: int, delta: float, confidence: float) -> float:
    """The epsilon below which every one is refuted; 0 where none is.

    Whatever the mechanism's true epsilon at `delta`, this is above it with probability 1 - confidence at the most. It is to 1e-3,
    rounded down, and `LARGEST_BOUND` at the most.
    """
    error = 1.0 - confidence

    def refuted(epsilon: float) -> bool:
        return p_value(canaries, guesses, correct, epsilon, delta) <= error

    # From below: the p-value need not rise everywhere, and a bound stands on all that is below it.
    steps = 0
    while steps * _COARSE < LARGEST_BOUND and refuted(steps * _COARSE):
        steps += 1
    if steps == 0:
        return 0.0
    low, high = (steps - 1) * _COARSE, steps * _COARSE
    while high - low > _FINE:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return math.floor(low * 1000) / 1000


@lru_cache(maxsize=64)
def _log_choices(count: int) -> npt.NDArray[np.float64]:
    """Logarithms of how many ways there are to choose 0, 1, ..., count out of count."""
    from scipy.special import gammaln

    chosen = np.arange(count + 1)
    return np.asarray(gammaln(count + 1) - gammaln(chosen + 1) - gammaln(count - chosen + 1))


@dataclass(frozen=True)
class Guesses:
    """One way to guess, and what came of it."""

    guesses: int
    correct: int
    epsilon_lower: float


@dataclass(frozen=True)
class Finding:
    """What an audit of one run found.

    Args:
        canaries: how many there were.
        delta: that the bound holds for.
        confidence: that the bound is not above the truth.
        tried: every number of guesses, at its share of the error.
        epsilon_lower: the best bound of those tried.
        p_claim: of the claim: the most that chance gives such guesses, were the claim true.
    """

    canaries: int
    delta: float
    confidence: float
    tried: tuple[Guesses, ...]
    epsilon_lower: float
    p_claim: float

    @property
    def refuted(self) -> bool:
        """Whether the claim is."""
        return self.p_claim <= 1.0 - self.confidence


def guess_counts(canaries: int) -> tuple[int, ...]:
    """How many canaries are guessed at, each way that is tried: even numbers, half of each said to be in.

    Raises:
        StudyError: there are too few canaries.
    """
    if canaries < FEWEST:
        raise StudyError(f"audit: got {canaries} canaries, expected at least {FEWEST}", hint="1000 is usual")
    return tuple(sorted({2 * max(1, round(share * canaries / 2)) for share in GUESSED_SHARES}))


def count_correct(scores: Scores, inside: Coins, guesses: int) -> int:
    """Right guesses: that the highest half of `guesses` was in, and the lowest was out."""
    half, order = guesses // 2, np.argsort(scores, kind="stable")
    return int(np.count_nonzero(inside[order[len(order) - half :]]) + np.count_nonzero(~inside[order[:half]]))


def judge(scores: Scores, inside: Coins, epsilon: float, delta: float, confidence: float = CONFIDENCE) -> Finding:
    """Put a claim of (epsilon, delta)-DP to the test.

    Args:
        scores: higher where a canary looks as if it was in, shape (m,); made from what was released, never from the coins.
        inside: whether it was, by a fair coin each, shape (m,).
        epsilon: claimed; infinite claims nothing, and is never refuted.
        delta: of the claim, and of the bound.
        confidence: of the bound.

    Raises:
        StudyError: the scores are not finite, or too few.
    """
    if scores.shape != inside.shape or scores.ndim != 1 or not bool(np.isfinite(scores).all()):
        raise StudyError(f"audit: scores of shape {scores.shape} for {inside.shape} canaries, expected finite ones")
    counts = guess_counts(len(scores))
    error = (1.0 - confidence) / len(counts)
    tried = []
    p_claim = 1.0
    for guesses in counts:
        correct = count_correct(scores, inside, guesses)
        bound = epsilon_lower_bound(len(scores), guesses, correct, delta, 1.0 - error)
        tried.append(Guesses(guesses, correct, bound))
        if math.isfinite(epsilon):
            p_claim = min(p_claim, p_value(len(scores), guesses, correct, epsilon, delta))
    best = max(one.epsilon_lower for one in tried)
    return Finding(len(scores), delta, confidence, tuple(tried), best, min(1.0, p_claim * len(counts)))


@dataclass(frozen=True)
class Power:
    """What the audit would say of a build whose noise is `noise_factor` times the plan's.

    Args:
        noise_factor: 1 is an honest build, 0 one without noise.
        refuted: share of such builds that it would refute.
        epsilon_lower: its bound, in the median.
    """

    noise_factor: float
    refuted: float
    epsilon_lower: float


def power(
    plan: PrivacyPlan,
    epsilon: float,
    canaries: int,
    confidence: float = CONFIDENCE,
    factors: tuple[float, ...] = (1.0, 0.5, 0.3, 0.1, 0.0),
    repetitions: int = 20,
) -> tuple[Power, ...]:
    """What an audit of a plan can see, from the plan alone: canaries' scores are drawn as an honest white-box release has them.

    Args:
        plan: to be audited.
        epsilon: that it claims.
        canaries: how many.
        confidence: of the bound.
        factors: what the noise of imagined builds is multiplied by.
        repetitions: imagined audits for each.
    """
    generator = np.random.default_rng(_POWER_SEED)
    found = []
    for factor in factors:
        audits = []
        for _ in range(repetitions):
            inside = generator.random(canaries) < 0.5
            audits.append(
                judge(imagined_scores(plan, factor, inside, generator), inside, epsilon, plan.delta, confidence)
            )
        share = sum(one.refuted for one in audits) / repetitions
        found.append(Power(factor, share, float(np.median([one.epsilon_lower for one in audits]))))
    return tuple(found)


def imagined_scores(plan: PrivacyPlan, noise_factor: float, inside: Coins, generator: np.random.Generator) -> Scores:
    """Scores of canaries each of which has a coordinate of its own: how often it was drawn, plus the noise of every release.

    A canary that was not in gives nothing; under replace-one it was replaced by its opposite.
    """
    match plan.sampling:
        case Spaced(_, separation, _):
            return _imagined_correlated(plan, separation, noise_factor, inside, generator)
        case PoissonSampling(rate):
            share = rate
        case FixedCohort(size, population):
            share = size / population
        case _:
            share = 1.0
    drawn = generator.binomial(plan.releases, share, len(inside)).astype(np.float64)
    outside = -1.0 if isinstance(plan.sampling, FixedCohort) else 0.0
    noise = generator.standard_normal(len(inside)) * (
        noise_factor * plan.sum_noise_multiplier * math.sqrt(plan.releases)
    )
    return np.where(inside, drawn, outside * drawn) + noise


def _imagined_correlated(
    plan: PrivacyPlan, separation: int, noise_factor: float, inside: Coins, generator: np.random.Generator
) -> Scores:
    """Likelihood ratios times the noise's variance, of canaries that are asked as often as they may be, from a round of their own on."""
    assert plan.matrix is not None
    column, participations = plan.matrix.coefficients(plan.rounds), plan.ftrl.participations
    squares = []  # of what a canary gives, by its first round
    for first in range(min(separation, plan.rounds)):
        asked = np.zeros(plan.rounds)
        asked[first::separation][:participations] = 1.0
        squares.append(float(np.sum(np.convolve(column, asked)[: plan.rounds] ** 2)))
    square = np.array(squares)[generator.integers(len(squares), size=len(inside))]
    noise = generator.standard_normal(len(inside)) * noise_factor * plan.sum_noise_multiplier * np.sqrt(square)
    scores: Scores = np.where(inside, square, 0.0) - square / 2 + noise
    return scores
