"""Who was in the training data? A likelihood-ratio test on final models, calibrated by models that were trained with and without: statistics alone.

After Carlini et al. 2022, "Membership inference attacks from first principles" (LiRA). Few models are trained, so instead of two normal
distributions for each example, one additive model is fitted to all: an example's difficulty, the run's, and what membership adds. The
ratio of the two likelihoods then rises with what an example's score exceeds its difficulty by.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from fedlearn.errors import StudyError

if TYPE_CHECKING:
    from fedlearn.privacy.audit import Coins, Finding, Scores

FEWEST_RUNS: Final = 3
FEWEST_UNITS: Final = 20
"""With fewer records, groups or clients nothing can be told."""
_LEAST_LOSS: Final = 1e-12


@dataclass(frozen=True)
class Membership:
    """What the test found.

    Args:
        units: records, groups or clients, each in or out of each run by a fair coin.
        runs: trained models; each is attacked with the help of the others.
        auc: mean over the attacked models of the chance that a member's score is above a non-member's; one half tells nothing.
        noticed_auc: an AUC of one model above this would be told from chance with 95 % confidence.
        true_positives: share of members found at one and at five false alarms in a hundred non-members, mean over the models.
        finding: the bound on epsilon that the first model's guesses give, by the theorem of audit.py.
    """

    units: int
    runs: int
    auc: float
    noticed_auc: float
    true_positives: tuple[float, float]
    finding: Finding

    @property
    def noticed(self) -> bool:
        """Whether the models tell members from others at all."""
        return self.auc > self.noticed_auc


def confidence_scores(losses: npt.NDArray[Any]) -> Scores:
    """Losses as logits of the right answer's probability, -ln(e^loss - 1): close to normal (Carlini et al. 2022, section V-B).

    For a loss that is no cross-entropy it is still a falling function of it. Losses below 1e-12 count as that.
    """
    loss = np.maximum(np.asarray(losses, dtype=np.float64), _LEAST_LOSS)
    return np.where(loss > 30.0, -loss, -np.log(np.expm1(np.minimum(loss, 30.0))))


def likelihood_ratios(scores: Scores, inside: npt.NDArray[np.bool_], target: int) -> Scores:
    """Log likelihood ratios of membership in one run, from what the other runs show.

    Args:
        scores: of each unit in each run, shape (runs, units).
        inside: whether it was in, shape (runs, units). The target's own row is not looked at.
        target: the run that is attacked.

    Returns:
        Shape (units,); above 0 where membership is the likelier.

    Raises:
        StudyError: there are too few runs.
    """
    if len(scores) < FEWEST_RUNS:
        raise StudyError(f"membership test: got {len(scores)} models, expected at least {FEWEST_RUNS}")
    level = scores - scores.mean(axis=1, keepdims=True)
    others = np.arange(len(scores)) != target
    seen, was_in = level[others], inside[others].astype(np.float64)
    own, share = seen - seen.mean(axis=0), was_in - was_in.mean(axis=0)
    spread = float(np.vdot(share, share))
    # What training on an example adds cannot be negative; an estimate that is says that it is too small to be seen.
    added = max(float(np.vdot(own, share)) / spread if spread else 0.0, 1e-6)
    difficulty = seen.mean(axis=0) - added * was_in.mean(axis=0)
    residual = own - added * share
    variance = max(float(np.mean(residual**2)) * len(seen) / (len(seen) - 1), 1e-12)
    ratios: Scores = added * (level[target] - difficulty - added / 2) / variance
    return ratios


def auc_of(scores: Scores, inside: Coins) -> float:
    """The chance that a member's score is above a non-member's, a tie counting half; NaN where one kind is missing."""
    from scipy.stats import rankdata

    members = int(inside.sum())
    if not 0 < members < len(inside):
        return math.nan
    ranks = rankdata(scores)
    return float((ranks[inside].sum() - members * (members + 1) / 2) / (members * (len(inside) - members)))


def noticed_auc(members: int, others: int) -> float:
    """What the AUC of scores that tell nothing exceeds with a probability of 5 % (Mann and Whitney 1947, normal approximation)."""
    return 0.5 + 1.6449 * math.sqrt((members + others + 1) / (12 * members * others))


def true_positive_share(scores: Scores, inside: Coins, false_alarms: float) -> float:
    """Share of the members whose score is above that of all but `false_alarms` of the others."""
    threshold = np.quantile(scores[~inside], 1 - false_alarms, method="higher")
    return float(np.mean(scores[inside] > threshold))


def membership(
    scores: Scores, inside: npt.NDArray[np.bool_], epsilon: float, delta: float, confidence: float
) -> Membership:
    """The whole test: each run attacked with the help of the others.

    Args:
        scores: see `likelihood_ratios`.
        inside: likewise.
        epsilon: claimed.
        delta: of the claim.
        confidence: of the bound.

    Raises:
        StudyError: there are too few runs or units.
    """
    from fedlearn.privacy.audit import judge

    runs, units = scores.shape
    if units < FEWEST_UNITS:
        raise StudyError(f"membership test: got {units} units, expected at least {FEWEST_UNITS}: fewer tell nothing")
    ratios = [likelihood_ratios(scores, inside, run) for run in range(runs)]
    members = units // 2
    return Membership(
        units,
        runs,
        float(np.mean([auc_of(one, inside[run]) for run, one in enumerate(ratios)])),
        noticed_auc(members, units - members),
        (_mean_share(ratios, inside, 0.01), _mean_share(ratios, inside, 0.05)),
        # One run, named in advance: the bound is not the best of several.
        judge(ratios[0], inside[0], epsilon, delta, confidence),
    )


def _mean_share(ratios: list[Scores], inside: npt.NDArray[np.bool_], false_alarms: float) -> float:
    return float(np.mean([true_positive_share(one, inside[run], false_alarms) for run, one in enumerate(ratios)]))
