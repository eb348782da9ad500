"""Canaries in a site's DP-SGD: made-up records whose clipped gradient is one number, which the real steps draw, sum and cover with noise.

Steinke, Nasr and Jagielski 2023, section 6 ("Dirac canaries"). Each canary has a number of the gradient to itself. Where a model has fewer
numbers than there are canaries, its gradient is widened by numbers that it does not use; the same call adds the noise to them.

The auditor is as strong as the guarantee allows: it sees every noisy gradient, and knows everything but the canaries' own coins. So it takes
the real records' exact share off what was released.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from fedlearn import seeds
from fedlearn.privacy.clipping import denominator
from fedlearn.privacy.dpsgd import DpSgd, GradientEngine, Losses
from fedlearn.privacy.plan import AdaptiveClip, FixedCohort, PrivacyPlan
from fedlearn.privacy.site import SitePlan
from fedlearn.privacy.steps import IntArray, NoisySteps
from fedlearn.privacy.whitening import Whitening

if TYPE_CHECKING:
    from torch import nn

    from fedlearn.privacy.audit import Coins, Scores
    from fedlearn.privacy.mechanisms import Chance

WIDENED: Final = "audit/canaries"
"""The name of the numbers that a gradient or an update is widened by."""


SURE: Final = 6.0
"""Standard deviations."""


class Canaries:
    """Who they are: a number of the gradient for each, and a fair coin that says whether it is in the data.

    Args:
        count: how many.
        sizes: numbers of each array of a gradient or an update, by name, in its order.
        seed: of places and coins.
    """

    def __init__(self, count: int, sizes: Mapping[str, int], seed: int) -> None:
        generator = seeds.numpy_generator(seed, "audit", "canaries")
        self.inside: Coins = generator.random(count) < 0.5
        self.widened = max(1, count - sum(sizes.values()))  # by one at the least: there is one case, not two
        self.sizes = {**sizes, WIDENED: self.widened}
        ends = np.cumsum(list(self.sizes.values()))
        places = generator.choice(int(ends[-1]), size=count, replace=False)
        at = np.searchsorted(ends, places, side="right")
        starts = ends - list(self.sizes.values())
        self._places: list[tuple[IntArray, IntArray]] = []
        for number in range(len(ends)):
            who = np.flatnonzero(at == number)
            self._places.append((who, places[who] - starts[number]))

    def __len__(self) -> int:
        return len(self.inside)

    def signs(self, plan: PrivacyPlan) -> Scores:
        """What each canary gives when it is drawn, in clips: one or nothing; under replace-one, plus or minus one."""
        return np.where(self.inside, 1.0, -1.0 if isinstance(plan.sampling, FixedCohort) else 0.0)

    def within_clip(self, plan: PrivacyPlan) -> Coins:
        """Which say that they were within the clip: so many that an adaptive clip stays where real records take it."""
        share = plan.clipping.quantile if isinstance(plan.clipping, AdaptiveClip) else 0.0
        return np.arange(len(self)) < share * len(self)

    def read(self, arrays: Sequence[npt.NDArray[Any]]) -> Scores:
        """The canaries' numbers in arrays of `sizes`, float64, shape (count,)."""
        found = np.zeros(len(self))
        for (who, places), array in zip(self._places, arrays, strict=True):
            found[who] = array.reshape(-1)[places]
        return found

    def add(self, arrays: Sequence[npt.NDArray[Any]], values: Scores) -> None:
        """Add a value, shape (count,), to each canary's number; in place, so the arrays must be contiguous."""
        for (who, places), array in zip(self._places, arrays, strict=True):
            array.reshape(-1)[places] += values[who].astype(array.dtype)


@dataclass(frozen=True)
class MeasuredNoise:
    """How much noise one array of the releases really had.

    Args:
        name: of the array.
        factor: measured / planned standard deviation: 1 in an honest build, but for chance.
        chance: standard deviation of `factor` in an honest build.
    """

    name: str
    factor: float
    chance: float

    @property
    def too_little(self) -> bool:
        """Whether there is less than planned, and not by chance: once in a thousand million honest arrays."""
        return self.factor < 1 - SURE * self.chance


@dataclass
class Evidence:
    """What an auditor heard: canaries' scores, and how much noise there really was.

    Args:
        canaries: whose.
        plan: what the releases promise.
    """

    canaries: Canaries
    plan: PrivacyPlan
    releases: int = 0
    scores: Scores = field(init=False)
    _squares: dict[str, float] = field(init=False, repr=False)
    _heard: Whitening = field(init=False, repr=False)
    _known: Whitening = field(init=False, repr=False)
    _noise: dict[str, Whitening] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.scores = np.zeros(len(self.canaries))
        self._squares = dict.fromkeys(self.canaries.sizes, 0.0)
        matrix, rounds = self.plan.matrix, self.plan.rounds
        column = np.ones(1) if matrix is None else matrix.coefficients(rounds)
        self._heard, self._known = Whitening(column), Whitening(column)
        self._noise = {name: Whitening(column) for name in self.canaries.sizes}

    def hear(
        self,
        released: Sequence[npt.NDArray[Any]],
        exact: Sequence[npt.NDArray[Any]],
        real: Scores,
        clip_l2: float,
        asked: Coins | None = None,
    ) -> None:
        """One release.

        A score is the sum of a canary's numbers. Where noise is correlated, its correlation is undone first, and since the guarantee does not
        rest on who is asked, the score is then a likelihood ratio times the noise's variance, for what each canary would have given.

        Args:
            released: noisy sums over the plan's denominator, one array a name.
            exact: the sums before the noise.
            real: of `exact`, what is not the canaries', at their numbers.
            clip_l2: of this release.
            asked: for correlated noise, which canaries were asked in this round, in or out; shape (count,).
        """
        size, std = denominator(self.plan), self.plan.sum_noise_multiplier * clip_l2
        heard = self._heard.next((self.canaries.read(released) * size - real) / clip_l2)
        if asked is None:
            self.scores += heard
        else:
            given = self._known.next(asked.astype(np.float64))
            self.scores += given * (heard - given / 2)
        for name, noisy, before in zip(self._squares, released, exact, strict=True):
            noise = self._noise[name].next((noisy.astype(np.float64) * size - before) / std)
            self._squares[name] += float(np.vdot(noise, noise))
        self.releases += 1

    def noise(self) -> tuple[MeasuredNoise, ...]:
        """Of every array, in their order; nothing before the first release."""
        found = []
        for name, size in self.canaries.sizes.items():
            numbers = size * self.releases
            if numbers:
                found.append(MeasuredNoise(name, (self._squares[name] / numbers) ** 0.5, (2 * numbers) ** -0.5))
        return tuple(found)

    def noise_factor(self) -> float:
        """Measured / planned noise of all arrays together; NaN before the first release."""
        total = sum(self.canaries.sizes.values()) * self.releases
        return (sum(self._squares.values()) / total) ** 0.5 if total else float("nan")


class CanarySteps(NoisySteps):
    """A site's steps with canaries among its rows: gradients are asked for of real rows only, noise covers both.

    Args:
        rows: real ones.
        plan: a record- or group-level plan.
        chance: of batches and noise.
        evidence: takes what is released.
        groups: of the real rows; a canary is a group by itself.
    """

    def __init__(
        self,
        rows: int,
        plan: PrivacyPlan,
        chance: Chance,
        evidence: Evidence,
        *,
        groups: npt.NDArray[Any] | None = None,
    ) -> None:
        self._evidence, self._real_rows = evidence, rows
        self._members = np.flatnonzero(evidence.canaries.inside)
        self._hit = self._members[:0]
        if groups is not None:
            own = [f"{WIDENED}/{number}" for number in self._members]
            groups = np.array([*(str(one) for one in groups), *own])
        super().__init__(rows + len(self._members), plan, chance, groups=groups)

    def draw(self) -> IntArray:
        """The real rows of a batch."""
        rows = super().draw()
        self._hit = self._members[rows[rows >= self._real_rows] - self._real_rows]
        return rows[rows < self._real_rows]

    def release(self, sums: Sequence[npt.NDArray[Any]], *, unclipped: int, not_finite: int) -> None:
        """As ever, with the drawn canaries' clipped gradients in the sum."""
        canaries, clip_l2 = self._evidence.canaries, self.clip_l2
        whole = [*sums, np.zeros(canaries.widened, dtype=sums[0].dtype)]
        real = canaries.read(whole)
        given = np.zeros(len(canaries))
        given[self._hit] = clip_l2
        canaries.add(whole, given)
        exact = [array.astype(np.float64) for array in whole]
        unclipped += int(np.count_nonzero(canaries.within_clip(self.plan)[self._hit]))
        super().release(whole, unclipped=unclipped, not_finite=not_finite)
        self._evidence.hear(whole, exact, real, clip_l2)


class CanaryDpSgd(DpSgd):
    """DP-SGD as it always is, but for its steps; see `DpSgd` and `CanarySteps`."""

    def __init__(
        self,
        model: nn.Module,
        losses: Losses,
        rows: int,
        plan: PrivacyPlan,
        chance: Chance,
        evidence: Evidence,
        *,
        groups: npt.NDArray[Any] | None = None,
        engine: GradientEngine | None = None,
    ) -> None:
        super().__init__(model, losses, rows, plan, chance, groups=groups, engine=engine)
        self._steps = CanarySteps(rows, plan, chance, evidence, groups=groups)


@dataclass(frozen=True)
class CanarySitePlan(SitePlan):
    """A client's plan whose gradients have canaries among their rows; for the rest as `SitePlan`."""

    evidence: Evidence | None = None

    def gradients(self, model: nn.Module, losses: Losses, rows: int, engine: GradientEngine | None = None) -> DpSgd:
        assert self.evidence is not None
        return CanaryDpSgd(
            model, losses, rows, self.plan, self.chance, self.evidence, groups=self.groups, engine=engine
        )
