"""What a foreign app's messages need beside themselves: the run's config, which Flower's runtime would tell each SuperNode."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from flwr.app import ConfigRecord, Message

from fedlearn.app import RUN_CONFIG

if TYPE_CHECKING:
    from fedlearn.link.grid import LinkGrid


def send_run_config(grid: LinkGrid, run_config: Mapping[str, Any]) -> None:
    """Let every message of a grid carry the run's config, from here to the site's agent, which takes it out again."""
    record, push = ConfigRecord(dict(run_config)), grid.push_messages

    def push_messages(messages: Iterable[Message]) -> list[str]:
        contents = []
        sent = list(messages)
        for message in sent:
            if message.has_content():
                message.content[RUN_CONFIG] = record
                contents.append(message.content)
        try:
            return push(sent)
        finally:
            # The app's own records are as they were.
            for content in contents:
                content.pop(RUN_CONFIG, None)

    grid.push_messages = push_messages  # type: ignore[method-assign]  # of this one grid; its other methods call it
