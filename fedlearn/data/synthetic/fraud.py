"""Synthetic card transactions of several banks whose customers pay at the same terminals.

Datasheet
    What: card payments with frauds among them, drawn from formulas. **Synthetic: no person, card, shop or bank is real.** Written from the
    published description of the simulator in Le Borgne, Siblini, Lebichot and Bontempi, "Reproducible Machine Learning for
    Credit Card Fraud Detection: Practical Handbook", 2022, chapter 3; not from its code.
    Customers live at random places of a 100 x 100 map. Each has a mean amount m ~ U(5, 100), pays amounts ~ N(m, m/2)
    (a negative one is drawn again from U(0, 2m)), Poisson(r) times a day with r ~ U(0, 4), at times of day ~ N(noon, 20,000 s), at a
    random one of the terminals within `radius`.
    Frauds: 1, every amount above 220. 2, a terminal is compromised for 28 days: a share of the payments there are
    frauds. 3, a card's number leaks for 14 days: a third of its payments have five times the amount and are frauds.
    Added here: every customer has an issuing bank, with bank sizes drawn from a Dirichlet distribution. Terminals belong to nobody,
    so what a compromised terminal looks like is seen by all banks, a little by each.
    Changed: rates of compromise per terminal and customer are higher than the handbook's, because there are fewer of both; and
    a compromised terminal turns a share of its payments, not all, into frauds. 1 to 2 % of payments are frauds.
    Not modelled: salaries, seasons, currencies, chargebacks, criminals who learn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from fedlearn import seeds

DAY_S: Final = 86_400
LARGE_AMOUNT: Final = 220.0
TERMINAL_DAYS: Final = 28
CARD_DAYS: Final = 14
CARD_SHARE: Final = 1 / 3
CARD_FACTOR: Final = 5.0


@dataclass(frozen=True)
class FraudParameters:
    """What is simulated.

    Args:
        customers: of all banks together.
        terminals: where they pay.
        banks: issuers.
        days: how long.
        radius: how far a customer goes, on the 100 x 100 map.
        bank_alpha: Dirichlet concentration of bank sizes.
        terminals_a_day: expected number of newly compromised terminals.
        cards_a_day: expected number of newly leaked cards.
        terminal_share: share of the payments at a compromised terminal that are frauds.
    """

    customers: int = 2_000
    terminals: int = 1_000
    banks: int = 5
    days: int = 90
    radius: float = 5.0
    bank_alpha: float = 2.0
    terminals_a_day: float = 1.0
    cards_a_day: float = 2.0
    terminal_share: float = 0.35


@dataclass(frozen=True)
class Transactions:
    """Payments in the order of time; all arrays have shape (n,).

    Args:
        time_s: seconds since the first day began, int64.
        customer: number of the customer, int64.
        terminal: number of the terminal, int64.
        amount: float64, above or equal 0.
        scenario: 0 for an honest payment, 1 to 3 for the kinds of fraud, int64.
        bank: number of the customer's bank, int64.
    """

    time_s: npt.NDArray[np.int64]
    customer: npt.NDArray[np.int64]
    terminal: npt.NDArray[np.int64]
    amount: npt.NDArray[np.float64]
    scenario: npt.NDArray[np.int64]
    bank: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.time_s)


def fraud_synthetic(parameters: FraudParameters, seed: int) -> Transactions:
    """A whole data set, the same for the same parameters and seed."""
    p = parameters
    g = seeds.numpy_generator(seed, "fraud")
    home, shop = g.uniform(0, 100, (p.customers, 2)), g.uniform(0, 100, (p.terminals, 2))
    mean, rate = g.uniform(5, 100, p.customers), g.uniform(0, 4, p.customers)
    bank_of = g.choice(p.banks, p.customers, p=g.dirichlet(np.full(p.banks, p.bank_alpha)))
    bank_of[: p.banks] = np.arange(p.banks)[: p.customers]  # no bank without a customer

    counts = g.poisson(rate[:, None], (p.customers, p.days))
    customer = np.repeat(np.arange(p.customers), counts.sum(axis=1))
    day = np.repeat(np.tile(np.arange(p.days), p.customers), counts.ravel())
    second = g.normal(DAY_S / 2, 20_000, len(day))
    n_near, near = _terminals_near(home, shop, p.radius)
    kept = (second > 0) & (second < DAY_S) & (n_near[customer] > 0)
    customer, day, second = customer[kept], day[kept], second[kept]
    terminal = near[customer, (g.random(len(customer)) * n_near[customer]).astype(np.int64)]
    amount = g.normal(mean[customer], mean[customer] / 2)
    amount = np.where(amount < 0, g.uniform(0, 2 * mean[customer]), amount)

    scenario = np.where(amount > LARGE_AMOUNT, 1, 0)
    bad_terminal = _periods(g, p.terminals, p.days, p.terminals_a_day, TERMINAL_DAYS)
    hit = bad_terminal[terminal, day] & (g.random(len(day)) < p.terminal_share)
    scenario[hit] = 2
    leaked_card = _periods(g, p.customers, p.days, p.cards_a_day, CARD_DAYS)
    hit = leaked_card[customer, day] & (g.random(len(day)) < CARD_SHARE)
    scenario[hit] = 3
    amount[hit] *= CARD_FACTOR

    time_s = day * DAY_S + second.astype(np.int64)
    order = np.lexsort((terminal, customer, time_s))
    return Transactions(
        time_s[order],
        customer[order],
        terminal[order],
        np.round(amount[order], 2),
        scenario[order].astype(np.int64),
        bank_of[customer[order]].astype(np.int64),
    )


def _terminals_near(
    home: npt.NDArray[np.float64], shop: npt.NDArray[np.float64], radius: float
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """How many terminals each customer reaches, and which, padded to the longest list."""
    reach = ((home[:, None] - shop[None]) ** 2).sum(axis=2) < radius**2
    n_near = reach.sum(axis=1)
    near = np.zeros((len(home), max(1, int(n_near.max(initial=0)))), dtype=np.int64)
    who, what = np.nonzero(reach)
    near[who, np.arange(len(who)) - np.repeat(np.cumsum(n_near) - n_near, n_near)] = what
    return n_near, near


def _periods(g: np.random.Generator, things: int, days: int, a_day: float, length: int) -> npt.NDArray[np.bool_]:
    """Which of so many things are bad on which day: each day some turn bad, for `length` days. Shape (things, days)."""
    starts = np.repeat(np.arange(days), g.poisson(a_day, days))
    which = g.integers(0, things, len(starts))
    edges = np.zeros((things, days + length + 1), dtype=np.int64)
    np.add.at(edges, (which, starts), 1)
    np.add.at(edges, (which, starts + length), -1)
    bad: npt.NDArray[np.bool_] = edges.cumsum(axis=1)[:, :days] > 0
    return bad
