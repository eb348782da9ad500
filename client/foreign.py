"""A site that runs somebody else's Flower App."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Final

from flwr.app import ConfigRecord

from client.compute import compute
from fedlearn.app import RUN_CONFIG

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flwr.app import Message

    from client.crew import Crew

FOREIGN_STATES: Final = 16
"""Runs of a foreign app whose memory is kept."""


class ForeignSite:
    """Answers messages of somebody else's Flower App: no gate, and memory that ends with this process.

    Args:
        crew: where the app runs.
        node_config: what the app is told of this site.
        run_config: the app's own defaults, under what the coordinator says of a run.
    """

    def __init__(self, crew: Crew, node_config: Mapping[str, Any], run_config: Mapping[str, Any] | None = None) -> None:
        self._crew, self._node_config, self._run_config = crew, dict(node_config), dict(run_config or {})
        self._states: OrderedDict[int, bytes] = OrderedDict()

    async def handle(self, message: Message) -> Message:
        run = message.metadata.run_id
        told = message.content.pop(RUN_CONFIG, None) if message.has_content() else None
        config = self._run_config | (dict(told) if isinstance(told, ConfigRecord) else {})
        state = self._states.get(run)
        reply, state = await compute(self._crew, message, str(run), state, self._node_config, config)
        if state is not None:
            self._states[run] = state
            self._states.move_to_end(run)
            while len(self._states) > FOREIGN_STATES:
                self._states.popitem(last=False)
        return reply
