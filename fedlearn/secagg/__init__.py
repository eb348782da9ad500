"""Secure aggregation: the coordinator learns the sum of the clients' updates and nothing else. docs/secure-aggregation.md explains it.

The protocol has no I/O: `ClientRound` and `ServerRound` take messages and return messages, `run_in_memory` runs all parties on one desk. A `Plan` says what a
study fixes, `Encoding` how an update becomes integers; noise in the sum (`noise`, `rotation`, `floor`, `surplus`) is put together by
`fedlearn.privacy.distributed`. What the other side does wrong ends in a `SecureAggregationError` that names a `Breach`.
"""

from fedlearn.secagg.breach import Breach, SecureAggregationError
from fedlearn.secagg.client import ClientRound, ClientState, Identity
from fedlearn.secagg.memory import run_in_memory
from fedlearn.secagg.messages import from_bytes, to_bytes
from fedlearn.secagg.plan import Plan, Profile, Terms
from fedlearn.secagg.primitives import KeyPair, SeededDraw, Suite, new_identity
from fedlearn.secagg.quantize import Decoded, Encoding
from fedlearn.secagg.server import ServerRound, Stage

__all__ = [
    "Breach",
    "ClientRound",
    "ClientState",
    "Decoded",
    "Encoding",
    "Identity",
    "KeyPair",
    "Plan",
    "Profile",
    "SecureAggregationError",
    "SeededDraw",
    "ServerRound",
    "Stage",
    "Suite",
    "Terms",
    "from_bytes",
    "new_identity",
    "run_in_memory",
    "to_bytes",
]
