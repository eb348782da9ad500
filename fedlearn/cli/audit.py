"""`fedlearn audit`: what a study claims of its privacy, put to the test."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from fedlearn.cli.options import AppFolder, Data, Debug, Json, Overrides, Rounds
from fedlearn.cli.output import print_json, print_table
from fedlearn.cli.progress import duration, plain_progress
from fedlearn.errors import ClaimRefutedError, StateError

if TYPE_CHECKING:
    from collections.abc import Callable

    from fedlearn.simulation.audit import AuditReport

ARRAYS: Final = 4
SURELY_SEEN: Final = 0.95
PICTURES: Final = (".png", ".pdf", ".svg")
MEANING: Final = "A bound below the claim does not prove the claim: it says that this attacker found nothing against it. See docs/auditing.md."
REFUTED: Final = (
    "What trains here is not what was accounted. At 95 % confidence one audit in twenty of an honest build may end so: audit again with another "
    "seed (--set seed=7), and train on nobody's data until it is understood. See docs/auditing.md."
)


def audit(
    study: Annotated[str, typer.Argument(metavar="STUDY", help="A study file, or one of fedlearn's own.")],
    canaries: Annotated[
        int, typer.Option("--canaries", metavar="M", min=10, max=1_000_000, help="Made-up records or clients.")
    ] = 1_000,
    client: Annotated[
        str | None,
        typer.Option("--client", metavar="CLIENT", help="Whose records they are put among; the first client's."),
    ] = None,
    shadows: Annotated[
        int | None,
        typer.Option(
            "--shadows", metavar="K", min=0, max=10_000, help="Models of the membership test; 8, for clients none."
        ),
    ] = None,
    delta: Annotated[
        float | None, typer.Option("--delta", metavar="D", help="Test the plan's claim at this delta, not the study's.")
    ] = None,
    confidence: Annotated[
        float, typer.Option("--confidence", metavar="P", help="That no bound is above the truth.")
    ] = 0.95,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Draw scores and bounds; PNG.")] = None,
    rounds: Rounds = None,
    overrides: Overrides = None,
    app: AppFolder = None,
    data: Data = None,
    json: Json = False,
    debug: Debug = False,
) -> int:
    """Put a study's privacy claim to the test, by attacking the code that trains it.

    The study is run here with canaries in it; from all its noisy releases an attacker guesses which of them were in. Guesses that are better
    than the claimed epsilon allows refute it: exit code 16. Then final models, trained with and without each record, are asked who was in.
    """
    del debug
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from fedlearn.simulation.audit import audit as run
    from fedlearn.simulation.prepare import Request

    if plot is not None and not plot.parent.is_dir():  # before the work, not after it
        raise StateError(f"{plot}: there is no folder {plot.parent}", hint="make it, or name a file elsewhere")
    if plot is not None and plot.suffix.lower() not in PICTURES:
        raise StateError(f"{plot}: no picture's name, expected one of {', '.join(PICTURES)} at its end")
    ready = Request(study, rounds, overrides or (), data, app).ready()
    with _bar(quiet=json) as told:
        report = run(
            ready,
            canaries=canaries,
            client=client,
            shadows=shadows,
            delta=delta,
            confidence=confidence,
            told=told,
        )
    if json:
        print_json(_document(report, plot))
    else:
        _print(report)
    if plot is not None:
        from fedlearn.report.audit import draw_audit

        draw_audit(report, plot)
        if not json:
            print(f"picture: {plot}")
    return ClaimRefutedError.exit_code if report.refuted else 0


@contextmanager
def _bar(*, quiet: bool) -> Iterator[Callable[[int, int, str], None]]:
    """A bar with the time left on a terminal; a line now and then where there is none."""
    if quiet:
        yield lambda done, total, what: None  # noqa: ARG005  # nobody looks
        return
    if not sys.stderr.isatty():
        yield _lines()
        return
    with plain_progress() as progress:
        task = progress.add_task("audit", total=None, note="")

        def told(done: int, total: int, what: str) -> None:
            progress.update(task, completed=done, total=total, note=f"{what}, round {done}/{total}")

        yield told


def _lines(every_s: float = 20.0) -> Callable[[int, int, str], None]:
    started_s = said_s = time.monotonic()

    def told(done: int, total: int, what: str) -> None:
        nonlocal said_s
        now = time.monotonic()
        if now - said_s >= every_s:
            said_s = now
            left = duration((now - started_s) * (total - done) / done)
            print(f"{what}: round {done}/{total}; about {left} left", file=sys.stderr, flush=True)

    return told


def _print(report: AuditReport) -> None:
    from fedlearn.privacy.claims import shown

    plan, finding, evidence = report.plan, report.finding, report.audited.evidence
    units = {"record": "records", "group": "groups", "client": "clients"}[plan.unit.value]
    where = f" among the {units} of {report.audited.among}" if report.audited.among else " among the clients"
    print(
        f"claim:  epsilon <= {shown(report.claim.epsilon)} at delta {plan.delta:g}, unit {plan.unit.value}, {plan.relation.value}"
    )
    print(f"        by {report.claim.accountant}; against whoever reads every noisy release")
    print(
        f"audit:  epsilon >= {finding.epsilon_lower:.4g} at delta {plan.delta:g}, confidence {100 * finding.confidence:.4g} %"
    )
    print(f"        {finding.canaries} canaries{where}, {evidence.releases} releases")
    print(f"the claim is {_verdict(report)}\n")
    print_table([(g.guesses, g.correct, g.epsilon_lower) for g in finding.tried], ("guesses", "right", "epsilon >="))
    print(f"\nnoise, measured / planned: {evidence.noise_factor():.4f}; the arrays that are furthest from 1")
    ordered = sorted(evidence.noise(), key=lambda one: abs(one.factor - 1) / one.chance, reverse=True)
    print_table(
        [(one.name, one.factor, one.chance) for one in ordered[:ARRAYS]], ("array", "factor", "chance +-"), indent="  "
    )
    for one in report.short_of_noise:
        print(f"  {one.name}: too little noise by far more than chance: the claim was computed from other noise")
    print("\nwhat this audit would say of other builds of this plan (simulated)")
    rows = [(f"noise x {one.noise_factor:g}", f"{one.refuted:.0%}", one.epsilon_lower) for one in report.power]
    print_table(rows, ("build", "refuted", "epsilon >="), indent="  ", right=(1,))
    weak = [one for one in report.power if one.noise_factor <= 0.1 and one.refuted < SURELY_SEEN]
    if weak:
        print("  The bound cannot see a build whose noise is ten times too small; the noise that was measured can.")
        print("  A smaller --delta, or more --canaries, make the bound stronger.")
    print()
    _print_membership(report, units)
    print(f"\n{REFUTED if report.refuted else MEANING}")


def _verdict(report: AuditReport) -> str:
    reasons = [f"these guesses have p = {report.finding.p_claim:.2g} under it"] if report.finding.refuted else []
    if report.membership is not None and report.membership.finding.refuted:
        reasons.append("final models give their members away")
    if report.short_of_noise:
        reasons.append("releases have less noise than it was computed from")
    return f"REFUTED: {'; '.join(reasons)}" if reasons else f"not refuted (p = {report.finding.p_claim:.2g})"


def _print_membership(report: AuditReport, units: str) -> None:
    found = report.membership
    if found is None:
        print(f"membership test on final models: none ({report.no_membership})")
        return
    told = "tells members from others" if found.noticed else "cannot tell members from others"
    print(f"membership test on {found.runs} final models, {found.units} {units}: it {told}")
    print(f"  AUC {found.auc:.4f} (0.5 is chance; above {found.noticed_auc:.4f} is noticed)")
    at_one, at_five = found.true_positives
    print(f"  members found at 1 % false alarms: {at_one:.2%}; at 5 %: {at_five:.2%}")
    bound = found.finding
    print(f"  epsilon >= {bound.epsilon_lower:.4g}, confidence {100 * bound.confidence:.4g} %")


def _document(report: AuditReport, plot: Path | None) -> dict[str, Any]:
    evidence = report.audited.evidence
    return {
        "study": report.study,
        "refuted": report.refuted,
        "claim": {
            "epsilon": report.claim.epsilon,
            "delta": report.plan.delta,
            "unit": report.plan.unit.value,
            "neighbours": report.plan.relation.value,
            "accountant": report.claim.accountant,
        },
        "audit": {**asdict(report.finding), "refuted": report.finding.refuted},
        "among": report.audited.among or None,
        "clients": report.audited.clients,
        "releases": evidence.releases,
        "noise": {
            "measured_over_planned": evidence.noise_factor(),
            "by_array": [asdict(n) | {"too_little": n.too_little} for n in evidence.noise()],
        },
        "power": [asdict(one) for one in report.power],
        "membership": None if report.membership is None else asdict(report.membership),
        "no_membership": report.no_membership,
        "plot": plot,
        "seconds": round(report.seconds, 3),
    }
