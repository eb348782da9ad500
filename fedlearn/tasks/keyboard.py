"""device/keyboard: the next character on a keyboard. Real chat messages, one client a user, train on the past, test on the future.

The vocabulary is a public constant, not learnt from anybody's text. The messages are unmoderated: nothing here prints them.
"""

from __future__ import annotations

import string
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from fedlearn.data.messages import OWN, PACKAGE, chitchat, read_messages
from fedlearn.data.partition import client_ids
from fedlearn.errors import DataError, UnsupportedError
from fedlearn.learning.folds import time_ordered_fold
from fedlearn.learning.metrics import accuracy
from fedlearn.learning.rows import IntArray
from fedlearn.learning.task import Batch, ClientData, Examples, LeftOut, Task, TaskCard
from fedlearn.privacy.scoring import ShareRight

if TYPE_CHECKING:
    import torch

CHARACTERS: Final = " \n" + string.ascii_letters + string.digits + ".,'?!\"-:;()*/"
"""The public vocabulary: 77 characters, 99.9 % of English chat. A new line ends a message."""

USER: Final = "user"
"""Of a .jsonl file: whose message it is."""
UNKNOWN: Final = len(CHARACTERS)
VOCABULARY: Final = len(CHARACTERS) + 1
_ID_OF: Final = {character: number for number, character in enumerate(CHARACTERS)}


def encode(text: str) -> npt.NDArray[np.uint8]:
    """Characters to token ids; what is not in the vocabulary becomes `UNKNOWN`."""
    return np.fromiter((_ID_OF.get(character, UNKNOWN) for character in text), np.uint8, len(text))


@dataclass(frozen=True)
class KeyboardTask(Task):
    """Next-character prediction by a small causal transformer or an LSTM.

    Args:
        architecture: "transformer" or "lstm".
        context: characters in a sequence.
        width: of the transformer's vectors, or of the LSTM's state.
        blocks: of the transformer, or layers of the LSTM.
        min_characters: users with fewer are left out.
        max_characters: only a user's first so many are used, so that no one user dominates.
        by_user: users are what a privacy plan protects; a file of one's own is then one client's, whatever users it names.
    """

    architecture: Literal["transformer", "lstm"] = "transformer"
    context: Annotated[int, Field(ge=8, le=1024)] = 64
    width: Annotated[int, Field(ge=8, multiple_of=4)] = 64
    blocks: Annotated[int, Field(ge=1)] = 2
    min_characters: Annotated[int, Field(ge=1)] = 2_000
    max_characters: Annotated[int, Field(ge=1)] = 20_000
    by_user: bool = False

    name: ClassVar[str] = "device/keyboard"
    keeps_rows: ClassVar[bool] = False
    card: ClassVar[TaskCard] = TaskCard(
        title="The next character on a keyboard",
        data="Chit-Chat: messages of a chat competition among students, Brigham Young University (package chitchat-dataset 0.9.0)",
        licence="MIT",
        synthetic=False,
        clients="one user; 463 by nature (those with 2,000 characters or more, of 1,315)",
        metric="top1",
        obtain='pip install "fedlearn[text]"',
        schema=(
            ".txt in UTF-8: one message a line, in the order of time",
            'or .jsonl: one object a line, "text" and perhaps "user" and "time"',
            "at least 2 sequences long (the option context, 64 characters)",
        ),
        package=PACKAGE,
    )

    def load(self, source: Path | None = None) -> Examples:
        messages = chitchat() if source is None else read_messages(source)
        none = np.empty((0, self.context), np.uint8)
        x, y, users = [none], [none], [np.empty(0, np.str_)]
        for user, texts in messages.items():
            # The length in characters of messages decides; the new line after each is ours.
            if sum(map(len, texts)) < self.min_characters and source is None:
                continue
            tokens = encode("\n".join(texts)[: self.max_characters])
            count = (len(tokens) - 1) // self.context
            x.append(tokens[: count * self.context].reshape(count, self.context))
            y.append(tokens[1 : count * self.context + 1].reshape(count, self.context))
            users.append(np.full(count, user))
        left_out = None
        if not sum(map(len, x)):
            error = DataError(
                f"{source or 'the data'}: no user has {self.context + 1} characters, the length of one sequence",
                hint="use more text, or a smaller context",
            )
            left_out = LeftOut(len(messages), error)
        nameless, owners = list(messages) == [OWN], np.concatenate(users)
        client = None if nameless or (self.by_user and source is not None) else client_ids(owners)
        groups = owners if self.by_user and not nameless else None
        return Examples(np.concatenate(x), np.concatenate(y), client, groups, left_out)

    def for_units(self, group: str = "") -> KeyboardTask:
        """Users, each cut into sequences by themselves. A message is no unit: one more moves the cuts of all that follow."""
        if group != USER:
            raise UnsupportedError(
                f"task {self.name!r}: sequences are cut from a user's messages in a row, so only whole users can be protected",
                hint=f'[privacy] unit = "group", group = "{USER}"; or unit = "client" where each client is a user',
            )
        return replace(self, by_user=True)

    def scoring(self) -> ShareRight:
        return ShareRight("top1")

    def split(self, examples: Examples, seed: int, folds: int, fold: int) -> tuple[IntArray, IntArray]:
        """The last 1/folds of the sequences test, whatever the seed: rows are in the order of time."""
        del seed
        return time_ordered_fold(len(examples), folds, fold)

    def prepare(self, train: Examples, test: Examples) -> ClientData:
        return ClientData(
            Batch(train.x.astype(np.int64), train.y.astype(np.int64)),
            Batch(test.x.astype(np.int64), test.y.astype(np.int64)),
        )

    def model(self) -> torch.nn.Module:
        if self.architecture == "lstm":
            from fedlearn.models.recurrent import RecurrentNet

            return RecurrentNet(VOCABULARY, embedding=32, width=self.width, layers=self.blocks)
        from fedlearn.models.transformer import CausalTransformer

        return CausalTransformer(VOCABULARY, self.context, self.width, heads=4, blocks=self.blocks)

    def loss(self, outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Mean over a sequence's places of the cross entropy, in nats."""
        from torch.nn.functional import cross_entropy

        return cross_entropy(outputs.transpose(1, 2), y, reduction="none").mean(dim=1)

    def metrics(self, outputs: npt.NDArray[Any], y: npt.NDArray[Any]) -> dict[str, float]:
        if not y.size:
            return {"top1": float("nan"), "perplexity": float("nan")}
        shifted = outputs.astype(np.float64) - outputs.max(axis=-1, keepdims=True)
        right = np.take_along_axis(shifted, y[..., None], axis=-1)[..., 0]
        nats = np.log(np.exp(shifted).sum(axis=-1)) - right
        return {"top1": accuracy(outputs.argmax(axis=-1), y), "perplexity": float(np.exp(nats.mean()))}


TASK = KeyboardTask
