"""`fedlearn privacy plan`: what a study's privacy costs, as it will be enforced, and what it would cost otherwise."""

from __future__ import annotations

import json as text_of
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import click
import typer

from fedlearn.cli.options import AppFolder, Debug, Json, Overrides, Rounds
from fedlearn.cli.output import print_json, print_table
from fedlearn.errors import StateError, StudyError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fedlearn.privacy.plan import PrivacyPlan
    from fedlearn.study import Study

ENFORCED: Final = (
    "This is what the study asks for. A site reserves the cost from its own budget before it trains, round by round for records and groups and where "
    "clients add the noise, else the whole run, and takes no part where that does not fit. A simulation of the study is seeded, hence not private."
)
ON_PAPER: Final = (
    "A plan on paper: the study itself does not ask for this. Write it into its [privacy] to have it enforced."
)
_EXAMPLE: Final = """add a budget to the study (docs/privacy.md):
    [privacy]
    unit = "record"  # or "group", "client": whose presence is hidden
    epsilon = 3.0    # noise follows from it
    delta = 1e-5     # below 1 / the number of units
or ask what one would cost: fedlearn privacy plan STUDY --epsilon 3"""
DELTA: Final = 1e-5
"""Where neither the study nor an option names one."""


class UnitName(StrEnum):
    """Whose presence is hidden."""

    RECORD = "record"
    GROUP = "group"
    CLIENT = "client"


def plan(
    study: Annotated[str, typer.Argument(metavar="STUDY", help="A study file, or one of fedlearn's own.")],
    unit: Annotated[UnitName | None, typer.Option("--unit", help="Whose presence is hidden.")] = None,
    units: Annotated[
        int | None, typer.Option("--units", metavar="N", min=1, help="How many units there are at the least; public.")
    ] = None,
    delta: Annotated[float | None, typer.Option("--delta", metavar="D", help="Below 1 / N.")] = None,
    epsilon: Annotated[
        float | None, typer.Option("--epsilon", metavar="E", help="Find the least noise for it.")
    ] = None,
    noise: Annotated[float | None, typer.Option("--noise", metavar="Z", help="Noise multiplier, instead.")] = None,
    rate: Annotated[
        float | None,
        typer.Option("--rate", metavar="Q", help="Poisson sampling: every unit's probability at each step."),
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", metavar="S", min=1, help="Noisy steps of each round.")] = None,
    clip: Annotated[
        float | None, typer.Option("--clip", metavar="C", help="L2 norm that a contribution is clipped to.")
    ] = None,
    group: Annotated[
        str | None, typer.Option("--group", metavar="COLUMN", help="Of groups: what names each row's person.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw epsilon over the rounds; PNG.")
    ] = None,
    rounds: Rounds = None,
    overrides: Overrides = None,
    app: AppFolder = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Work out what a study's privacy costs: epsilon after each round, evaluations included, and what if.

    The plan is the one in the study's [privacy]. The options say what it would be with other numbers, and serve where the study has no
    such table. Nothing is trained.
    """
    del debug
    from fedlearn.app import load_app
    from fedlearn.learning.combine import check_combination
    from fedlearn.privacy.claims import claims, shown
    from fedlearn.privacy.statement import lines, statement, unamplified, whole_account
    from fedlearn.privacy.study import plan_of
    from fedlearn.privacy.what_if import alternatives, curve, draw, rounds_shown, shares
    from fedlearn.study import load_study
    from fedlearn.tasks import task_of

    loaded = load_app(app)
    asked = load_study(loaded.study(study), tuple(overrides or ()))
    asked = asked if rounds is None else asked.with_overrides([f"rounds={rounds}"])
    options = {
        "unit": None if unit is None else unit.value,
        "units": units,
        "delta": delta,
        "epsilon": epsilon,
        "noise_multiplier": noise,
        "sampling_rate": rate,
        "steps": steps,
        "clip_l2": clip,
        "group": group,
    }
    given = {key: value for key, value in options.items() if value is not None}
    asked = _with_options(asked, given) if given or asked.privacy is None else asked
    check_combination(asked, loaded.strategy(asked.strategy.name, asked.strategy.options))
    task_of(asked)  # refused where it cannot protect such units
    made = plan_of(asked)
    assert made is not None
    assert asked.privacy is not None
    if plot is not None:
        try:
            draw(made, plot)
        except (OSError, ValueError) as error:
            raise StateError(
                f"{plot}: cannot be written: {error}", hint="name a .png file in a folder that exists"
            ) from None
    seeded = asked.privacy.seeded
    said = statement(made, seeded=seeded, masked=asked.secure_aggregation.enabled)
    answer = whole_account(made, made.rounds, made.rounds)
    notice = ON_PAPER if given else ENFORCED
    points, others, parts = curve(made, rounds_shown(made.rounds)), alternatives(made), shares(made)
    if json:
        best, masked = answer.reported, asked.secure_aggregation.enabled
        without = unamplified(made, made.rounds, best.epsilon)
        promised = claims(made, best.epsilon, best.accountant, seeded=seeded, unsampled=without, masked=masked)
        print_json(
            {
                "enforced": not given,
                "notice": notice,
                "plan": _plain(made),
                "statement": said,
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
                "alone": parts,
                "curve": [{"round": n, "epsilon": e, "renyi": r} for n, e, r in points],
                "what_if": [asdict(one) for one in others],
                "plot": plot,
            }
        )
        return
    for line in lines(said):
        print(line)
    print()
    print_table(
        [(n, shown(e), shown(r)) for n, e, r in points], ("after round", "epsilon", "Rényi bound"), right=(1, 2)
    )
    print()
    if len(parts) > 1:
        print_table([(what, shown(e)) for what, e in parts.items()], ("what, alone", "epsilon"), right=(1,))
        print()
    print_table(
        [(o.what, o.rounds, o.noise_multiplier, o.sampling, shown(o.epsilon)) for o in others],
        ("what if", "rounds", "noise", "drawn", "epsilon"),
        right=(4,),
    )
    print(f"\n{notice}")


def _with_options(asked: Study, given: Mapping[str, Any]) -> Study:
    """The study as if its [privacy] said so: the options over its own table, or over none where they name another unit.

    Raises:
        UsageError: neither the table nor an option says how much may be spent, or two options do.
        StudyError: there is neither a table nor an option; or the numbers do not fit each other.
    """
    from fedlearn.study import study_from_json

    own = {} if asked.privacy is None else asked.privacy.model_dump(mode="json", exclude_defaults=True)
    same_unit = given.get("unit", own.get("unit")) == own.get("unit")
    table: dict[str, Any] = {"unit": "record", "delta": DELTA} | (own if same_unit else {})
    amounts = {"epsilon", "noise_multiplier"}
    if not given:
        raise StudyError(
            f"{asked.name}: the study has no [privacy], so it promises no privacy and spends none", hint=_EXAMPLE
        )
    if len(amounts & set(given)) == 2 or not amounts & {*table, *given}:
        raise click.UsageError("one of --epsilon and --noise is needed", click.get_current_context())
    if amounts & set(given):
        table = {key: value for key, value in table.items() if key not in amounts}
    table |= given
    tree = asked.model_dump(mode="json")
    if table["unit"] == "client" and (rate := table.pop("sampling_rate", None)) is not None:
        tree["cohort"] |= {"rate": rate, "size": None}
    return study_from_json(text_of.dumps(tree | {"privacy": table}))


def _plain(made: PrivacyPlan) -> dict[str, Any]:
    tree = asdict(made)
    return {**tree, "unit": made.unit.value, "weighting": made.weighting.value, "neighbours": made.relation.value}


def _bound(bound: Any) -> dict[str, Any]:
    return {"accountant": bound.accountant, "method": bound.method.value, "epsilon": bound.epsilon}


def _number(epsilon: float | None) -> float | str:
    return "not private" if epsilon is None else "infinite" if epsilon == float("inf") else epsilon
