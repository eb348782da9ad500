"""bank/fraud: is this card payment a fraud? Synthetic payments; each client is an issuing bank, terminals are shared by all.

One payment in a hundred is a fraud, so accuracy says nothing: the metric is average precision. A bank sees only its own
customers' payments, and its features are made of those alone. What banks share is the model: what a compromised terminal or
a leaked card looks like.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from fedlearn.data.partition import client_ids
from fedlearn.data.payments import FEATURE_NAMES, LABEL_DELAY_DAYS, payment_features
from fedlearn.data.synthetic.fraud import DAY_S, FraudParameters, Transactions, fraud_synthetic
from fedlearn.data.tables import read_table
from fedlearn.errors import UnsupportedError
from fedlearn.learning.folds import time_ordered_fold
from fedlearn.learning.metrics import average_precision, roc_auc
from fedlearn.learning.rows import IntArray
from fedlearn.learning.task import Batch, ClientData, Examples, Task, TaskCard
from fedlearn.privacy.scoring import BinaryScores

if TYPE_CHECKING:
    import torch

PRIOR: Final = 0.01
"""A public guess at the share of frauds; the model starts from it (Lin et al. 2017, section 4.1)."""

FOCUS: Final = 2.0
"""Focal loss' gamma (Lin et al. 2017, equation 4)."""

LATEST_S: Final = 1e10
"""300 years. Times and groups become one whole number of 64 bits: were one payment's time any, others' features could wrap around."""

CUSTOMER: Final = "customer"
COLUMNS: Final = ("time_s", CUSTOMER, "terminal", "amount", "fraud")


@dataclass(frozen=True)
class FraudTask(Task):
    """Binary classification of payments by a small net.

    Args:
        banks: how many.
        customers: of all banks together.
        terminals: where they pay.
        days: simulated.
        data_seed: of the generator, so that data stays while a study's seed changes.
        objective: "weighted", cross entropy with frauds counting `fraud_weight` times; "focal", Lin et al. 2017, with
            the same weight; or "plain" cross entropy.
        fraud_weight: what one fraud counts, in honest payments.
        histories: what a payment's features are made of: "bank", all earlier payments at the bank; or "customer", those of its own
            customer alone, as under a privacy plan for customers: how risky a terminal is is then known from one's own payments only.
    """

    banks: Annotated[int, Field(ge=1)] = 5
    customers: Annotated[int, Field(ge=10, le=1_000_000)] = 2_000
    terminals: Annotated[int, Field(ge=1, le=100_000)] = 1_000
    days: Annotated[int, Field(ge=14, le=3_650)] = 90
    data_seed: Annotated[int, Field(ge=0)] = 1
    objective: Literal["weighted", "focal", "plain"] = "weighted"
    fraud_weight: Annotated[float, Field(gt=0)] = 10.0
    histories: Literal["bank", "customer"] = "bank"

    name: ClassVar[str] = "bank/fraud"
    keeps_rows: ClassVar[bool] = False
    card: ClassVar[TaskCard] = TaskCard(
        title="Card fraud at issuing banks that share terminals (synthetic)",
        data="synthetic: drawn by fedlearn.data.synthetic.fraud from a seed, after the description of Le Borgne et al. 2022",
        licence="Apache-2.0, as fedlearn",
        synthetic=True,
        clients="one issuing bank; as many as the option banks says (5)",
        metric="average_precision",
        obtain="included (made from a seed)",
        schema=(
            "CSV with a header, one payment a row, in any order; fedlearn makes the features",
            "time_s: seconds since any midnight, 0 or more, a whole number",
            "customer: the card holder, any text",
            "terminal: where the card was used, any text",
            "amount: 0 or more",
            "fraud: 1 or 0",
            "bank (optional): the issuer; without it all rows are one bank's",
        ),
    )

    @property
    def label_names(self) -> tuple[str, ...]:
        return ("honest", "fraud")

    def load(self, source: Path | None = None) -> Examples:
        """Payments as features: column 0 is the time in seconds, the others are `FEATURE_NAMES`; rows by bank, then time."""
        apart = self.histories == "customer"
        if source is not None:
            return _own_payments(source, apart=apart)
        parameters = FraudParameters(
            customers=self.customers, terminals=self.terminals, banks=self.banks, days=self.days
        )
        payments = fraud_synthetic(parameters, self.data_seed)
        width = max(2, len(str(self.banks)))
        names = np.array([f"bank-{number + 1:0{width}d}" for number in range(self.banks)])
        return _examples(payments, payments.customer.astype(np.str_), names, apart=apart)

    def for_units(self, group: str = "") -> FraudTask:
        """Customers, each with features made of their own payments. A payment cannot be protected by itself: the next ones are compared with it."""
        if group != CUSTOMER:
            raise UnsupportedError(
                f"task {self.name!r}: a payment's features are made of the customer's earlier payments, so only whole customers can be protected",
                hint=f'[privacy] unit = "group", group = "{CUSTOMER}"',
            )
        return replace(self, histories="customer")

    def scoring(self) -> BinaryScores:
        return BinaryScores()

    def split(self, examples: Examples, seed: int, folds: int, fold: int) -> tuple[IntArray, IntArray]:
        """The past trains, the future tests, with the label delay between them; whatever the seed."""
        del seed
        time_s = examples.x[:, 0]
        order = np.argsort(time_s, kind="stable").astype(np.int64)
        past, future = time_ordered_fold(len(examples), folds, fold)
        train, test = order[past], order[future]
        if len(test):
            train = train[time_s[train] < time_s[test[0]] - LABEL_DELAY_DAYS * DAY_S]
        return train, test

    def prepare(self, train: Examples, test: Examples) -> ClientData:
        parts = (Batch(part.x[:, 1:].astype(np.float32), part.y) for part in (train, test))
        return ClientData(*parts)

    def model(self) -> torch.nn.Module:
        from fedlearn.models.tabular import RareEventNet

        return RareEventNet(len(FEATURE_NAMES), hidden=(64, 32), prior=PRIOR)

    def loss(self, outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        import torch
        from torch.nn.functional import binary_cross_entropy_with_logits

        target = y.to(outputs.dtype)
        entropy = binary_cross_entropy_with_logits(outputs[:, 0], target, reduction="none")
        if self.objective == "plain":
            return entropy
        weight = 1 + (self.fraud_weight - 1) * target
        if self.objective == "focal":
            weight = weight * (1 - torch.exp(-entropy)) ** FOCUS
        return weight * entropy

    def metrics(self, outputs: npt.NDArray[Any], y: npt.NDArray[Any]) -> dict[str, float]:
        return {"average_precision": average_precision(outputs[:, 0], y), "auc": roc_auc(outputs[:, 0], y)}


def _examples(
    payments: Transactions, customer: npt.NDArray[np.str_], names: npt.NDArray[np.str_] | None, *, apart: bool
) -> Examples:
    """Features bank by bank, each from its own payments alone; or customer by customer, where they are kept `apart`.

    Args:
        payments: in the order of time.
        customer: what each payment's customer is called.
        names: of the banks; None where there is one without a name.
        apart: a terminal is another one for each customer.
    """
    if apart:
        pairs = np.unique(np.column_stack([payments.customer, payments.terminal]), axis=0, return_inverse=True)[1]
        payments = replace(payments, terminal=pairs.reshape(-1).astype(np.int64))
    fraud = payments.scenario > 0
    order = np.argsort(payments.bank, kind="stable")
    parts = [np.empty((0, 1 + len(FEATURE_NAMES)))]
    for bank in np.unique(payments.bank):
        mine = np.flatnonzero(payments.bank == bank)
        own = Transactions(*(getattr(payments, name)[mine] for name in Transactions.__dataclass_fields__))
        parts.append(np.column_stack([own.time_s.astype(np.float64), payment_features(own, fraud[mine])]))
    client = None if names is None else names[payments.bank[order]]
    groups = customer[order] if apart else None
    return Examples(np.concatenate(parts), fraud[order].astype(np.int64), client, groups)


def _own_payments(path: Path, *, apart: bool) -> Examples:
    table = read_table(path, COLUMNS, keep_others=True)
    time_s = table.numbers("time_s", low=0, high=LATEST_S, required=True).astype(np.int64)
    customer, terminal = table.text(CUSTOMER), table.text("terminal")
    amount = table.numbers("amount", low=0, high=1e12, required=True)
    fraud = table.codes("fraud", ("0", "1"), required=True).astype(np.int64)
    banks = client_ids(table.text("bank"), merge=True) if "bank" in table else None
    names, bank = np.unique(banks, return_inverse=True) if banks is not None else (None, np.zeros(len(table), np.int64))
    fits = table.fits  # one payment more or less changes others' features: what does not fit goes first
    order = fits[np.argsort(time_s[fits], kind="stable")]
    payments = Transactions(
        time_s=time_s[order],
        customer=np.unique(customer, return_inverse=True)[1][order],
        terminal=np.unique(terminal, return_inverse=True)[1][order],
        amount=amount[order],
        scenario=fraud[order],
        bank=bank[order],
    )
    return replace(_examples(payments, customer[order], names, apart=apart), left_out=table.left_out)


TASK = FraudTask
