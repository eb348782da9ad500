"""Ditto: each client keeps a model of its own, tied to the global one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final

from fedlearn.learning.strategy import MAIN, ClientFinish, ClientStart, Pass, Pull, Trained, subtract
from fedlearn.learning.update import DELTA
from strategies.fedavg import FedAvg
from strategies.options import number

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fedlearn.learning.strategy import Tensors

PERSONAL: Final = "personal"
"""The pass that trains the client's own model."""


@dataclass(frozen=True)
class Ditto(FedAvg):
    """Personalisation by regularisation, with FedAvg as the solver of the global model.

    Li et al. 2021, "Ditto: Fair and Robust Federated Learning Through Personalization", equation Ditto and algorithm 1. In each round
    client k does FedAvg's local pass from x, and beside it trains its own model v_k by steps along

        grad F_k(v_k) + lambda (v_k - x)

    with x the global weights as they were broadcast, not those after its own pass. v_k starts at the x of the client's first round. Only
    the global pass is released; v_k never leaves the client, and is what the client uses and evaluates.

    lambda = 0 is purely local training; the larger lambda is, the closer v_k stays to the global model. The personal pass costs as much
    computation as the global one.

    What it means for privacy. v_k is made from the client's data and stays with it: it costs no budget as long as nothing that
    is computed from it leaves, metrics included.
    """

    name: ClassVar[str] = "ditto"
    paper: ClassVar[str] = "Li et al. 2021 (ICML), algorithm 1"
    stateful: ClassVar[bool] = True

    lam: float = number(0.1, "lambda: how strongly the personal model is tied to the global one", low=0)

    def client_passes(self, start: ClientStart) -> tuple[Pass, ...]:
        return (Pass(MAIN, start.model), Pass(PERSONAL, self.client_model(start), Pull(start.model, self.lam)))

    def client_finish(self, start: ClientStart, trained: Mapping[str, Trained]) -> ClientFinish:
        return ClientFinish({DELTA: subtract(trained[MAIN].weights, start.model)}, trained[PERSONAL].weights)

    def client_model(self, start: ClientStart) -> Tensors:
        return start.state or start.model
