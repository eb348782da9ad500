"""What a run's privacy is, in one value of plain JSON types, and the same in words.

Whatever shows an epsilon of a run (an event, a terminal, a manifest, a notebook) shows this value, so that none is ever without its unit, its
delta, whom it holds against, and the mark where the run is seeded. Where there is no number to promise, text stands in its place, so that nothing
downstream can take a rehearsal's epsilon for a promise.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from fedlearn import events
from fedlearn.privacy.claims import NOT_PRIVATE, claims, shown
from fedlearn.privacy.events import Cost, Gaussian, Repeated
from fedlearn.privacy.plan import AdaptiveClip, FixedCohort, PoissonSampling, PrivacyPlan, Spaced, Unit
from fedlearn.privacy.study import is_seeded, plan_of
from fedlearn.release.round import RoundState

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from fedlearn.privacy.accounting import Accounted
    from fedlearn.privacy.plan import Evaluation
    from fedlearn.release.coordinator import RoundMachine
    from fedlearn.study import Study

PLANNED, RELEASED = "planned", "released"
_UNITS: Final = {
    Unit.RECORD: "one row at one site",
    Unit.GROUP: "all rows of one person or account at one site",
    Unit.CLIENT: "a whole client",
}
_COUNTED: Final = {
    PLANNED: "all planned rounds, none of them tried twice",
    RELEASED: "what was released: every attempt at a round counts, void ones too, as for a site that took part in each",
}
_WHOLE: Final = "all planned rounds, from the first one on: the noise of one round covers the others'"
_CENTRAL: Final = "what was released: the rounds that were committed"


def planned(study: Study, *, rehearsal: bool) -> dict[str, Any] | None:
    """What a study promises if it runs as planned; None where it asks for no privacy.

    Args:
        study: the study.
        rehearsal: True in a simulation; see `fedlearn.privacy.study.is_seeded`.
    """
    plan = plan_of(study)
    if plan is None:
        return None
    return statement(plan, seeded=is_seeded(study, rehearsal=rehearsal), masked=study.secure_aggregation.enabled)


def released(study: Study, *, committed: int, attempts: int, rehearsal: bool) -> dict[str, Any] | None:
    """What a run has really cost; None where its study asks for no privacy.

    Args:
        study: the study.
        committed: rounds that were committed.
        attempts: at rounds, void ones and one that is under way included.
        rehearsal: True in a simulation.
    """
    plan = plan_of(study)
    if plan is None:
        return None
    # Where the server adds noise, only a committed round's noisy sum is released; what is noisy before it leaves does so with every attempt.
    rounds = committed if plan.central else attempts
    seeded, masked = is_seeded(study, rehearsal=rehearsal), study.secure_aggregation.enabled
    return statement(plan, seeded=seeded, masked=masked, rounds=rounds, committed=committed)


def statement(
    plan: PrivacyPlan, *, seeded: bool, masked: bool = False, rounds: int | None = None, committed: int | None = None
) -> dict[str, Any]:
    """A plan's promise as plain JSON types: no number in it is infinite or missing.

    Args:
        plan: the plan.
        seeded: whether the run derives its noise from the study's seed.
        masked: whether updates travel under secure aggregation.
        rounds: that were released; None states the plan.
        committed: of these, which evaluations follow; as many as `rounds` if not told.

    Returns:
        `epsilon` (a number, or the text "not private"), `delta`, `unit`, `neighbours`, `against` (each adversary with its epsilon, or "infinite", and a caveat),
        `sampling`, `noise_multiplier`, `clip_l2`, `rounds`, `committed` (of a run that ended), `counted`, `accountant`, `other_accountants`; and for a seeded run `mark` and
        `rehearsed_epsilon`, what the same run would cost with secret noise.
    """
    state = PLANNED if rounds is None else RELEASED
    counted = _CENTRAL if rounds is not None and plan.central else _COUNTED[state]
    if plan.matrix is not None:
        counted = _WHOLE
    number = plan.rounds if rounds is None else rounds
    evaluated = plan.evaluations(number if committed is None else committed)
    accounted = whole_account(plan, number if committed is None else committed, number)
    epsilon, accountant = accounted.reported.epsilon, accounted.reported.accountant
    without = unamplified(plan, number, epsilon)
    against = [
        {
            "adversary": claim.adversary.value,
            "epsilon": _number(claim.epsilon),
            **({"rehearsed_epsilon": _number(unseeded.epsilon)} if seeded else {}),
            "caveat": unseeded.caveat,
        }
        for claim, unseeded in zip(
            claims(plan, epsilon, accountant, seeded=seeded, unsampled=without, masked=masked),
            claims(plan, epsilon, accountant, seeded=False, unsampled=without, masked=masked),
            strict=True,
        )
    ]
    return {
        "state": state,
        "private": not seeded,
        **({"mark": NOT_PRIVATE, "rehearsed_epsilon": epsilon} if seeded else {}),
        "epsilon": _number(None) if seeded else epsilon,
        "delta": plan.delta,
        "unit": plan.unit.value,
        "unit_means": _UNITS[plan.unit],
        "neighbours": plan.relation.value,
        "against": against,
        "rounds": number,
        **({} if committed is None else {"committed": committed}),
        "counted": counted,
        "releases": number * plan.steps,
        **({} if plan.evaluation is None else _evaluation(plan.evaluation, evaluated)),
        "sampling": sampling_in_words(plan),
        "noise_multiplier": plan.noise_multiplier,
        **({} if plan.shares is None else {"noise_by_clients": plan.shares.in_words}),
        **_clip(plan),
        "units_at_least": plan.units,
        "accountant": accountant,
        "other_accountants": [{"accountant": b.accountant, "epsilon": b.epsilon} for b in accounted.shown],
    }


@lru_cache(maxsize=64)
def whole_account(plan: PrivacyPlan, committed: int, attempts: int) -> Accounted:
    """What a plan costs, evaluations included, under every accountant that knows its events.

    Args:
        plan: the plan.
        committed: rounds, which evaluations follow.
        attempts: at these rounds.

    Raises:
        AccountingError: two accountants contradict each other: nothing may be stated, hence no run begins.
    """
    from fedlearn.privacy.accounting import account

    return account(plan.whole_cost(committed, attempts), plan.delta, prv=True)


class Statements:
    """Says what a run promises before it begins, and what it has cost before it ends; nothing where its study asks for no privacy.

    Args:
        study: of the run.
        run: its name.
        emit: takes the events.
        rehearsal: True in a simulation.
    """

    def __init__(self, study: Study, run: str, emit: events.Emit, *, rehearsal: bool) -> None:
        self._study, self._run, self._emit, self._rehearsal = study, run, emit, rehearsal

    def begin(self) -> None:
        """Say the promise."""
        self._say(planned(self._study, rehearsal=self._rehearsal))

    def end(self, history: Sequence[Mapping[str, Any]], machine: RoundMachine[Any, Any]) -> dict[str, Any] | None:
        """Say the cost, and give it back; see `released`.

        Args:
            history: one row for each committed round.
            machine: where the run stands.
        """
        committed, attempts = len(history), attempts_at(history, machine)
        found = released(self._study, committed=committed, attempts=attempts, rehearsal=self._rehearsal)
        self._say(found)
        return found

    def _say(self, found: Mapping[str, Any] | None) -> None:
        if found is not None:
            self._emit(events.PrivacyStated(self._run, found))


def attempts_at(history: Sequence[Mapping[str, Any]], machine: RoundMachine[Any, Any]) -> int:
    """Attempts at rounds that took place: committed, void, or under way."""
    attempts = sum(int(row["attempt"]) for row in history)
    if machine.state is not RoundState.IDLE and machine.key.at.round > len(history):
        attempts += machine.key.at.attempt
    return attempts


def headline(value: Mapping[str, Any]) -> str:
    """A statement's number in one line, with all that it must not be without.

    Args:
        value: of `statement`, perhaps read back from JSON.
    """
    seeded = not value["private"]
    number = value["rehearsed_epsilon"] if seeded else value["epsilon"]
    rounds = value["rounds"]
    committed = value.get("committed", rounds)
    if committed == rounds:
        over = f"{rounds} round{'' if rounds == 1 else 's'} {'planned' if value['state'] == PLANNED else 'released'}"
    else:
        over = f"{rounds} attempt{'' if rounds == 1 else 's'} at rounds released, {committed} of them committed"
    words = (
        f"epsilon {shown(number)} at delta {value['delta']:g}, unit {value['unit']} "
        f"(neighbours: {value['neighbours']}), {over}"
    )
    return f"NOT PRIVATE, a seeded rehearsal of {words}" if seeded else words


def kind(value: Mapping[str, Any]) -> str:
    """What a statement's epsilon is about, without the number: for a table that has many."""
    mark = "" if value["private"] else "; NOT PRIVATE: seeded rehearsals of it"
    return f"epsilon at delta {value['delta']:g}, unit {value['unit']} (neighbours: {value['neighbours']}){mark}"


def lines(value: Mapping[str, Any]) -> Iterator[str]:
    """A whole statement for people: its headline, and what stands behind it.

    Args:
        value: of `statement`, perhaps read back from JSON.
    """
    yield f"privacy: {headline(value)}"
    clip = f"clip {value['clip_l2']:g}" + (f" at first ({value['clipping']})" if value["clipping"] != "fixed" else "")
    yield f"  noise multiplier {value['noise_multiplier']:.4f}, {clip}; {value['sampling']}"
    if value.get("noise_by_clients"):
        yield f"  {value['noise_by_clients']}"
    if value.get("evaluations"):
        yield (
            f"  and {value['evaluations']} evaluations of test rows by noisy sums, noise multiplier "
            f"{value['evaluation_noise']:.4f}: in this epsilon too"
        )
    others = "".join(f"; {shown(o['epsilon'])} by {o['accountant']}" for o in value["other_accountants"])
    yield f"  by {value['accountant']}{others}; counted: {value['counted']}"
    groups: dict[tuple[str, str], list[str]] = {}
    for one in value["against"]:
        found = one.get("rehearsed_epsilon", one["epsilon"])
        number = found if isinstance(found, str) else shown(found)
        groups.setdefault((number, one["caveat"]), []).append(one["adversary"])
    for (number, caveat), adversaries in groups.items():
        yield f"  against {', '.join(adversaries)}: {number}; {caveat}"
    if not value["private"]:
        yield f"  {value['mark']}"


def sampling_in_words(plan: PrivacyPlan) -> str:
    """What the code does to draw units, which is what was accounted."""
    match plan.sampling:
        case PoissonSampling(rate) if plan.unit is Unit.CLIENT:
            return f"each client by a coin of its own with probability {rate:g} each round"
        case PoissonSampling(rate):
            steps = "1 step" if plan.steps == 1 else f"{plan.steps} steps"
            return f"{steps} a round, each {plan.unit.value} by a coin of its own with probability {rate:g} each step"
        case FixedCohort(size, population):
            return f"{size} of {population} clients each round, without replacement"
        case Spaced(size, separation, _):
            times = plan.ftrl.participations
            return (
                f"{size} clients each round of those who are here, none twice in {separation} rounds or more than {times} times: nothing is "
                "gained by sampling; the noise is correlated over the rounds (DP-FTRL), its multiplier relative to what one client moves in all"
            )
    if plan.shares is not None:
        return f"up to {plan.shares.clients} clients each round, whom the server picks: nothing is gained by sampling"
    return "every client each round: nothing is gained by sampling"


def unamplified(plan: PrivacyPlan, rounds: int, epsilon: float) -> float:
    """What a plan's rounds cost against one who knows who takes part in each: a client that is drawn every time.

    Args:
        plan: the plan.
        rounds: how many.
        epsilon: of the plan as it is, which is the answer where no cohort is drawn.
    """
    return _unamplified(plan, rounds) if isinstance(plan.sampling, FixedCohort) else epsilon


@lru_cache(maxsize=64)
def _unamplified(plan: PrivacyPlan, rounds: int) -> float:
    from fedlearn.privacy.accounting import account

    each = Gaussian(plan.noise_multiplier / 2)  # one client replaced moves the sum by twice the clip
    return account(Cost(Repeated(each, rounds), plan.relation), plan.delta).reported.epsilon


def _evaluation(evaluation: Evaluation, times: int) -> dict[str, Any]:
    return {"evaluations": times, "evaluation_noise": evaluation.noise_multiplier}


def _clip(plan: PrivacyPlan) -> dict[str, Any]:
    clipping = plan.clipping
    if isinstance(clipping, AdaptiveClip):
        follows = f"adaptive, follows the {clipping.quantile:g} quantile of norms"
        return {"clip_l2": clipping.initial_l2, "clipping": follows}
    return {"clip_l2": clipping.clip_l2, "clipping": "fixed"}


def _number(epsilon: float | None) -> float | str:
    return "not private" if epsilon is None else "infinite" if math.isinf(epsilon) else epsilon
