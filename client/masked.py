"""What a site does with the messages of a masked round: keys and shares, the update under its masks, and what opens the sum.

    SHARE (brings the model) -> shares, and training begins    TRAIN (what the others sealed) -> the update    [AGREE ->] UNMASK

An update waits in `client.begun` between SHARE and TRAIN. A server that sends the model with TRAIN, as on stock Flower, has it trained on then.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from client import records
from client.begun import Begun
from client.guard import is_noisy
from client.outbox import Job, base_of, key_of, no_work, refusal
from fedlearn.errors import RemoteProtocolError
from fedlearn.learning import messages
from fedlearn.learning.backend import Exchange
from fedlearn.link import flower
from fedlearn.release.keys import AGREE, TRAIN, UNMASK, AttemptId

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from flwr.app import Message, RecordDict

    from client.begun import Training
    from client.guard import Guard
    from client.masking import Masks
    from client.outbox import Outbox
    from fedlearn.learning.messages import Request
    from fedlearn.release.records import Reserved
    from fedlearn.release.site import SiteGate

    TrainingOf = Callable[[Message, Request, Guard | None], Awaitable[tuple[Job, Request]]]

DEADLINES: Final = 2
"""Of the study: so many a training waits for TRAIN. The server waits up to one for the other sites' shares, and TRAIN is on its way only then."""


class MaskedReleases:
    """Masked rounds at one site.

    Args:
        gate: the release path's.
        outbox: over that gate.
        training: makes the release of an update, before masks, out of a TRAIN with its arrays; and the request with them.
    """

    def __init__(self, gate: SiteGate, outbox: Outbox, training: TrainingOf) -> None:
        self.begun: Final = Begun(outbox)
        self._gate, self._outbox, self._training = gate, outbox, training

    async def answer(self, message: Message, request: Request, masks: Masks, guard: Guard | None) -> RecordDict:
        """The answer to CHECK_IN, REVEAL, SHARE, TRAIN, AGREE or UNMASK.

        Raises:
            FedlearnError: it is refused, or failed.
        """
        if request.exchange is Exchange.TRAIN:
            content = records.unpack(await self._update(message, request, masks, guard))
            return messages.with_entry(content, await asyncio.to_thread(masks.next_check_in, request))
        if request.exchange in {Exchange.AGREE, Exchange.UNMASK}:
            return records.unpack(await self._once(request, masks))
        self.begun.overtaken(request.run, AttemptId(request.round, request.attempt))
        if request.exchange is Exchange.SHARE and messages.brings_model(message.content):
            return await self._shared(message, request, masks, guard)
        await self._check_open(request, guard)
        return await asyncio.to_thread(masks.answer, request)

    async def _shared(self, message: Message, request: Request, masks: Masks, guard: Guard | None) -> RecordDict:
        """Shares, while training begins. What refuses the update refuses these, so that nobody counts on it."""
        work = flower.as_type(message, messages.MESSAGE_TYPES[Exchange.TRAIN], messages.as_training(message.content))
        training = await self._begin(work, request, masks, guard)
        try:
            return await asyncio.to_thread(masks.answer, request)
        except Exception:
            training.give_up()  # without keys nothing can come of it
            raise

    async def _update(self, message: Message, request: Request, masks: Masks, guard: Guard | None) -> bytes:
        """The update under its masks. Its training began with SHARE, or begins now where TRAIN brings the model."""
        key = key_of(request, TRAIN)
        if messages.brings_model(message.content):
            await self._begin(message, request, masks, guard)
        training = self.begun.get(key)
        if training is None:  # it may have been committed
            job = Job(key, lambda: self._gate.reserve(key, base=base_of(request)), _not_begun, lambda content: content)
            return await self._outbox.released(job)
        try:
            await asyncio.to_thread(masks.expect, request)
        except Exception:
            training.give_up()
            raise
        return await training.finished(request.body)

    async def _once(self, request: Request, masks: Masks) -> bytes:
        """Who is in a sum is signed, and it is opened, through the gate, for one set of survivors."""
        agrees = request.exchange is Exchange.AGREE
        key, answer = (key_of(request, AGREE), masks.agreement) if agrees else (key_of(request, UNMASK), masks.opening)
        job = Job(
            key,
            lambda: self._gate.reserve(key, base=base_of(request), request=request.body),
            no_work,
            lambda _content: messages.encode_said(answer(request)),
        )
        return await self._outbox.released(job)

    async def _check_open(self, request: Request, guard: Guard | None) -> None:
        """Who gives no update of this round any more shares no keys for one."""
        if is_noisy(guard):
            return
        at = AttemptId(request.round, request.attempt)
        if (refused := await self._outbox.at_gate(self._gate.reopened, request.run, at)) is not None:
            raise refusal(refused)

    async def _begin(self, message: Message, request: Request, masks: Masks, guard: Guard | None) -> Training:
        """Begin the training that a message brings the model for."""
        job, asked = await self._training(message, request, guard)

        def masked(content: RecordDict, sealed: bytes) -> RecordDict:
            return masks.masked(replace(asked, body=sealed), content)

        return await self.begun.begin(job, masked, DEADLINES * masks.study.runtime.deadline_s)


async def _not_begun(reserved: Reserved) -> tuple[RecordDict, bytes | None]:
    raise RemoteProtocolError(
        f"message: it brings no model, and no training of {reserved.key} began here",
        hint="the agent was restarted since it shared its keys, or gave the training up; the site takes part in the next attempt",
    )
