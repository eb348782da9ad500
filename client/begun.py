"""Trainings that begin with a masked round's key shares: what comes out waits here, uncharged and unsent, until it is asked for.

The release of an update is begun when SHARE brings the model: the gate grants it, the worker trains, and what it answers waits. TRAIN brings what the others sealed
for this site; only then is the update masked, committed with its charge, and sent. A training that nobody asks for is given up, and with it its reservation.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from client.masking import RUNS
from fedlearn.errors import RemoteProtocolError

if TYPE_CHECKING:
    from collections.abc import Callable

    from flwr.app import RecordDict

    from client.outbox import Job, Outbox
    from fedlearn.release.keys import AttemptId, ReleaseKey
    from fedlearn.release.records import Reserved

MOST_WAITING: Final = RUNS
"""Trainings at a time, one a run: as many as there are runs whose keys are held. The one that began first is given up for another."""


class Training:
    """One update on its way, from its reservation to its commit.

    Args:
        outbox: releases it.
        job: makes it, without masks.
        masked: puts an update that may leave under its masks, given what the others sealed for this site.
        patience_s: how long it waits when nobody asks for it.
        admitted: called when the gate has granted it.
        ended: called when it cannot be asked for any more.
    """

    def __init__(
        self,
        outbox: Outbox,
        job: Job,
        masked: Callable[[RecordDict, bytes], RecordDict],
        patience_s: float,
        admitted: Callable[[Training], None],
        ended: Callable[[Training], None],
    ) -> None:
        self.key: Final = job.key
        self._job, self._masked, self._patience_s = job, masked, patience_s
        self._on_admitted, self._on_ended = admitted, ended
        loop = asyncio.get_running_loop()
        self._admitted: asyncio.Future[None] = loop.create_future()
        self._asked, self._asking, self._sealed = asyncio.Event(), 0, b""
        self._timer = loop.call_later(patience_s, self.give_up)
        self._task = asyncio.create_task(
            outbox.released(replace(job, compute=self._compute, seal=self._seal)), name="training"
        )
        self._task.add_done_callback(self._done)

    @property
    def failed(self) -> bool:
        """True when it ended without an update."""
        return self._task.done() and (self._task.cancelled() or self._task.exception() is not None)

    async def admitted(self) -> None:
        """Returns when the gate has granted it, or had its bytes already.

        Raises:
            FedlearnError: why it did not.
        """
        await asyncio.shield(self._admitted)

    async def finished(self, sealed: bytes) -> bytes:
        """The committed bytes. When nobody waits for them any more, they are not sealed, unless that has begun.

        Args:
            sealed: what the others sealed for this site, which its keys of the attempt have accepted.

        Raises:
            FedlearnError: why there are none.
        """
        self._sealed = sealed
        self._asking += 1
        self._timer.cancel()
        self._asked.set()
        try:
            await asyncio.wait({self._task})  # not awaited: a training that was given up is no cancellation of who asks
        finally:
            self._asking -= 1
            if not self._asking:
                self._asked.clear()
                self.wait_on()
        if self._task.cancelled():
            raise self._given_up()
        return self._task.result()

    def wait_on(self) -> None:
        """Wait as long again from now on, unless somebody asks or it is over."""
        self._timer.cancel()
        if self._task.done():
            self._end()
        elif not self._asking:
            self._timer = asyncio.get_running_loop().call_later(self._patience_s, self.give_up)

    def give_up(self) -> None:
        """Nobody will ask: the worker is let go, and the reservation given back. What is being sealed goes through to its commit."""
        self._task.cancel()
        self._end()

    async def _compute(self, reserved: Reserved) -> tuple[RecordDict, bytes | None]:
        self._on_admitted(self)
        if not self._admitted.done():
            self._admitted.set_result(None)
        found = await self._job.compute(reserved)
        await self._asked.wait()
        return found

    def _seal(self, content: RecordDict) -> RecordDict:
        return self._masked(self._job.seal(content), self._sealed)

    def _done(self, task: asyncio.Task[bytes]) -> None:
        error = self._given_up() if task.cancelled() else task.exception()
        if error is None or task.cancelled() or not self._admitted.done():
            self._end()  # else whoever asks is told why it failed
        if self._admitted.done():
            return
        if error is None:
            self._admitted.set_result(None)
        else:
            self._admitted.set_exception(error)
            self._admitted.exception()  # told to whoever began it, if he still waits

    def _end(self) -> None:
        self._timer.cancel()
        self._on_ended(self)

    def _given_up(self) -> RemoteProtocolError:
        return RemoteProtocolError(
            f"{self.key}: its training was given up",
            hint="another attempt began, the run was closed, nobody asked for it in time, or too many runs wait",
        )


class Begun:
    """All trainings of a site that wait to be asked for.

    Args:
        outbox: releases them.
    """

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self._trainings: OrderedDict[ReleaseKey, Training] = OrderedDict()

    async def begin(self, job: Job, masked: Callable[[RecordDict, bytes], RecordDict], patience_s: float) -> Training:
        """Start one, unless it was before; returns once the gate has granted it. Arguments as of `Training`.

        Raises:
            FedlearnError: the gate refuses it, or it was given up meanwhile.
        """
        training = self._trainings.get(job.key)
        if training is None or training.failed:
            training = Training(self._outbox, job, masked, patience_s, self._make_way, self._ended)
            self._trainings[job.key] = training
        else:
            training.wait_on()
        await training.admitted()
        return training

    def get(self, key: ReleaseKey) -> Training | None:
        """One that was begun and is not over; or has failed, which it tells who asks."""
        return self._trainings.get(key)

    def overtaken(self, run: str, at: AttemptId) -> None:
        """A later attempt of a run was asked about: nobody will ask for an earlier one's."""
        self._give_up(lambda key: key.run == run and key.at < at)

    def closed(self, run: str) -> None:
        """Nothing of this run leaves any more."""
        self._give_up(lambda key: key.run == run)

    def close(self) -> None:
        """Give up all of them."""
        self._give_up(lambda _key: True)

    def _make_way(self, training: Training) -> None:
        """The gate has granted this one. It knew of no other of the run that could still be committed, or dropped its reservation."""
        self._give_up(lambda key: key.run == training.key.run and key != training.key)
        while len(self._trainings) > MOST_WAITING:
            next(iter(self._trainings.values())).give_up()

    def _give_up(self, which: Callable[[ReleaseKey], bool]) -> None:
        for key in [key for key in self._trainings if which(key)]:
            self._trainings[key].give_up()

    def _ended(self, training: Training) -> None:
        if self._trainings.get(training.key) is training:
            del self._trainings[training.key]
