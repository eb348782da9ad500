"""What a release costs and who says whether it may be spent: the seam where a privacy accountant plugs in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Context, Decimal, InvalidOperation, localcontext
from typing import Final, Protocol

from fedlearn.errors import StateError
from fedlearn.release.keys import ReleaseKey

_SHOWN_DIGITS: Final = 3


@dataclass(frozen=True)
class Charge:
    """What one release costs.

    Args:
        account: what is charged: one data set and one unit of privacy at this site, for example `heart/record`.
        cost: the cost in the accountant's own canonical text: a number here, a serialised event tree under a privacy plan.
    """

    account: str
    cost: str


@dataclass(frozen=True)
class Weighing:
    """An account before and after a charge. Not additive in general: epsilons compose.

    Args:
        spent: what the account has spent, open reservations included.
        after: what it would have spent with the charge.
        budget: the most that the site's policy allows.
        unit: what the three are counted in, for example `epsilon`.
    """

    spent: Decimal
    after: Decimal
    budget: Decimal
    unit: str

    @property
    def allowed(self) -> bool:
        """True when the charge fits. A number that is not finite never does."""
        return self.after.is_finite() and not self.budget.is_nan() and self.after <= self.budget

    def in_words(self, account: str, work: str) -> str:
        """For people: three significant digits, rounded up, so that what is above a budget never looks equal to it.

        Args:
            account: what is charged.
            work: what it is charged for.
        """
        spent = f"{self.unit} {_short(self.spent)} of {self.budget.normalize():f} is spent on {account!r}"
        if not self.after.is_finite():
            return f"{spent}, and the account's rule does not cover {work} beside that"
        return f"{spent}, and {work} would make it {_short(self.after)}"


class Charger(Protocol):
    """Weighs a charge against the budget in the site's own policy. Pure: it keeps no account; the journal does."""

    def weigh(self, spent: Sequence[Charge], asked: Charge) -> Weighing:
        """The account of `asked` before and after it.

        Args:
            spent: every charge of the same account that was committed or is reserved, in the order of reservation.
            asked: the charge to weigh. An account that the policy does not name has the budget 0.

        Raises:
            StateError: a cost cannot be read.
        """
        ...


class Book(Protocol):
    """A record of charges that outlives runs and journals: the site's ledger. All that it is told is durable when it returns.

    The gate writes a charge here before it commits the release, so the book may hold a charge whose bytes never came to be, and
    never lacks one whose bytes did.
    """

    def charges(self, account: str) -> Sequence[Charge]:
        """Every charge of an account, in order."""
        ...

    def has(self, key: ReleaseKey) -> bool:
        """Whether a charge for this release stands here."""
        ...

    def charge(self, key: ReleaseKey, charge: Charge) -> None:
        """Add a charge.

        Raises:
            StateError: the disk refused; it is unknown whether the charge stands.
        """
        ...

    def refuse(self, key: ReleaseKey, charge: Charge, reason: str, message: str) -> None:
        """Note that a release was refused, and why. Nothing is charged."""
        ...

    def closed(self, run: str) -> bool:
        """Whether a run is over and what it did not use was given back: nothing of it may leave any more."""
        ...

    def void(self, key: ReleaseKey) -> None:
        """Note that a charged release was given up. Its charge stands; repeats are ignored."""
        ...


@dataclass(frozen=True)
class CostCharger:
    """Costs that add up: plain decimal numbers against one budget an account.

    Args:
        budgets: the budget of each account; an account that is not named has none.
        unit: what is counted.
    """

    budgets: Mapping[str, Decimal]
    unit: str = "cost"

    def weigh(self, spent: Sequence[Charge], asked: Charge) -> Weighing:
        with localcontext(rounding=ROUND_CEILING):  # a sum too long for the context may only overstate
            before = sum((_cost(charge) for charge in spent), start=Decimal(0))
            after = before + _cost(asked)
        return Weighing(spent=before, after=after, budget=self.budgets.get(asked.account, Decimal(0)), unit=self.unit)


def _short(value: Decimal) -> str:
    if not value:
        return "0"
    if not value.is_finite():
        return "an unknown amount"
    return f"{Context(prec=_SHOWN_DIGITS, rounding=ROUND_CEILING).create_decimal(value):f}"


def _cost(charge: Charge) -> Decimal:
    try:
        cost = Decimal(charge.cost)
    except InvalidOperation:
        raise StateError(f"charge on {charge.account!r}: got cost {charge.cost!r}, expected a decimal number") from None
    if not cost.is_finite() or cost < 0:
        raise StateError(f"charge on {charge.account!r}: got cost {charge.cost!r}, expected a finite number from 0")
    return cost
