"""What a plan costs over its rounds, and what it would cost if it were another."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from fedlearn.errors import StudyError
from fedlearn.privacy.accounting import LARGEST_EPSILON, PLD_GRID, has_pld, pld_epsilon, rdp_epsilon
from fedlearn.privacy.events import Cost, Gaussian, Repeated
from fedlearn.privacy.plan import FixedCohort, PoissonSampling, PrivacyPlan, Spaced

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_FACTORS: Final = (0.5, 2.0)


@dataclass(frozen=True)
class Alternative:
    """A plan that differs in one thing, and its epsilon."""

    what: str
    rounds: int
    noise_multiplier: float
    sampling: str
    epsilon: float


def rounds_shown(rounds: int, most: int = 10) -> list[int]:
    """Up to `most` rounds from the first to the last, evenly spread."""
    return sorted({max(1, round(rounds * i / most)) for i in range(1, most + 1)} | {1, rounds})


def curve(plan: PrivacyPlan, rounds: Sequence[int]) -> list[tuple[int, float, float]]:
    """(round, reported epsilon, Rényi bound) after each of the rounds, evaluations included. On a coarse grid: at most a few 1e-4 above the exact one."""
    return [(number, _epsilon(plan, number), rdp_epsilon(plan.whole_cost(number), plan.delta)) for number in rounds]


def alternatives(plan: PrivacyPlan) -> list[Alternative]:
    """Half and twice the rounds, the noise, and the sampling: what each would cost."""
    found = [Alternative("the plan", *_facts(plan), _epsilon(plan, plan.rounds))]
    for what in ("rounds", "noise", "sampling"):
        for factor in _FACTORS:
            try:
                changed = _changed(plan, what, factor)
            except StudyError:  # there is no such plan: a rate above 1, more than everybody
                continue
            if changed != plan:
                found.append(Alternative(f"{what} x {factor:g}", *_facts(changed), _epsilon(changed, changed.rounds)))
    return found


def shares(plan: PrivacyPlan) -> dict[str, float]:
    """What training and evaluations would cost without the other; they do not add up to the epsilon of both."""
    if plan.evaluation is None:
        return {"training": _epsilon(plan, plan.rounds)}
    times = plan.evaluations()
    alone = Cost(Repeated(Gaussian(plan.evaluation.noise_multiplier), times), plan.relation)
    return {
        "training": _epsilon(replace(plan, evaluation=None), plan.rounds),
        f"{times} evaluations": _of(alone, plan.delta),
    }


def draw(plan: PrivacyPlan, path: Path) -> None:
    """Epsilon over the rounds, as a picture.

    Raises:
        OSError: it cannot be written.
        ValueError: the file's ending names no kind of picture.
    """
    from matplotlib.figure import Figure

    points = curve(plan, rounds_shown(plan.rounds, 24))
    figure = Figure(figsize=(6.0, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([p[0] for p in points], [p[1] for p in points], label="reported")
    axes.plot([p[0] for p in points], [p[2] for p in points], linestyle="--", label="Rényi bound")
    axes.set(
        xlabel="round", ylabel=f"epsilon at delta = {plan.delta:g}", title=f"unit: {plan.unit.value}", ylim=(0, None)
    )
    axes.legend()
    figure.savefig(path, dpi=150)


def _epsilon(plan: PrivacyPlan, rounds: int) -> float:
    return _of(plan.whole_cost(rounds), plan.delta)


def _of(cost: Cost, delta: float) -> float:
    bound = rdp_epsilon(cost, delta)
    return pld_epsilon(cost, delta, grid=10 * PLD_GRID) if has_pld(cost) and bound <= LARGEST_EPSILON else bound


def _changed(plan: PrivacyPlan, what: str, factor: float) -> PrivacyPlan:
    if what == "rounds":
        changed = replace(plan, rounds=max(1, round(plan.rounds * factor)))
        if plan.matrix is None:
            return changed
        # The same noise on a round's sum, which more participations of one client make less of.
        return replace(
            changed, noise_multiplier=plan.noise_multiplier * plan.ftrl.sensitivity / changed.ftrl.sensitivity
        )
    if what == "noise":
        return replace(plan, noise_multiplier=plan.noise_multiplier * factor)
    return replace(plan, sampling=_sampled(plan, factor))


def _sampled(plan: PrivacyPlan, factor: float) -> PoissonSampling | FixedCohort:
    match plan.sampling:
        case PoissonSampling(rate):
            return PoissonSampling(rate * factor)
        case FixedCohort(size, population):
            return FixedCohort(max(1, round(size * factor)), population)
    raise StudyError("privacy: there is no sampling to change")


def _facts(plan: PrivacyPlan) -> tuple[int, float, str]:
    return plan.rounds, plan.noise_multiplier, in_words(plan)


def in_words(plan: PrivacyPlan) -> str:
    """How units are drawn, for a table."""
    match plan.sampling:
        case PoissonSampling(rate):
            return f"Poisson {rate:g}"
        case FixedCohort(size, population):
            return f"{size} of {population}"
        case Spaced(size, separation, _):
            return f"{size}, each once in {separation} rounds"
    return "everyone"
