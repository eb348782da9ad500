"""From payments to features, with what one bank can see: the habits of its customers and its own frauds at each terminal."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from fedlearn.data.synthetic.fraud import DAY_S, Transactions

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

WINDOWS_DAYS: Final = (1, 7, 30)
_UNITS: Final = 1_000
"""Amounts are added up in thousandths."""
LABEL_DELAY_DAYS: Final = 7
"""A fraud is known a week after it happened: the risk of a terminal is measured up to then."""

FEATURE_NAMES: Final = (
    "amount",
    "night",
    "weekend",
    *(f"customer {what}, {days} d" for days in WINDOWS_DAYS for what in ("payments", "mean amount")),
    *(f"terminal {what}, {days} d" for days in WINDOWS_DAYS for what in ("payments", "fraud rate")),
    "amount over the customer's mean",
)


def payment_features(seen: Transactions, frauds: npt.NDArray[np.bool_]) -> npt.NDArray[np.float32]:
    """Features of each payment from the payments before it; Le Borgne et al. 2022, chapter 3, section 4.

    Scales are public constants (logarithms, and rates as they are), so that a bank alone computes what a simulation does.

    Args:
        seen: one bank's payments in the order of time.
        frauds: which of them are frauds, shape (n,). Those of the last `LABEL_DELAY_DAYS` before a payment do not enter it.

    Returns:
        float32 (n, len(FEATURE_NAMES)).
    """
    cents = np.rint(seen.amount * _UNITS).astype(np.int64)
    hour_s, day = seen.time_s % DAY_S, seen.time_s // DAY_S
    columns: list[Floats] = [
        np.log1p(seen.amount) - 4,
        (hour_s < 6 * 3600).astype(np.float64),
        (day % 7 >= 5).astype(np.float64),
    ]
    ones = np.ones(len(seen), dtype=np.int64)
    habits: list[Floats] = []
    mean_amount = np.ones(len(seen))
    for days in WINDOWS_DAYS:
        count, total = _trailing(seen.customer, seen.time_s, (ones, cents), days * DAY_S, 0)
        mean_amount = total / (np.maximum(count, 1) * _UNITS)
        habits += [np.log1p(count) - 1, np.log1p(mean_amount) - 3]
    for days in WINDOWS_DAYS:
        count, bad = _trailing(
            seen.terminal, seen.time_s, (ones, frauds.astype(np.int64)), days * DAY_S, LABEL_DELAY_DAYS * DAY_S
        )
        habits += [np.log1p(count) - 1, 3 * bad / np.maximum(count, 1)]
    columns += habits
    columns.append(np.log((seen.amount + 1) / (mean_amount + 1)))
    return np.stack(columns, axis=1).astype(np.float32)


def _trailing(group: Ints, time_s: Ints, values: tuple[Ints, ...], window_s: int, delay_s: int) -> tuple[Ints, ...]:
    """Sums over the rows of the same group in [time - delay - window, time - delay), for each row and each value.

    One sort and two searches over (group, time) as one number; no loop over groups. In integers, so that a sum is to the bit what it
    would be without the other groups: the running total may wrap around, its differences do not.
    """
    span = int(time_s.max(initial=0)) + window_s + delay_s + 1
    key = group * (2 * span) + time_s + span
    order = np.argsort(key, kind="stable")
    sorted_key = key[order]
    start = np.searchsorted(sorted_key, key - delay_s - window_s, side="left")
    end = np.searchsorted(sorted_key, key - delay_s, side="left")
    sums = []
    for value in values:
        running = np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(value[order])))
        sums.append(running[end] - running[start])
    return tuple(sums)
