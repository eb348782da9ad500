"""An audit's picture: what the canaries looked like, and the bound beside the claim."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fedlearn.errors import StateError
from fedlearn.privacy.claims import shown

if TYPE_CHECKING:
    from pathlib import Path

    from fedlearn.simulation.audit import AuditReport


def draw_audit(report: AuditReport, path: Path) -> None:
    """Scores of canaries that were in and out; bounds beside the claim, and beside what other builds would have given.

    Raises:
        StateError: it cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    edges = np.histogram_bin_edges(report.scores, bins=40)
    for inside, label, colour in ((True, "in the data", "tab:red"), (False, "left out", "tab:blue")):
        left.hist(report.scores[report.inside == inside], bins=edges, alpha=0.55, label=label, color=colour)
    left.set(
        xlabel="score: sum of the noisy releases at the canary's number, in clips",
        ylabel="canaries",
        title=f"{report.finding.canaries} canaries, {report.audited.evidence.releases} releases",
    )
    left.legend()
    names = ["this build", *(f"noise x {one.noise_factor:g}" for one in report.power)]
    values = [report.finding.epsilon_lower, *(one.epsilon_lower for one in report.power)]
    right.bar(names, values, color=["tab:red" if report.refuted else "tab:green", *["lightgrey"] * len(report.power)])
    right.axhline(report.claim.epsilon, color="black", linestyle="--", label=f"claim: {shown(report.claim.epsilon, 3)}")
    right.set(
        ylabel=f"epsilon is at least, at delta = {report.plan.delta:g}",
        title=f"bounds at {100 * report.finding.confidence:.3g} % confidence",
    )
    right.tick_params(axis="x", rotation=30)
    right.legend()
    try:
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        raise StateError(
            f"{path}: cannot be written: {error}", hint="name a .png file in a folder that exists"
        ) from None
