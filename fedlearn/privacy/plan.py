"""One frozen value couples unit, sampler, clipping, noise and accountant event, so that they cannot disagree.

A plan states sampling rate and number of releases, never batch size and epochs, which would reveal a site's count. What it costs is not
written into it: it follows from it (`PrivacyPlan.cost`), and accounting.py turns that into an epsilon.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final

from fedlearn.errors import StudyError, UnsupportedError
from fedlearn.learning.update import Weighting
from fedlearn.privacy.events import (
    MAX_COUNT,
    Composed,
    Cost,
    Gaussian,
    Leaf,
    PoissonSampled,
    Relation,
    Repeated,
    SampledWithoutReplacement,
)
from fedlearn.privacy.ftrl import Banded, BufferedToeplitz, FtrlPlan
from fedlearn.privacy.shares import NoiseShares

if TYPE_CHECKING:
    from fedlearn.learning.strategy import Strategy


class Unit(Enum):
    """Whose presence the guarantee hides. Units are never mixed: an epsilon of one says nothing of another."""

    RECORD = "record"
    """One row at one site; every site protects its own."""
    GROUP = "group"
    """All rows of one person or account at one site: a group is drawn whole and gives one clipped gradient."""
    CLIENT = "client"
    """A whole device or user: all that one client ever sends."""


@dataclass(frozen=True)
class PoissonSampling:
    """Every unit takes part in a release with probability `rate`, by a secret coin of its own. Empty draws are releases too."""

    rate: float

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise StudyError(f"privacy: sampling rate: got {self.rate}, expected above 0 and at most 1")


@dataclass(frozen=True)
class FixedCohort:
    """`size` units drawn without replacement out of `population`: accounted as such, under replace-one."""

    size: int
    population: int

    def __post_init__(self) -> None:
        if not 1 <= self.size <= self.population:
            raise StudyError(
                f"privacy: cohort: got {self.size} of {self.population}, expected 1 to the whole population"
            )


@dataclass(frozen=True)
class Everyone:
    """Every unit takes part in every release. Also for cohorts whose draw is not secret: first come, over-selection."""


@dataclass(frozen=True)
class Spaced:
    """Whoever comes, `size` of them in a round, but nobody more often than this (DP-FTRL). Nothing is amplified, and no draw need be secret.

    Args:
        size: asked in a round; public, and what sums are divided by.
        separation: a client that was asked in round t is asked again in round t + separation at the earliest.
        most: rounds in which one client may be asked; None for as many as the separation lets it.
    """

    size: int
    separation: int
    most: int | None = None

    def __post_init__(self) -> None:
        if self.size < 1:
            raise StudyError(f"privacy: cohort: got {self.size} clients a round, expected at least 1")


Sampling = PoissonSampling | FixedCohort | Everyone | Spaced
CLIPS: Final = (1e-9, 1e9)
"""The shortest and the longest clip. Far beyond, float32 rounds noise to 0 but not what it is to hide, or makes it infinite."""


@dataclass(frozen=True)
class FixedClip:
    """Each unit's contribution is scaled down to this L2 norm where it is longer."""

    clip_l2: float

    def __post_init__(self) -> None:
        _check_clip(self.clip_l2)


@dataclass(frozen=True)
class AdaptiveClip:
    """The clip follows a quantile of the norms (Andrew et al. 2021, "Differentially private learning with adaptive clipping").

    Args:
        initial_l2: the clip of the first release. No later one is beyond `CLIPS`.
        quantile: which quantile of the norms it follows, above 0 and below 1.
        rate: of the geometric update, eta in their algorithm 1.
        count_share: share of the privacy that the noisy count of unclipped contributions takes, above 0 and below 1: the count's
            noise is z / (2 sqrt(share)), the sum's z / sqrt(1 - share).
    """

    initial_l2: float
    quantile: float = 0.5
    rate: float = 0.2
    count_share: float = 0.01

    def __post_init__(self) -> None:
        _check_clip(self.initial_l2)
        _positive("rate", self.rate)
        for name, value in (("quantile", self.quantile), ("count_share", self.count_share)):
            if not 0 < value < 1:
                raise StudyError(f"privacy: {name}: got {value}, expected above 0 and below 1")


@dataclass(frozen=True)
class Evaluation:
    """Test rows answer too: noisy sums of their scores, each a release of its own.

    Args:
        noise_multiplier: of one answer.
        every: so many rounds, and after the last; 0 for never.
    """

    noise_multiplier: float
    every: int

    def __post_init__(self) -> None:
        _positive("evaluation_noise", self.noise_multiplier)

    def count(self, rounds: int, last: int) -> int:
        """How many there are in the first `rounds` of `last` rounds."""
        if self.every == 0:
            return 0
        return rounds // self.every + (rounds == last and last % self.every != 0)


Clipping = FixedClip | AdaptiveClip
_SAMPLERS: Final = (PoissonSampling, FixedCohort, Everyone, Spaced)
_CLIPPINGS: Final = (FixedClip, AdaptiveClip)


@dataclass(frozen=True)
class PrivacyPlan:
    """What is protected, how, and for how long.

    Args:
        unit: whose presence is hidden.
        sampling: what the code really does to draw units.
        clipping: the bound on one unit's contribution to one release, over everything that the strategy releases jointly.
        noise_multiplier: standard deviation of the noise / clip, of all that one release says together; with a `matrix`, of all that the
            whole run says together / sensitivity.
        delta: below 1 / `units`, and below 1 / the clients of a round.
        units: how many units there are at the least; a public number. Sums are divided by what it makes expected, unless there are `shares`: then
            by the clients in them, and only delta is checked against it.
        rounds: planned.
        steps: noisy releases (DP-SGD steps) of each round; 1 at client level.
        matrix: correlates the noise of the rounds (DP-FTRL), for `Spaced` clients; None for independent noise.
        evaluation: what is released beside training; None for nothing.
        shares: who adds the noise of a client-level plan where the clients themselves do, under secure aggregation; None for the server.
        weighting: how contributions are weighted. Only uniform is possible: a weight that is a person's count is private itself.

    Raises:
        StudyError: a part is out of range, unknown, or does not fit the others; the message says which and why.
    """

    unit: Unit
    sampling: Sampling
    clipping: Clipping
    noise_multiplier: float
    delta: float
    units: int
    rounds: int
    steps: int = 1
    matrix: Banded | BufferedToeplitz | None = None
    evaluation: Evaluation | None = None
    shares: NoiseShares | None = None
    weighting: Weighting = Weighting.UNIFORM

    def __post_init__(self) -> None:
        if not isinstance(self.unit, Unit):
            raise StudyError(f"privacy: unit: got {self.unit!r}, expected one of {', '.join(u.value for u in Unit)}")
        if not isinstance(self.sampling, _SAMPLERS):
            raise StudyError(
                f"privacy: sampler: got {self.sampling!r}, expected one of {', '.join(s.__name__ for s in _SAMPLERS)}"
            )
        if not isinstance(self.clipping, _CLIPPINGS):
            raise StudyError(f"privacy: clipping: got {self.clipping!r}, expected a fixed or an adaptive clip")
        _positive("noise_multiplier", self.noise_multiplier)
        if self.units < 1:
            raise StudyError(
                f"privacy: units: got {self.units}, an empty data set has nothing to protect or to learn from"
            )
        if not 0 < self.delta < 1:
            raise StudyError(f"privacy: delta: got {self.delta}, expected above 0 and below 1")
        most = self.units if self.shares is None else max(self.units, self.shares.clients)
        if self.delta * most >= 1:
            raise StudyError(
                f"privacy: delta: got {self.delta:g} for {most} units, expected less than 1/{most}",
                hint="a delta of 1/n is met by publishing one unit at random: take 1/(10 n) or less",
            )
        if self.rounds < 1 or self.steps < 1 or self.releases > MAX_COUNT:
            raise StudyError(f"privacy: got {self.rounds} rounds of {self.steps} releases, expected at least 1 of each")
        if self.unit is Unit.CLIENT and self.steps != 1:
            raise StudyError(f"privacy: steps: got {self.steps}, a client-level plan releases once a round")
        if isinstance(self.sampling, FixedCohort):
            if self.unit is not Unit.CLIENT:
                raise StudyError(
                    "privacy: sampler: a fixed cohort is for client-level plans",
                    hint="batches of records are drawn by Poisson sampling",
                )
            if self.sampling.population < self.units:
                raise StudyError(
                    f"privacy: cohort: drawn out of {self.sampling.population}, but the plan names {self.units} units"
                )
        if (self.matrix is not None) != isinstance(self.sampling, Spaced):
            raise StudyError(
                "privacy: correlated noise goes with spaced participation, and neither goes without the other"
            )
        if self.matrix is not None:
            if self.unit is not Unit.CLIENT:
                raise StudyError("privacy: correlated noise is for client-level plans")
            if not isinstance(self.clipping, FixedClip):
                raise StudyError(
                    "privacy: clipping: got an adaptive clip, with correlated noise it must be fixed",
                    hint="noise that is to cancel an earlier round's must be on the same scale",
                )
            _ = self.ftrl  # is refused where its sensitivity is not known
        if self.shares is not None and not (
            self.unit is Unit.CLIENT and isinstance(self.sampling, Everyone) and isinstance(self.clipping, FixedClip)
        ):
            raise StudyError(
                "privacy: noise that clients add together is for client-level plans with a fixed clip and no sampling"
            )
        if self.evaluation is not None and self.unit is Unit.CLIENT:
            raise StudyError("privacy: evaluation_noise: is for records and groups")
        if self.weighting is not Weighting.UNIFORM:
            raise StudyError(
                f"privacy: weights: got {self.weighting.value!r}, expected uniform",
                hint="a weight that counts examples changes the sensitivity, and is private itself",
            )

    @property
    def central(self) -> bool:
        """Whether the server adds the noise: a site then pays for the whole run, since its cohorts are accounted drawn or not."""
        return self.unit is Unit.CLIENT and self.shares is None

    @property
    def releases(self) -> int:
        """Noisy releases of the whole plan."""
        return self.rounds * self.steps

    @property
    def ftrl(self) -> FtrlPlan:
        """The numbers of correlated noise; for a plan with a `matrix`."""
        assert self.matrix is not None
        assert isinstance(self.sampling, Spaced)
        assert isinstance(self.clipping, FixedClip)
        return FtrlPlan(
            self.matrix,
            self.rounds,
            self.sampling.separation,
            self.clipping.clip_l2,
            self.noise_multiplier,
            self.delta,
            self.units,
            self.sampling.most,
        )

    @property
    def relation(self) -> Relation:
        """Which data sets are neighbours; it follows from the sampler."""
        return Relation.REPLACE_ONE if isinstance(self.sampling, FixedCohort) else Relation.ADD_OR_REMOVE_ONE

    @property
    def sum_noise_multiplier(self) -> float:
        """Standard deviation of the noise on the sum / clip; with a matrix, of Z.

        More than the plan's multiplier where a count is released beside the sum, and where one client moves several rounds.
        """
        if self.matrix is not None:
            return self.noise_multiplier * self.ftrl.sensitivity
        if isinstance(self.clipping, AdaptiveClip):
            return self.noise_multiplier / math.sqrt(1 - self.clipping.count_share)
        return self.noise_multiplier

    @property
    def count_noise(self) -> float:
        """Standard deviation of the noise on the count of unclipped contributions, 0 where none is released."""
        if isinstance(self.clipping, AdaptiveClip):
            return self.noise_multiplier / (2 * math.sqrt(self.clipping.count_share))
        return 0.0

    def one_release(self) -> Leaf:
        """The event of one release. A replaced unit moves the sum by twice the clip, so the multiplier halves.

        Under correlated noise all rounds are one release.
        """
        if self.shares is not None:
            return self.shares.event(self.noise_multiplier)
        match self.sampling:
            case PoissonSampling(rate):
                return PoissonSampled(rate, Gaussian(self.noise_multiplier))
            case FixedCohort(size, population):
                return SampledWithoutReplacement(size, population, Gaussian(self.noise_multiplier / 2))
            case Everyone() | Spaced():
                return Gaussian(self.noise_multiplier)

    def evaluations(self, rounds: int | None = None) -> int:
        """How often each site is evaluated in the first `rounds` rounds, of all if not told."""
        count = self.rounds if rounds is None else rounds
        return 0 if self.evaluation is None else self.evaluation.count(count, self.rounds)

    def whole_cost(self, rounds: int | None = None, attempts: int | None = None) -> Cost:
        """What everything costs that is released in the first `rounds` rounds: training, and the evaluations beside it.

        Args:
            rounds: all of the plan if not told.
            attempts: at these rounds; one at each if not told.
        """
        training = self.cost(rounds if attempts is None else attempts)
        times = self.evaluations(rounds)
        if self.evaluation is None or not times:
            return training
        beside = Repeated(Gaussian(self.evaluation.noise_multiplier), times)
        return Cost(Composed((training.event, beside)), training.relation)

    def cost(self, rounds: int | None = None) -> Cost:
        """What training costs in `rounds` rounds; all of the plan if not told. One attempt at a round, void or not, costs a round.

        Correlated noise costs all of it with the first round: what a round says depends on the noise of all.
        """
        count = self.rounds if rounds is None else rounds
        if self.matrix is not None:
            return Cost(Repeated(self.one_release(), min(count, 1)), self.relation)
        return Cost(Repeated(self.one_release(), count * self.steps), self.relation)

    def check_strategy(self, strategy: type[Strategy] | Strategy) -> None:
        """Refuse a strategy that cannot carry this plan.

        Raises:
            UnsupportedError: the noise of a client-level plan belongs on a sum, and the strategy makes none; or the strategy's own
                memory is made of raw gradients, which a record-level plan does not cover.
        """
        if self.unit is Unit.CLIENT and not strategy.linear:
            raise UnsupportedError(
                f"privacy: {strategy.name} is not linear: there is no sum whose sensitivity the clip bounds",
                hint="take a linear strategy (fedlearn strategies), or protect records at their site",
            )
        if self.unit is not Unit.CLIENT and strategy.raw_gradient_state:
            raise UnsupportedError(
                f"privacy: {strategy.name} keeps memory made of raw gradients, which the noise does not cover",
                hint="take fedavg, fedprox or a server optimiser under a record-level plan",
            )


def _check_clip(value: float) -> None:
    if not CLIPS[0] <= value <= CLIPS[1]:
        raise StudyError(
            f"privacy: clip_l2: got {value:g}, expected {CLIPS[0]:g} to {CLIPS[1]:g}",
            hint="scale the loss or the data, not the clip",
        )


def _positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise StudyError(f"privacy: {name}: got {value}, expected a finite number above 0")
