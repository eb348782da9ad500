"""`--inline`: one client of one round in this process, with nothing between a debugger and what its code raises."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fedlearn.errors import DataError, StateError
from fedlearn.learning.averages import l2_norm
from fedlearn.learning.backend import Work
from fedlearn.learning.checkpoint import broadcast_digest, state_from_bytes
from fedlearn.learning.update import DELTA
from fedlearn.release.journal import DictJournal
from fedlearn.release.keys import record_key
from fedlearn.release.round_log import RoundLog
from fedlearn.release.sqlite import SqliteJournal
from fedlearn.simulation.states import ClientStates
from fedlearn.simulation.workspace import JOURNAL

if TYPE_CHECKING:
    from fedlearn.learning.strategy import ServerState
    from fedlearn.release.journal import Journal
    from fedlearn.simulation.prepare import Ready

_DEADLINE_S: Final = 0.0
"""Nobody else is waited for."""


class Inline:
    """One client's work on the model of one round.

    Args:
        ready: the study and its data.
        client: its id.
        number: the round; None for the first one, or the next one of `folder`.
        folder: a run folder, whose last committed model saves running the rounds before again.

    Raises:
        DataError: there is no such client.
        StateError: the run folder cannot be read.
    """

    def __init__(self, ready: Ready, client: str, number: int | None, folder: Path | str | None) -> None:
        if client not in ready.population.rows:
            near = difflib.get_close_matches(client, list(ready.population.client_ids), n=1)
            raise DataError(
                f"client {client!r} is not one of this study's {len(ready.population.rows)} clients",
                hint=f"did you mean {near[0]!r}?" if near else "",
            )
        self._ready, self.client = ready, client
        self._journal: Journal | None = None if folder is None else SqliteJournal(Path(folder) / JOURNAL)
        done = 0 if self._journal is None else self._state(self._journal).round
        self.round = number if number is not None else done + 1
        self.to_replay = 0 if done == self.round - 1 else self.round - 1
        self._work: Work | None = None

    @property
    def training_rows(self) -> int:
        """How many rows the client trains on."""
        return len(self._ready.population.client(self.client).train)

    @property
    def test_rows(self) -> int:
        """How many rows it is scored on."""
        return len(self._ready.population.client(self.client).test)

    def prepare(self) -> None:
        """Make or read the model that the round starts from.

        Raises:
            FedlearnError: the rounds before cannot be run.
        """
        from fedlearn.simulation.run import Manner, run_ready

        if self.to_replay:
            self._close()
            self._journal = DictJournal()
            before = self._ready.study.with_overrides([f"rounds={self.to_replay}", "evaluate.every=0"])
            run_ready(replace(self._ready, study=before), Manner(told=lambda failure: None), self._journal)  # noqa: ARG005  # this client is looked at below, the others another time
        journal = self._journal if self._journal is not None else DictJournal()
        state = self._state(journal)
        if state.round != self.round - 1:
            raise StateError(f"round {self.round}: the model before it is that of round {state.round}")
        bases = RoundLog(journal, self._ready.study.name).bases
        self._journal = journal
        self._work = Work(
            self.round,
            1,
            (self.client,),
            state.model,
            state.shared,
            broadcast_digest(state),
            {self.client: bases[self.client]} if self.client in bases else {},
            _DEADLINE_S,
        )

    def run(self) -> Iterator[str]:
        """Evaluate the round's model and train on it, telling in lines what came of it; raises whatever the client's code raises."""
        import torch

        from fedlearn.learning.device import resolve_device
        from fedlearn.simulation.sequential import SequentialBackend

        assert self._work is not None, "prepare first"
        study, work = self._ready.study, self._work
        memories = ClientStates(self._journal)
        state = memories.peek(self.client, work.base.get(self.client)) if self._ready.strategy.stateful else {}
        self._close()  # a debugger may stay open for long, and the run folder is somebody's to resume
        torch.set_num_threads(study.runtime.threads)
        device = resolve_device(self._ready.setting.device)
        backend = SequentialBackend(study, self._ready.population, self._ready.strategy, device)
        yield f"before   {_metrics(backend.score_one(work, self.client, state).metrics)}"
        result = backend.fit_one(work, self.client, state)
        facts, norm = result.update.facts, l2_norm(result.update.private[DELTA])
        yield f"trained  {_metrics(facts)}, update norm {norm:.4g}"

    def _state(self, journal: Journal) -> ServerState:
        from fedlearn.learning.local import initial_weights

        study = self._ready.study
        initial = initial_weights(self._ready.population.task, study)
        data = journal.get(record_key("checkpoint", study.name))
        return self._ready.strategy.server_init(initial) if data is None else state_from_bytes(data, initial)

    def _close(self) -> None:
        if self._journal is not None:
            self._journal.close()
            self._journal = None


def _metrics(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items()) or "nothing to score"
