"""The site's budgets, and the rule by which the ledger stops a run.

Which rule is right depends on what is charged, so the policy names it, in advance:

*adaptive* (default)  Any events, chosen by anybody after seeing anything. The divergences are summed at one order, fixed in advance (Feldman
    and Zrnic 2021, "Individual privacy accounting via a Rényi filter": fully adaptive composition holds at a fixed order; picking the
    best order afterwards is not covered by it). The default order fits noise multipliers from about 1.5; for less noise on
    rarely sampled batches a lower one lets far more rounds run.
*fixed*  One kind of release, repeated; or plain Gaussians of any size. Then the exact accountant (PLD) is a valid stop rule too: such families are
    totally ordered, so stopping early on what was seen costs nothing (Regehr et al. 2026, "Privacy filters are captured by residues",
    arXiv 2602.15815, which also shows that in general it does). Any other event is refused.

An account keeps its rule and its order for life (`Ledger.note_budgets`): changing them after releases were seen would itself be adaptive. Its
epsilon may be raised.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from enum import Enum
from functools import lru_cache
from typing import Final

import numpy as np

from fedlearn.errors import StudyError
from fedlearn.privacy import rdp
from fedlearn.privacy.events import Composed, Cost, Gaussian, Leaf, Relation, Repeated, leaves
from fedlearn.release.charge import Charge, Weighing

_DIGITS: Final = Decimal("1e-9")


class StopRule(Enum):
    """What may be charged, and how it is added up."""

    ADAPTIVE = "adaptive"
    FIXED = "fixed"


@dataclass(frozen=True)
class Budget:
    """The most that may be spent on one data set and unit.

    Args:
        epsilon: above 0.
        delta: above 0 and below 1; below 1/n for a data set of n units.
        rule: how charges add up.
        order: of the adaptive rule's divergences, above 1; None for the one at which the most zero-concentrated noise fits.

    Raises:
        StudyError: a number is out of range.
    """

    epsilon: float
    delta: float
    rule: StopRule = StopRule.ADAPTIVE
    order: float | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.epsilon) and self.epsilon > 0):
            raise StudyError(f"budget: epsilon: got {self.epsilon}, expected a finite number above 0")
        if not 0 < self.delta < 1:
            raise StudyError(f"budget: delta: got {self.delta}, expected above 0 and below 1")
        if self.order is not None and not 1 < self.order <= rdp.ORDERS[-1]:
            raise StudyError(f"budget: order: got {self.order}, expected above 1 and at most {rdp.ORDERS[-1]:g}")
        if self.rule is StopRule.ADAPTIVE and not self.room > 0:
            raise StudyError(
                f"budget: epsilon: got {self.epsilon:g} at delta {self.delta:g}, too little for a bound of order {self.used_order:g}",
                hint='raise epsilon or delta, choose another order, or use rule = "fixed"',
            )

    @property
    def used_order(self) -> float:
        """The order at which divergences are summed; it follows from the budget alone."""
        if self.order is not None:
            return self.order
        room = (self.epsilon - rdp.overhead(self.delta)) / np.array(rdp.ORDERS)
        return rdp.ORDERS[int(np.argmax(room))]

    @property
    def adds_up_by(self) -> str:
        """What an account keeps for life, in the policy's words."""
        order = f", order = {self.used_order:g}" if self.rule is StopRule.ADAPTIVE else ""
        return f'rule = "{self.rule.value}"{order}'

    @property
    def room(self) -> float:
        """How much divergence fits, at that order."""
        return self.epsilon - float(rdp.overhead(self.delta, (self.used_order,))[0])


@dataclass(frozen=True)
class EpsilonCharger:
    """Weighs event trees (`Cost.to_text`) against epsilon budgets; a `fedlearn.release.charge.Charger`.

    Args:
        budgets: of each account; an account that is not named has none.
    """

    budgets: Mapping[str, Budget]

    def weigh(self, spent: Sequence[Charge], asked: Charge) -> Weighing:
        """Epsilon before and after. Infinite after a charge that the account's rule does not cover: it never fits."""
        budget = self.budgets.get(asked.account)
        before, after = [_cost(charge.cost) for charge in spent], _cost(asked.cost)
        limit = Decimal(0) if budget is None else Decimal(repr(budget.epsilon))
        weighed_by = budget or Budget(1.0, 1e-5)  # an account without a budget is refused; the numbers only inform
        return Weighing(
            spent=_decimal(spent_epsilon(before, weighed_by)),
            after=_decimal(spent_epsilon([*before, after], weighed_by)),
            budget=limit,
            unit="epsilon",
        )


def spent_epsilon(costs: Sequence[Cost], budget: Budget) -> float:
    """Epsilon of everything charged on one account, by its rule.

    Args:
        costs: in any order.
        budget: names delta and rule.

    Returns:
        Never below the true epsilon; 0 without charges, infinite where the rule does not cover them.
    """
    counts: Counter[Leaf] = Counter()
    for cost, times in Counter(costs).items():
        for leaf, count in leaves(cost.event).items():
            counts[leaf] += count * times
    if not counts:
        return 0.0
    relations = {cost.relation for cost in costs}
    if len(relations) > 1:  # an epsilon for one relation says nothing of the other
        return math.inf
    return _epsilon(frozenset(counts.items()), relations.pop(), budget)


@lru_cache(maxsize=1024)
def _epsilon(counts: frozenset[tuple[Leaf, int]], relation: Relation, budget: Budget) -> float:
    by_leaf = dict(counts)
    if budget.rule is StopRule.FIXED:
        if len(by_leaf) > 1 and not all(isinstance(leaf, Gaussian) for leaf in by_leaf):
            return math.inf
        from fedlearn.privacy.accounting import account

        total = Composed(tuple(Repeated(leaf, count) for leaf, count in by_leaf.items()))
        return account(Cost(total, relation), budget.delta).reported.epsilon
    order = (budget.used_order,)
    divergence = rdp.total_rdp(by_leaf, relation, order)
    return max(0.0, float(divergence[0] + rdp.overhead(budget.delta, order)[0]))


@lru_cache(maxsize=4096)
def _cost(text: str) -> Cost:
    return Cost.from_text(text)


def _decimal(value: float) -> Decimal:
    """Rounded up: a shown epsilon is never below the computed one."""
    return Decimal(value).quantize(_DIGITS, rounding=ROUND_CEILING) if math.isfinite(value) else Decimal("Infinity")
