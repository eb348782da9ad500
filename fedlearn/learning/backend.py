"""Where client work is done: one interface for the sequential oracle, faster engines, our link and Flower."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from fedlearn.arrays import Arrays
from fedlearn.errors import FedlearnError
from fedlearn.learning.collect import PartialSum
from fedlearn.learning.update import Update


class Exchange(StrEnum):
    """What a message asks of a client."""

    DESCRIBE = "describe"
    TRAIN = "train"
    EVALUATE = "evaluate"
    CHECK_IN = "check-in"
    """Secure aggregation: fresh public keys for an attempt."""
    REVEAL = "reveal"
    """Secure aggregation above 200 clients: who takes part; answered with what orders the graph."""
    SHARE = "share"
    """Secure aggregation: who takes part, and above 200 clients the others' nonces; answered with shares of this client's secrets. On our link it brings the model,
    and training begins."""
    AGREE = "agree"
    """Secure aggregation, malicious profile or above 200 clients: whose vectors are in the sum; answered with a signature under just these."""
    UNMASK = "unmask"
    """Secure aggregation: whose vectors are in the sum, or who agreed on that; answered with what opens it."""
    CLOSE = "close"
    """The run is over: a site that was charged for all of it takes back what did not take place."""


Base = tuple[int, int]
"""(round, attempt) of the last update of a client that entered a committed sum; its state continues from there."""


@dataclass(frozen=True)
class Work:
    """One exchange with a cohort.

    Args:
        round: the round that the model belongs to, from 1; for an evaluation, the rounds committed so far.
        attempt: from 1; a void round is tried again under the next number.
        cohort: study client ids, sorted.
        model: global weights.
        shared: broadcast beside them.
        model_digest: of the model; it keys what is released for it.
        base: client id to its `Base`; absent for a client that never entered a sum.
        deadline_s: how long to wait for replies, from now.
    """

    round: int
    attempt: int
    cohort: tuple[str, ...]
    model: Arrays = field(repr=False)
    shared: Arrays = field(repr=False)
    model_digest: str
    base: Mapping[str, Base] = field(repr=False)
    deadline_s: float


@dataclass(frozen=True)
class Fitted:
    """A client's update arrived."""

    client: str
    update: Update


@dataclass(frozen=True)
class Summed:
    """The updates of several clients arrived as one weighted sum; only for linear strategies.

    Args:
        partial: the sum.
        facts: by client, what may leave beside it; the clients of the sum.
    """

    partial: PartialSum
    facts: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Scored:
    """A client's metrics arrived.

    Args:
        client: its id.
        metrics: by name; NaN where a metric is undefined on this client's test rows.
        examples: its test rows.
        cells: noisy sums in place of both, under a privacy plan; see `fedlearn.privacy.evaluation`.
    """

    client: str
    metrics: Mapping[str, float]
    examples: int
    cells: tuple[float, ...] = ()


@dataclass(frozen=True)
class Said:
    """A client's answer in secure aggregation arrived.

    Args:
        client: its id.
        body: what it says: a nonce, shares, a masked vector, an agreement, an opening. Empty in answer to CHECK_IN.
        entry: its check-in: for the attempt that was asked about, and with a masked vector for the first one of the next round.
    """

    client: str
    body: bytes = field(repr=False)
    entry: bytes = field(default=b"", repr=False)


@dataclass(frozen=True)
class Failed:
    """A client gave nothing in this exchange.

    Args:
        client: its id.
        reason: why, in a sentence.
        trace: of what its code raised, in a simulation; never sent by a site.
        virtual: True for one that a simulated environment took away, as the study asked.
        permanent: True for one that said, by a mark beside its reason, that it will answer nothing more of this run.
    """

    client: str
    reason: str
    trace: str = field(default="", repr=False)
    virtual: bool = False
    permanent: bool = False


def raised(client: str, error: Exception) -> Failed:
    """The reply for a client whose code raised, in this process."""
    reason = error.message if isinstance(error, FedlearnError) else f"{type(error).__name__}: {error}"
    return Failed(client, reason, "".join(traceback.format_exception(error)))


class Backend(Protocol):
    """Does the clients' work. Replies come in any order; each client of the cohort is in exactly one."""

    def clients(self, at_least: int = 0, timeout_s: float = 0.0) -> Sequence[str]:
        """Study client ids that could take part now, sorted.

        Args:
            at_least: wait until there are so many.
            timeout_s: but no longer than this.
        """
        ...

    def fit(self, work: Work) -> Iterator[Fitted | Summed | Failed]:
        """Local training on each client of the cohort."""
        ...

    def evaluate(self, work: Work) -> Iterator[Scored | Failed]:
        """Metrics on each client's test rows."""
        ...

    def close(self) -> None:
        """Free what the backend holds."""
        ...


class MaskedBackend(Protocol):
    """Speaks secure aggregation with clients."""

    def secure(
        self, exchange: Exchange, work: Work, bodies: Mapping[str, bytes], length: int
    ) -> Iterator[Said | Failed]:
        """One exchange; TRAIN is answered with a masked vector. Each client of the cohort is in exactly one reply.

        Args:
            exchange: CHECK_IN, REVEAL, SHARE, TRAIN, AGREE or UNMASK.
            work: the attempt; its model is sent once, with TRAIN or already with SHARE.
            bodies: by client, what it is told.
            length: coordinates of an update.
        """
        ...
