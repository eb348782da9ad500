"""An evaluation that is charged: what a site's test rows say of a model, as noisy sums.

The mechanism. Every test unit contributes one vector of L2 norm 1 at the most (`scoring.py`): a row its own, a group the mean of its rows'. The
site adds them up, adds Gaussian noise of standard deviation `privacy.evaluation_noise` to every cell, and sends the sums: a Gaussian release
with that noise multiplier under add-or-remove-one. A site without test rows sends noise.

What is scored is the global model as it was broadcast, never a client's own (Ditto's): that one is made from the training rows
without noise, so that one training row more could change the scores of all test rows.

What it is charged to. The same account as training, although a unit is either in the training rows or in the test rows (`learning.folds.unit_fold`), and
so pays for one of the two only. Parallel composition would let the larger of the two costs stand for both; but
the model is made from one part and is then asked about the other, over and over, the two halves are known to nobody, and an account that adds up all that
was released of a data set needs no argument about which row was where. Sequential composition overstates here, and never understates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fedlearn.errors import PolicyRefusedError, StudyError
from fedlearn.privacy.events import Cost, Gaussian
from fedlearn.privacy.study import chance_for, protects_rows
from fedlearn.privacy.unfit import where_it_works

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    from fedlearn.learning.backend import Scored
    from fedlearn.learning.rows import IntArray
    from fedlearn.learning.task import Batch
    from fedlearn.privacy.scoring import Floats, Scoring
    from fedlearn.study import Study


def is_charged(study: Study) -> bool:
    """Whether evaluations of this study are noisy and charged."""
    return study.privacy is not None and study.privacy.evaluation_noise is not None and protects_rows(study)


def evaluation_cost(study: Study) -> Cost:
    """What one answer to one evaluation costs the site that gives it. Asked again, it is paid again.

    What all of a study's evaluations cost is in its plan: `PrivacyPlan.whole_cost`.

    Raises:
        StudyError: the study asks for no such evaluation.
    """
    return Cost(Gaussian(_noise(study)))


def check_may_score(study: Study) -> None:
    """At a site: refuse to say anything of its test rows that no mechanism covers.

    Raises:
        PolicyRefusedError: the study has a privacy plan and no `evaluation_noise`.
    """
    if study.privacy is not None and not is_charged(study):
        raise PolicyRefusedError(
            "evaluation: metrics of this site's rows are not covered by the study's privacy plan",
            hint="privacy.evaluation_noise makes them noisy, and charges them",
        )


def noisy_sums(
    study: Study,
    scoring: Scoring,
    outputs: Callable[[IntArray], npt.NDArray[Any]],
    test: Batch,
    at: tuple[int, str],
    *,
    rehearsal: bool,
) -> tuple[float, ...]:
    """What a site answers to an evaluation.

    Args:
        study: has `evaluation_noise`.
        scoring: the task's.
        outputs: gives the global model's on some of the test rows, by number, shape (n, ...). A row on which it raises, or the scoring does,
            counts as nothing.
        test: the test rows; with groups, the unit is a group.
        at: round and client, of the seeded mode's noise.
        rehearsal: True in a simulation; see `fedlearn.privacy.study.is_seeded`.

    Returns:
        `scoring.cells` numbers: all that may leave.
    """
    chance = chance_for(study, "evaluate", *at, rehearsal=rehearsal)
    sums = np.zeros(scoring.cells)

    def score(rows: IntArray) -> Floats:
        return scoring.contributions(outputs(rows), test.y[rows])

    contributions = np.zeros((len(test), scoring.cells))
    for rows, found in where_it_works(np.arange(len(test), dtype=np.int64), score):
        contributions[rows] = found
    if len(test):
        sums = per_unit(contributions, test.groups).sum(axis=0)
    chance.add_normal(sums, _noise(study))
    return tuple(sums.tolist())


def per_unit(contributions: Floats, groups: npt.NDArray[np.str_] | None) -> Floats:
    """One vector a unit, of L2 norm 1 at the most whatever the task's scoring gave; not finite ones count as 0.

    Args:
        contributions: of each row, shape (n, cells).
        groups: of each row, shape (n,); None where rows are the units.

    Returns:
        Shape (units, cells).
    """
    rows = np.where(np.isfinite(contributions).all(axis=1, keepdims=True), contributions, 0.0)
    rows /= np.maximum(1.0, np.linalg.norm(rows, axis=1, keepdims=True))
    if groups is None:
        return rows
    names, owner, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    means = np.zeros((len(names), rows.shape[1]))
    np.add.at(means, owner, rows)
    return means / sizes[:, None]


@dataclass(frozen=True)
class Reader:
    """Turns what sites sent into metrics.

    Args:
        scoring: the task's.
        noise: standard deviation on every cell that a site sends.
    """

    scoring: Scoring
    noise: float

    @classmethod
    def of(cls, study: Study) -> Reader | None:
        """Of a study; None where its evaluations are exact, or there are none."""
        if not is_charged(study):
            return None
        from fedlearn.tasks import task_of

        return cls(task_of(study).scoring(), _noise(study))

    def read(self, replies: Sequence[Scored]) -> tuple[list[Scored], dict[str, float]]:
        """Each site's own metrics, and those of all sites' sums together, which have the least noise.

        A reply of other numbers than the scoring's is left out. A site's examples are its noisy count of units, 0 at the least.
        """
        known = [r for r in replies if len(r.cells) == self.scoring.cells and all(map(math.isfinite, r.cells))]
        if not known:
            return [], {}
        each = []
        for reply in known:
            sums = np.array(reply.cells)
            count = max(0, round(self.scoring.count(sums)))
            each.append(replace(reply, metrics=self.scoring.metrics(sums, self.noise), examples=count))
        pooled = np.sum([reply.cells for reply in known], axis=0)
        return each, self.scoring.metrics(pooled, self.noise * math.sqrt(len(known)))


def _noise(study: Study) -> float:
    if study.privacy is None or study.privacy.evaluation_noise is None:
        raise StudyError("privacy.evaluation_noise: missing; without it nothing that a site evaluates may leave")
    return study.privacy.evaluation_noise
