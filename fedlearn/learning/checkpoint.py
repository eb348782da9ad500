"""The server's state as bytes, and what of it a round's clients are sent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from fedlearn import arrays as named
from fedlearn.errors import StateError, UpdateError
from fedlearn.learning.strategy import ServerState
from fedlearn.release.keys import record_key

if TYPE_CHECKING:
    from fedlearn.arrays import Arrays

PARTS: Final = ("model", "shared", "memory")
BROADCAST: Final = PARTS[:2]


def broadcast_digest(state: ServerState) -> str:
    """SHA-256 of everything that a round's clients are sent, as hex."""
    return named.digest({f"{part}/{name}": a for part in BROADCAST for name, a in getattr(state, part).items()})


def state_to_bytes(state: ServerState) -> bytes:
    """The state as safetensors bytes; equal states give equal bytes."""
    flat = {f"{part}/{name}": array for part in PARTS for name, array in getattr(state, part).items()}
    return named.to_bytes({**flat, "round": np.array(state.round, dtype=np.int64)})


def model_in(data: bytes) -> bytes:
    """The model alone, as safetensors bytes, of a state's bytes."""
    flat = named.from_bytes(data)
    prefix = f"{PARTS[0]}/"
    return named.to_bytes({name.removeprefix(prefix): a for name, a in flat.items() if name.startswith(prefix)})


def checkpoint_key(run: str) -> str:
    """Where a run's journal has the state after its last committed round."""
    return record_key("checkpoint", run)


def state_from_bytes(data: bytes, initial: Arrays) -> ServerState:
    """A state back from its bytes, with the model's arrays in the order of `initial`.

    Raises:
        StateError: the bytes hold another model.
    """
    flat = named.from_bytes(data)
    parts = {
        part: {name.removeprefix(f"{part}/"): a for name, a in flat.items() if name.startswith(f"{part}/")}
        for part in PARTS
    }
    try:
        named.check_same(parts["model"], named.specs_of(initial), what="checkpoint")
    except UpdateError as error:
        raise StateError(error.message, hint="another version of the task made it") from None
    model = {name: parts["model"][name] for name in initial}
    return ServerState(model, parts["shared"], parts["memory"], int(flat["round"]))
