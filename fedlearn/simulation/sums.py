"""What leaves a block: its clients' updates clipped, weighted and summed at once, as their chain does it one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

from fedlearn.aggregation.linear import IntegerSum, quantum_bits_for
from fedlearn.arrays import Spec
from fedlearn.errors import UpdateError
from fedlearn.learning.backend import Summed
from fedlearn.learning.collect import PartialSum, release_specs
from fedlearn.learning.postprocess import ClipL2, Postprocessor, Uniform
from fedlearn.learning.update import UNCLIPPED, Weighting
from fedlearn.privacy.clipping import COUNT, Contribute

if TYPE_CHECKING:
    from fedlearn.learning.strategy import Strategy
    from fedlearn.simulation.blocks import Layout

COLUMNS: Final = 1 << 16
"""Parameters that are summed at a time in float64, so that a sum needs no second copy of the stack."""
Facts = Mapping[str, float]


@dataclass(frozen=True)
class BlockSums:
    """Makes the sums of one round's blocks.

    Args:
        strategy: says what is released, and how it is weighted.
        chain: of the round, what is done to each update on its way out.
        dtype: of the model.
    """

    strategy: Strategy
    chain: tuple[Postprocessor, ...]
    dtype: str

    @property
    def known(self) -> bool:
        """Whether all of the chain's steps are known here; what has others is done to each update by itself."""
        return all(isinstance(step, ClipL2 | Contribute | Uniform) for step in self.chain)

    def of(
        self,
        layout: Layout,
        releases: Mapping[str, torch.Tensor],
        examples: Mapping[str, int],
        facts: Sequence[Facts],
    ) -> Summed:
        """The weighted sum of everybody's update.

        Args:
            layout: of a row.
            releases: by name, a row for each client, shape (clients, parameters).
            examples: training rows by client, in the rows' order.
            facts: likewise, what may leave beside the updates where no privacy plan forbids it.

        Raises:
            UpdateError: an update or the sum is not finite, or too large to be held in integers.
        """
        scales, unclipped = self._clipped(releases)
        counts = scales.new_tensor(list(self._weights(examples).values()))
        totals = {}
        for release in self.strategy.releases:
            weights = scales * counts if release.weighting is Weighting.EXAMPLES else scales
            stack = releases[release.name]
            parts = [weights @ stack[:, i : i + COLUMNS].double() for i in range(0, stack.shape[1], COLUMNS)]
            totals[release.name] = torch.cat(parts)
        return self.reply(layout, totals, examples, facts, unclipped)

    def reply(
        self,
        layout: Layout,
        totals: Mapping[str, torch.Tensor],
        examples: Mapping[str, int],
        facts: Sequence[Facts],
        unclipped: int = 0,
    ) -> Summed:
        """A block's sums in integers.

        Args:
            layout: of a sum.
            totals: by release, the weighted sum of the updates, shape (parameters,), float64.
            examples: as in `of`.
            facts: likewise.
            unclipped: how many updates were within the clip; of no use where none is counted.

        Raises:
            UpdateError: a sum is not finite, or too large to be held in integers.
        """
        weights = self._weights(examples)
        specs = {name: Spec(shape, self.dtype) for name, shape in layout.shapes.items()}
        sums = {}
        for release, these in release_specs(self.strategy, specs, counted=is_counted(self.chain)).items():
            if release.name == UNCLIPPED:
                flat = {COUNT: torch.tensor([unclipped], dtype=torch.float64)}
            else:
                flat = layout.views(totals[release.name].cpu())
            weight = sum(weights.values()) if release.weighting is Weighting.EXAMPLES else len(weights)
            sums[release.name] = IntegerSum(these, quantum_bits_for(these))
            sums[release.name].add_sum({name: t.numpy() for name, t in flat.items()}, weight, len(weights))
        said = [{}] * len(weights) if self._uniform else facts
        return Summed(PartialSum(sums, weights), dict(zip(weights, said, strict=True)))

    @property
    def _uniform(self) -> bool:
        """Whether every client counts once and says nothing beside its update."""
        return any(isinstance(step, Contribute | Uniform) for step in self.chain)

    def _weights(self, examples: Mapping[str, int]) -> dict[str, int]:
        return dict.fromkeys(examples, 1) if self._uniform else dict(examples)

    def _clipped(self, releases: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
        """What each client's update is multiplied with, shape (clients,), float64, and how many were within the clip."""
        first = next(iter(releases.values()))
        bounds = [step.clip_l2 for step in self.chain if isinstance(step, ClipL2 | Contribute)]
        if not bounds:
            return torch.ones(len(first), dtype=torch.float64, device=first.device), len(first)
        each = [torch.linalg.vector_norm(stack, dim=1, dtype=torch.float64) for stack in releases.values()]
        norms = torch.stack(each).square().sum(0).sqrt()
        if not norms.isfinite().all():
            raise UpdateError("update: its L2 norm is not finite")
        clip = min(bounds)
        return torch.clamp(clip / norms, max=1.0), int((norms <= clip).sum())


def is_counted(chain: Sequence[Postprocessor]) -> bool:
    """Whether a chain adds a bit to each update: 1 where it was within an adaptive clip."""
    return any(isinstance(step, Contribute) and step.counted for step in chain)
