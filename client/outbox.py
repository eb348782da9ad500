"""A site's outbox: every release is computed once, committed with its charge, and sent from the committed bytes, whoever asks and whatever is cancelled."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from flwr.app import RecordDict

from client import records
from fedlearn.errors import PolicyRefusedError, RemoteProtocolError
from fedlearn.release.keys import EVALUATE, TRAIN, AttemptId, ReleaseKey
from fedlearn.release.records import Finished, InProgress, Refusal, Refused, Reserved

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from fedlearn.learning.messages import Request
    from fedlearn.release.site import SiteGate

log = logging.getLogger("fedlearn.client")
T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """One release, and how it is made.

    Args:
        key: its name.
        reserve: asks the gate.
        compute: the work, and the memory after it. May be cancelled when nobody waits any more.
        seal: what the work becomes before it may leave. Masks are used once, so from here on it goes through to the commit, waited for or not.
    """

    key: ReleaseKey
    reserve: Callable[[], Reserved | Finished | InProgress | Refused]
    compute: Callable[[Reserved], Awaitable[tuple[RecordDict, bytes | None]]]
    seal: Callable[[RecordDict], RecordDict]


class Outbox:
    """The gate as the handlers of messages use it.

    Args:
        gate: the release path's; calls to it do not overlap.
    """

    def __init__(self, gate: SiteGate) -> None:
        self._gate = gate
        self._gate_lock = asyncio.Lock()
        self._computing: dict[ReleaseKey, asyncio.Event] = {}
        self._running: set[asyncio.Task[Any]] = set()

    async def released(self, job: Job) -> bytes:
        """The committed bytes of a release: computed once, whoever asks how often."""
        key = job.key
        while (other := self._computing.get(key)) is not None:
            await other.wait()
        self._computing[key] = asyncio.Event()
        try:
            answer = await self.at_gate(job.reserve)
            if isinstance(answer, Finished):
                log.info("%s: sent again, %d bytes, computed once", key.at, len(answer.payload))
                self._computing.pop(key).set()
                return answer.payload
            content, state = await job.compute(_granted(key, answer))
        except BaseException:
            # Nothing was committed, so nothing can have left: the reservation goes back. Not awaited: this may be a cancellation.
            self._go_on(self._given_back(key))
            raise
        return await asyncio.shield(self._go_on(self._sealed(job, content, state)))

    async def _sealed(self, job: Job, content: RecordDict, state: bytes | None) -> bytes:
        key = job.key
        try:
            payload = await asyncio.to_thread(lambda: records.pack(job.seal(content)))
            finished = await self.at_gate(lambda: self._gate.commit(key, payload, state=state))
        except BaseException:
            self._go_on(self._given_back(key))
            raise
        self._computing.pop(key).set()
        if isinstance(finished, Refused):
            raise refusal(finished, key.exchange)
        log.info("run %s, %s: %s of %d bytes committed and released", key.run, key.at, key.exchange, len(payload))
        return finished.payload

    async def _given_back(self, key: ReleaseKey) -> None:
        await self.at_gate(self._gate.abandon, key)
        self._computing.pop(key).set()

    def _go_on(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Work that goes through to its end, waited for or not."""
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    async def at_gate(self, call: Callable[..., T], *args: Any) -> T:
        """One gate call at a time, in a thread: it waits for the disk. One whose caller is cancelled is not overtaken by the next."""
        return await asyncio.shield(self._go_on(self._alone_at_gate(call, *args)))

    async def _alone_at_gate(self, call: Callable[..., T], *args: Any) -> T:
        async with self._gate_lock:
            return await asyncio.to_thread(call, *args)


def key_of(request: Request, exchange: str) -> ReleaseKey:
    """The name of the release that a request asks for."""
    try:
        return ReleaseKey(request.run, request.round, request.attempt, exchange, request.model_digest)
    except ValueError as error:
        raise RemoteProtocolError(f"message: {error}") from None


def base_of(request: Request) -> AttemptId | None:
    """The last attempt that the server committed with this client in it, as a request names it."""
    return None if request.base is None else AttemptId(*request.base)


async def no_work(_reserved: Reserved) -> tuple[RecordDict, bytes | None]:
    """A release that needs no work of the app."""
    return RecordDict(), None


def _granted(key: ReleaseKey, answer: Reserved | InProgress | Refused) -> Reserved:
    if isinstance(answer, Refused):
        raise refusal(answer, key.exchange)
    assert isinstance(answer, Reserved), "whoever asks again waits for the first, and does not come here"
    return answer


def refusal(refused: Refused, exchange: str = TRAIN) -> PolicyRefusedError:
    """What the server is told of the gate's no to an exchange."""
    error = PolicyRefusedError(f"{refused.reason.value}: {refused.message}", hint=refused.hint)
    # Who cannot pay for an evaluation may still pay for an update.
    error.permanent = refused.reason.permanent and not (refused.reason is Refusal.BUDGET and exchange == EVALUATE)
    return error
