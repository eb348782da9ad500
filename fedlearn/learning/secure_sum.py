"""Sums that are opened and not seen before: what the round machine adds to, and what a federation reads of it in the end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final, Protocol

import numpy as np

from fedlearn.errors import LocalProtocolError
from fedlearn.events import SumOpened
from fedlearn.secagg.breach import Breach, SecureAggregationError
from fedlearn.secagg.graph import CLIENTS_LEAST
from fedlearn.secagg.hooks import MaskedAttempt

if TYPE_CHECKING:
    import numpy.typing as npt

    from fedlearn.arrays import Arrays
    from fedlearn.learning.backend import Failed, Said, Work
    from fedlearn.learning.update import Aggregate
    from fedlearn.learning.vectors import Frame, Vectors
    from fedlearn.release.coordinator import RoundMachine
    from fedlearn.release.keys import ReleaseKey
    from fedlearn.secagg.quantize import Decoded
    from fedlearn.secagg.server import ServerRound


SAMPLE: Final = 64
"""Numbers of a vector, and of a mean, that an event shows."""


class SecureSum(Protocol):
    """The sum of one attempt: the round machine's accumulator and its masking in one, and what is read of it in the end."""

    def add(self, client: str, payload: bytes, /) -> None: ...
    def requests(self, key: ReleaseKey, roster: tuple[str, ...], survivors: tuple[str, ...]) -> Mapping[str, bytes]: ...
    def answer(self, client: str, answer: bytes) -> None: ...
    def ready(self) -> bool: ...
    def unmask(self, total: SecureSum, /) -> None: ...

    @property
    def clients(self) -> int:
        """How many vectors are in it."""
        ...

    @property
    def decoded(self) -> Decoded:
        """The open sum."""
        ...

    @property
    def surplus_keys(self) -> Sequence[bytes]:
        """Keys of surplus noise that were opened with it."""
        ...


@dataclass(frozen=True)
class Seen:
    """A sample of one client's masked vector, as it came.

    Args:
        client: whose.
        elements: the first `SAMPLE` of it, of the ring.
    """

    client: str
    elements: tuple[int, ...]


class SecureRounds(ABC):
    """What a federation does with masked updates in place of plain ones.

    Args:
        vectors: of the study.
    """

    least: ClassVar[int] = CLIENTS_LEAST
    """Fewer clients cannot be masked from each other."""

    def __init__(self, vectors: Vectors) -> None:
        self.vectors: Final = vectors
        self.seen: Seen | None = None

    @abstractmethod
    def new_sum(self) -> SecureSum:
        """An empty sum for the next attempt; the one before is forgotten."""

    @abstractmethod
    def train(self, machine: RoundMachine[bytes, SecureSum], work: Work) -> Iterator[Said | Failed]:
        """Vectors, for the machine to take; or the attempt is void."""

    def open(self, machine: RoundMachine[bytes, SecureSum], work: Work) -> None:  # noqa: B027  # nothing to do without masks
        """Bring a machine whose survivors stand to the sum; or the attempt is void."""

    def event(self, run: str, round_: int, mean: Arrays) -> SumOpened | None:
        """What people are shown of the sum that was opened last; None where nothing was masked."""
        if self.seen is None:
            return None
        flat = np.concatenate([np.ravel(array) for array in mean.values()])
        bits = self.vectors.plan.encoding.ring_bits
        return SumOpened(run, round_, self.seen.client, bits, self.seen.elements, tuple(flat[:SAMPLE].tolist()))

    def opened(self, sum_: SecureSum, round_: int, shared: Arrays) -> OpenSum:
        """What can be read of a round's sum, given what was broadcast beside the model."""
        return OpenSum(self.vectors, sum_, self.vectors.frame(round_, shared))


class OpenSum:
    """A secure sum that is open: what is read of it as of a `SumCollector`.

    Args:
        vectors: of the study.
        sum_: the machine's.
        frame: what its vectors are measured in.
    """

    def __init__(self, vectors: Vectors, sum_: SecureSum, frame: Frame) -> None:
        self._vectors, self._sum, self._frame = vectors, sum_, frame

    @property
    def clients(self) -> int:
        """How many updates are in it."""
        return self._sum.clients

    @property
    def rounding_l2(self) -> float:
        """Nothing: `Vectors.clip_bound` has made up for it."""
        return 0.0

    def totals(self) -> Mapping[str, Mapping[str, npt.NDArray[np.float64]]]:
        """The exact sum of what the clients encoded, by release."""
        return self._vectors.totals(self._sum.decoded, self._frame, self._sum.surplus_keys)

    def aggregate(self, population: int) -> Aggregate:
        """The weighted means.

        Raises:
            UpdateError: it cannot be a sum of encoded updates.
        """
        opened, keys = self._sum.decoded, self._sum.surplus_keys
        return self._vectors.aggregate(opened, self._sum.clients, population, self._frame, keys)


class MaskedSum:
    """The sum of one attempt; usable once the attempt's keys are there."""

    def __init__(self) -> None:
        self._attempt: MaskedAttempt | None = None

    def attach(self, server: ServerRound) -> None:
        """The keys are there: from now on `server` takes masked vectors."""
        self._attempt = MaskedAttempt(server)

    def add(self, client: str, payload: bytes) -> None:
        self._here.add(client, payload)

    def requests(self, key: ReleaseKey, roster: tuple[str, ...], survivors: tuple[str, ...]) -> Mapping[str, bytes]:
        if self._attempt is None:
            raise SecureAggregationError(Breach.BELOW_THRESHOLD, "no client shared keys")
        return self._attempt.requests(key, roster, survivors)

    @property
    def agrees(self) -> bool:
        """True when survivors have to agree before they open."""
        return self._here.agrees

    def agree(self, client: str, answer: bytes) -> None:
        """See `MaskedAttempt.agree`, as the next two."""
        self._here.agree(client, answer)

    def agreed(self) -> tuple[dict[str, bytes], bytes]:
        return self._here.agreed()

    def agreed_before(self, record: bytes) -> dict[str, bytes]:
        return self._here.agreed_before(record)

    def answer(self, client: str, answer: bytes) -> None:
        self._here.answer(client, answer)

    def ready(self) -> bool:
        return self._here.ready()

    def unmask(self, total: SecureSum) -> None:
        assert total is self
        self._here.unmask(self._here)

    @property
    def clients(self) -> int:
        return self._here.clients

    @property
    def decoded(self) -> Decoded:
        return self._here.total

    @property
    def surplus_keys(self) -> Sequence[bytes]:
        return self._here.surplus_keys

    @property
    def _here(self) -> MaskedAttempt:
        if self._attempt is None:
            raise LocalProtocolError("secure aggregation: the attempt has no keys yet")
        return self._attempt
