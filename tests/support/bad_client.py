"""A site that breaks the rules, as a process: fedlearn's own ClientApp, whose updates are spoilt before they leave.

python -m tests.support.bad_client SERVER TLS_DIR nan|shape|size
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import numpy as np
from flwr.app import Context, Message, RecordDict

from fedlearn.app import load_app
from fedlearn.learning import messages
from fedlearn.link import LinkClient, TlsBundle


def spoil(content: RecordDict, how: str) -> RecordDict:
    """An update's content made bad."""
    arrays = dict(messages.from_record(content, "private.delta"))
    name = next(iter(arrays))
    if how == "nan":
        arrays[name] = np.full_like(arrays[name], np.nan)
    elif how == "shape":
        arrays[name] = np.zeros((3, 3), dtype=arrays[name].dtype)
    else:
        arrays[name] = np.full_like(arrays[name], 1e30)
    content["private.delta"] = messages.to_record(arrays)
    return content


async def main(server: str, tls: str, how: str) -> None:
    bundle = TlsBundle.load(Path(tls))
    app = load_app().client_app
    states: dict[int, RecordDict] = {}

    async def answer(message: Message) -> Message:
        run = message.metadata.run_id
        config = {"client-id": bundle.identity.name, "device": "cpu"}
        context = Context(run, message.metadata.dst_node_id, config, states.setdefault(run, RecordDict()), {})
        reply = await asyncio.to_thread(app, message, context)
        if message.metadata.message_type == "train":
            return Message(spoil(reply.content, how), reply_to=message)
        return reply

    await LinkClient(server, bundle, answer).run()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
