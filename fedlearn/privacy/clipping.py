"""Client-level DP-FedAvg: what a client sends, and what the server makes of the sum.

McMahan et al. 2018, "Learning differentially private recurrent language models" (fixed clip, fixed denominator), and Andrew et al. 2021,
"Differentially private learning with adaptive clipping" (the clip follows a quantile of the norms). The update that leaves a client is
one vector: everything that its strategy releases, clipped jointly; beside it, under an adaptive clip, one bit that only the sum of shows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np

from fedlearn.errors import UpdateError
from fedlearn.learning.postprocess import ClipL2, joint_l2_norm
from fedlearn.learning.update import UNCLIPPED, Aggregate, Update
from fedlearn.privacy.plan import CLIPS, AdaptiveClip, FixedCohort, PoissonSampling, PrivacyPlan, Spaced

if TYPE_CHECKING:
    from fedlearn.arrays import Array, Arrays
    from fedlearn.privacy.mechanisms import Chance

COUNT: Final = "count"
"""The one array of the release `UNCLIPPED`, shape (1,)."""


@dataclass(frozen=True)
class Contribution:
    """What one client gives to one release: nothing else of it may enter.

    Args:
        update: with a joint norm of at most the clip, one example and no facts.
        unclipped: whether its norm was within the clip. A fact about the client: only a noisy count of it is released.
    """

    update: Update
    unclipped: bool


def contribute(update: Update, clip_l2: float) -> Contribution:
    """A client's contribution.

    | update | contribution |
    |---|---|
    | within the clip, the zero update too | itself, unclipped |
    | longer | scaled down to the clip |
    | not finite, or of infinite norm | refused; the client contributes nothing |
    | integers | refused: noise cannot be added to them |

    Raises:
        UpdateError: as the table says.
    """
    for name, arrays in update.private.items():
        for key, array in arrays.items():
            if array.dtype.kind != "f":
                raise UpdateError(
                    f"update {name!r}: {key} is of {array.dtype}, expected floating point",
                    hint="a counter or an integer buffer cannot carry noise; keep it out of what the strategy releases",
                )
    clipped = ClipL2(clip_l2).on_client(update)
    return Contribution(replace(clipped, examples=1, facts={}), joint_l2_norm(update) <= clip_l2)


@dataclass(frozen=True)
class Contribute:
    """What a client-level plan does to an update on its way out: `contribute`, a step of the chain.

    Args:
        clip_l2: of this round.
        counted: whether the clip is adaptive, so that one bit goes with the update: 1 where it was within the clip.
    """

    clip_l2: float
    counted: bool = False

    def on_client(self, update: Update) -> Update:
        given = contribute(update, self.clip_l2)
        if not self.counted:
            return given.update
        bit = {COUNT: np.array([given.unclipped], dtype=np.float32)}
        return replace(given.update, private={**given.update.private, UNCLIPPED: bit})

    def on_server(self, aggregate: Aggregate) -> Aggregate:
        return aggregate


@dataclass(frozen=True)
class CentralRelease:
    """What a round releases.

    Args:
        means: release name to named arrays, float64: noisy sums over a denominator that the plan fixes.
        clip_l2: of the next round.
        noise_std: standard deviation of the noise on each coordinate of `means`.
    """

    means: Mapping[str, Arrays]
    clip_l2: float
    noise_std: float


def denominator(plan: PrivacyPlan) -> float:
    """What sums are divided by: the expected number of contributions. Never the real one, which is private."""
    match plan.sampling:
        case PoissonSampling(rate):
            return rate * plan.units
        case FixedCohort(size, _) | Spaced(size, _, _):
            return float(size)
        case _:
            return float(plan.units)


def central_release(
    plan: PrivacyPlan,
    clip_l2: float,
    sums: Mapping[str, Arrays],
    unclipped: int,
    contributions: int,
    chance: Chance,
    *,
    longer: float = 0.0,
) -> CentralRelease:
    """Noise on the sum of a round's contributions, whoever refused or vanished.

    Args:
        plan: says noise and denominator; a cohort that came out smaller changes neither.
        clip_l2: that the contributions were clipped to.
        sums: release name to named arrays: the exact sums. Shapes are needed even when nobody came.
        unclipped: how many contributions were within the clip.
        contributions: how many there were.
        chance: of the noise.
        longer: how much longer than the clip a contribution can be in the sum, by rounding: it needs its noise too.
    """
    size = denominator(plan)
    std = plan.sum_noise_multiplier * (clip_l2 + longer)
    means: dict[str, dict[str, Array]] = {}
    for name, arrays in sums.items():
        means[name] = {}
        for key, array in arrays.items():
            noisy = np.array(array, dtype=np.float64)
            chance.add_normal(noisy, std)
            means[name][key] = noisy / size
    following = clip_l2
    if isinstance(plan.clipping, AdaptiveClip):
        following = next_clip(plan, plan.clipping, clip_l2, unclipped, contributions, chance)
    return CentralRelease(means, following, std / size)


def next_clip(
    plan: PrivacyPlan, clipping: AdaptiveClip, clip_l2: float, unclipped: int, contributions: int, chance: Chance
) -> float:
    """The next clip: longer where fewer contributions than the quantile were within it, shorter where more were.

    Bits are counted as +1/2 and -1/2, which halves their sensitivity (Andrew et al. 2021, section 3.2). It stays within `CLIPS`: a
    study names rate and quantile, and could let it run to where float32 has no noise.
    """
    noisy = unclipped - contributions / 2 + float(chance.normal(1, plan.count_noise)[0])
    share = min(max(noisy / denominator(plan) + 0.5, 0.0), 1.0)
    return min(max(clip_l2 * math.exp(-clipping.rate * (share - clipping.quantile)), CLIPS[0]), CLIPS[1])
