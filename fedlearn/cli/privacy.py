"""`fedlearn privacy plan`: what privacy would cost."""

from __future__ import annotations

from dataclasses import asdict, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import click
import typer

from fedlearn.cli.options import AppFolder, Debug, Json, Overrides, Rounds
from fedlearn.cli.output import print_json, print_table
from fedlearn.errors import StateError, StudyError, UnsupportedError

if TYPE_CHECKING:
    from fedlearn.privacy.accounting import Accounted
    from fedlearn.privacy.plan import PrivacyPlan, Sampling
    from fedlearn.study import Study

NOTICE: Final = "A plan on paper: a study of this version cannot ask for privacy, and a run of it is not private."


class UnitName(StrEnum):
    """Whose presence is hidden."""

    RECORD = "record"
    GROUP = "group"
    CLIENT = "client"


def plan(
    study: Annotated[str, typer.Argument(metavar="STUDY", help="A study file, or one of fedlearn's own.")],
    unit: Annotated[UnitName, typer.Option("--unit", help="Whose presence is hidden.")] = UnitName.RECORD,
    units: Annotated[
        int | None, typer.Option("--units", metavar="N", min=1, help="How many units there are at the least; public.")
    ] = None,
    delta: Annotated[float, typer.Option("--delta", metavar="D", help="Below 1 / N.")] = 1e-5,
    epsilon: Annotated[
        float | None, typer.Option("--epsilon", metavar="E", help="Find the least noise for it.")
    ] = None,
    noise: Annotated[float | None, typer.Option("--noise", metavar="Z", help="Noise multiplier, instead.")] = None,
    rate: Annotated[
        float | None,
        typer.Option("--rate", metavar="Q", help="Poisson sampling: every unit's probability at each step."),
    ] = None,
    steps: Annotated[int, typer.Option("--steps", metavar="S", min=1, help="Noisy steps of each round.")] = 1,
    clip: Annotated[
        float, typer.Option("--clip", metavar="C", help="L2 norm that a contribution is clipped to.")
    ] = 1.0,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw epsilon over the rounds; PNG.")
    ] = None,
    prv: Annotated[bool, typer.Option("--prv", help="Ask Opacus' accountant too; loading it takes seconds.")] = False,
    rounds: Rounds = None,
    overrides: Overrides = None,
    app: AppFolder = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Work out what a study's privacy would cost: epsilon after each round, and what if.

    The study says how many rounds there are, and at client level who takes part. Nothing is trained, and nothing is enforced.
    """
    del debug
    from fedlearn.app import load_app
    from fedlearn.privacy.accounting import account, calibrated
    from fedlearn.privacy.plan import FixedClip, PrivacyPlan, Unit, claims
    from fedlearn.privacy.what_if import alternatives, curve, draw, rounds_shown
    from fedlearn.study import load_study

    if (epsilon is None) == (noise is None):
        raise click.UsageError("one of --epsilon and --noise is needed", click.get_current_context())
    loaded = load_app(app)
    asked = load_study(loaded.study(study), tuple(overrides or ()))
    asked = asked if rounds is None else asked.with_overrides([f"rounds={rounds}"])
    level = Unit(unit.value)
    count = units if units is not None else asked.data.clients if level is Unit.CLIENT else None
    if count is None:
        raise StudyError(f"--units: missing; the study does not say how many {level.value}s there are")
    sampling = _sampling(asked, level, rate, count)
    made = PrivacyPlan(level, sampling, FixedClip(clip), noise or 1.0, delta, count, asked.rounds, steps)
    try:
        made.check_strategy(loaded.strategy(asked.strategy.name, asked.strategy.options))
    except UnsupportedError as error:
        raise StudyError(error.message, hint=error.hint) from None
    made = made if epsilon is None else calibrated(made, epsilon)
    answer = account(made.cost(), made.delta, prv=prv)
    if plot is not None:
        try:
            draw(made, plot)
        except (OSError, ValueError) as error:
            raise StateError(
                f"{plot}: cannot be written: {error}", hint="name a .png file in a folder that exists"
            ) from None
    promised = claims(made, answer.reported.epsilon, answer.reported.accountant, seeded=False)
    points, others = curve(made, rounds_shown(made.rounds)), alternatives(made)
    if json:
        print_json(
            {
                "enforced": False,
                "notice": NOTICE,
                "plan": _plain(made),
                "accountants": [_bound(b) for b in (answer.reported, *answer.shown)],
                "claims": [
                    {
                        "adversary": c.adversary.value,
                        "epsilon": _number(c.epsilon),
                        "delta": c.delta,
                        "unit": c.unit.value,
                        "neighbours": c.relation.value,
                        "accountant": c.accountant,
                        "caveat": c.caveat,
                    }
                    for c in promised
                ],
                "curve": [{"round": n, "epsilon": e, "renyi": r} for n, e, r in points],
                "what_if": [asdict(one) for one in others],
                "plot": plot,
            }
        )
        return
    _print_plan(made, answer)
    print_table([(c.adversary.value, _number(c.epsilon), c.caveat) for c in promised], ("against", "epsilon", "but"))
    print()
    print_table(points, ("after round", "epsilon", "Rényi bound"))
    print()
    print_table(
        [(o.what, o.rounds, o.noise_multiplier, o.sampling, o.epsilon) for o in others],
        ("what if", "rounds", "noise", "drawn", "epsilon"),
    )
    print(f"\n{NOTICE}")


def _print_plan(made: PrivacyPlan, answer: Accounted) -> None:
    from fedlearn.privacy.what_if import in_words

    best = answer.reported
    print(f"unit {made.unit.value}, {made.units} of them at the least; neighbours: {made.relation.value}")
    print(
        f"{made.rounds} rounds of {made.steps} releases; drawn: {in_words(made)}; noise multiplier {made.noise_multiplier:.4f}"
    )
    others = ", ".join(f"{b.epsilon:.4f} by {b.accountant}" for b in answer.shown)
    print(f"epsilon {best.epsilon:.4f} at delta {made.delta:g} by {best.accountant} ({others})\n")


def _sampling(study: Study, unit: Any, rate: float | None, units: int) -> Sampling:
    from fedlearn.privacy.plan import Everyone, FixedCohort, PoissonSampling, Unit

    if rate is not None:
        return PoissonSampling(rate)
    if unit is not Unit.CLIENT:
        raise StudyError(
            "--rate: missing; batches of records are drawn by Poisson sampling", hint="for example --rate 0.01"
        )
    return Everyone() if study.cohort.size is None else FixedCohort(study.cohort.size, units)


def _plain(made: PrivacyPlan) -> dict[str, Any]:
    tree = asdict(replace(made))
    return {**tree, "unit": made.unit.value, "weighting": made.weighting.value, "neighbours": made.relation.value}


def _bound(bound: Any) -> dict[str, Any]:
    return {"accountant": bound.accountant, "method": bound.method.value, "epsilon": bound.epsilon}


def _number(epsilon: float | None) -> float | str:
    return "not private" if epsilon is None else "infinite" if epsilon == float("inf") else epsilon
