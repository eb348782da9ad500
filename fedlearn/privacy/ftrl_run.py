"""One run under DP-FTRL at the coordinator: who may be asked again, and the noise of each round, whatever crashes.

Two things must outlive a crash. *Who was asked when*: every client of a committed round's roster, whether or not it answered, so that what a
client holds decides nothing about who is asked. It is written in the round's own transaction. *The noise*: each round's part of it follows
from one secret key, durable before the first round, so a resumed run makes the same noise again and no round is ever given two. The key
is erased in the transaction of the last round.

Whoever reads the coordinator's folder while the run lasts can take the noise off; the folder is its owner's alone (0700), as the model in it is.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Final

import numpy as np

from fedlearn.errors import RunFailedError, StateError
from fedlearn.learning.rows import in_order
from fedlearn.privacy.ftrl import CorrelatedNoise
from fedlearn.privacy.mechanisms import Chance, seeded_chance
from fedlearn.privacy.plan import PrivacyPlan, Spaced
from fedlearn.release.keys import record_key

if TYPE_CHECKING:
    from fedlearn.arrays import Array, Arrays
    from fedlearn.learning.rows import SortedIds
    from fedlearn.privacy.ftrl import FloatArray
    from fedlearn.release.journal import Changes, Journal

KEY_BYTES: Final = 32
_DOMAIN: Final = b"fedlearn/ftrl/v1"
_KEY: Final = "noise-key"
_PLAN: Final = "noise-plan"
_ASKED: Final = "asked"


class FtrlRun:
    """What correlated noise needs to remember.

    Args:
        plan: with a matrix.
        journal: of the run, durable; what is there of an earlier process is read.
        run: the run's name.
        seed: of the study where all chance follows from it; None for a secret key.

    Raises:
        StateError: the journal holds a run under another plan, or has lost the key of one that goes on.
    """

    def __init__(self, plan: PrivacyPlan, journal: Journal, run: str, seed: int | None) -> None:
        assert isinstance(plan.sampling, Spaced)
        self._plan, self._sampling, self._run, self._seed = plan, plan.sampling, run, seed
        self._key = journal.get(record_key(_KEY, run))
        self._text = json.dumps(asdict(plan.ftrl), sort_keys=True).encode()
        begun = journal.get(record_key(_PLAN, run))
        if begun is not None and begun != self._text:
            raise StateError(
                f"run {run}: it was begun under the DP-FTRL plan {begun.decode()}, this one is {self._text.decode()}",
                hint="correlated noise is for the rounds and numbers that it was planned for: start a new run",
            )
        self._begun = begun is not None
        self._asked: dict[str, tuple[int, int]] = {}  # client: how often, when last
        for _, data in journal.scan(record_key(_ASKED, run, "")):
            client, count, last = json.loads(data)
            self._asked[client] = count, last
        over = any(last == plan.rounds for _, last in self._asked.values())
        if self._begun and seed is None and self._key is None and not over:
            raise StateError(
                f"run {run}: the key of its noise is not in the journal",
                hint="restore the coordinator's folder, or start a new run: other noise would be no part of this one's plan",
            )
        self._noise: CorrelatedNoise | None = None
        self._made: tuple[int, FloatArray] = (0, np.zeros(0))

    def opening(self) -> Changes:
        """What must be durable before the first round."""
        if not self._begun and self._seed is None:
            self._key = secrets.token_bytes(KEY_BYTES)
        self._begun = True
        changes: dict[str, bytes | None] = {record_key(_PLAN, self._run): self._text}
        if self._key is not None:
            changes[record_key(_KEY, self._run)] = self._key
        return changes

    def closing(self, round_number: int, roster: Iterable[str]) -> Changes:
        """What a round's own transaction must hold; the round counts as asked from here on."""
        changes: dict[str, bytes | None] = {}
        for client in roster:
            count = self._asked.get(client, (0, 0))[0] + 1
            self._asked[client] = count, round_number
            place = record_key(_ASKED, self._run, client)
            changes[place] = json.dumps([client, count, round_number]).encode()
        if round_number == self._plan.rounds:
            changes[record_key(_KEY, self._run)] = None
        return changes

    def pick(self, clients: Sequence[str], round_number: int, chance: Chance) -> tuple[str, ...]:
        """Who is asked: of those who may be, those asked least often, and among equals by chance. Sorted.

        Args:
            clients: who is here.
            round_number: of the round.
            chance: breaks ties; nothing private hangs on it.

        Raises:
            RunFailedError: nobody may be asked.
        """
        ordered = in_order(clients)
        found = self._never_asked(ordered, chance)
        if found is not None:
            return found
        may = [client for client in ordered if self._may_be_asked(client, round_number)]
        if not may:
            raise RunFailedError(
                f"round {round_number}: none of the {len(clients)} clients here may be asked: each was less than "
                f"{self._sampling.separation} rounds ago, or {self._sampling.most} times already",
                hint="start more clients",
            )
        counts = np.array([self._asked.get(client, (0, 0))[0] for client in may])
        order = np.lexsort((chance.uniform(len(may)), counts))
        return tuple(may[int(i)] for i in np.sort(order[: self._sampling.size]))

    def _never_asked(self, ordered: SortedIds, chance: Chance) -> tuple[str, ...] | None:
        """A cohort of those who were never asked, without looking at everybody, where most of a large population were not; else None."""
        size, population = self._sampling.size, len(ordered)
        if 2 * (len(self._asked) + size) > population:
            return None
        found: set[int] = set()
        while len(found) < size:  # at least every second one drawn is new and was never asked
            drawn = (chance.uniform(2 * size) * population).astype(np.int64)
            for place in drawn.tolist():
                if len(found) < size and ordered.at(place) not in self._asked:
                    found.add(place)
        return tuple(ordered.at(place) for place in sorted(found))

    def means(self, round_number: int, sums: Mapping[str, Arrays], stretch: float = 1.0) -> dict[str, dict[str, Array]]:
        """The round's sums with its noise, divided by the plan's number of clients; the same at every call.

        Args:
            round_number: of the round.
            sums: release name to named arrays: exact sums.
            stretch: of the noise, for contributions that are so much longer than the clip; the same in every round.
        """
        size = sum(array.size for arrays in sums.values() for array in arrays.values())
        noise = self._noise_of(round_number, size) * stretch
        means: dict[str, dict[str, Array]] = {}
        first = 0
        for name, arrays in sums.items():
            means[name] = {}
            for key, array in arrays.items():
                part = noise[first : first + array.size].reshape(array.shape)
                means[name][key] = (np.asarray(array, dtype=np.float64) + part) / self._sampling.size
                first += array.size
        return means

    def _may_be_asked(self, client: str, round_number: int) -> bool:
        count, last = self._asked.get(client, (0, 0))
        if count == 0:
            return True
        most = self._sampling.most
        return round_number - last >= self._sampling.separation and (most is None or count < most)

    def _noise_of(self, round_number: int, size: int) -> FloatArray:
        """A round's noise. After a crash, and for an earlier round, from the first round on again."""
        made, noise = self._made
        if made != round_number:
            if self._noise is None or made > round_number:
                self._noise, made = CorrelatedNoise(self._plan.ftrl, size, self._chance_of), 0
            for _ in range(round_number - made):
                noise = self._noise.next()
            self._made = round_number, noise
        return noise

    def _chance_of(self, round_number: int) -> Chance:
        if self._seed is not None:
            return seeded_chance(self._seed, "ftrl", round_number)
        assert self._key is not None, "it is there from the first round to the last"
        message = _DOMAIN + b"/%d/" % round_number + self._run.encode()
        return Chance(hmac.digest(self._key, message, hashlib.sha256), private=True)
