"""One contender on one workload in one process: prints CPU seconds of each round, peak memory and where the final weights are.

python -m benchmarks.simulation_peers loop W2 --rounds 5 --out /tmp/weights.npz
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.simulation_flower import flower
from benchmarks.watch import Watch, gflops, status_mb
from benchmarks.workloads import TASKS, WORKLOADS, Workload, first_model, orders_of

# The contenders: each gives the final weights by name.


def ours(
    workload: Workload, rounds: int, watch: Watch, *, backend: str | None = None, strategy: str = "fedavg"
) -> dict[str, np.ndarray]:
    import fedlearn
    from fedlearn import events

    def take(event: events.Event) -> None:
        if isinstance(event, events.RoundFinished):
            watch.lap()

    chosen = {} if backend is None else {"backend": backend}
    study = workload.study(rounds, quiet=QUIET, strategy={"name": strategy})
    return dict(fedlearn.simulate(study, emit=take, **chosen).weights)


def loop(workload: Workload, rounds: int, watch: Watch) -> dict[str, np.ndarray]:
    """What a careful person writes: one model, no copies but the sum, fused element-wise updates."""
    import torch
    from torch.nn.functional import cross_entropy

    torch.set_num_threads(1)
    x, y = map(torch.from_numpy, TASKS[workload.task](workload.population).arrays())
    model = first_model(workload)
    parameters = list(model.parameters())
    orders = orders_of(workload, rounds)
    for cohort in orders:
        start = [p.detach().clone() for p in parameters]
        total = [torch.zeros_like(p) for p in start]
        for client, order in cohort:
            for rows in order.split(workload.batch):
                loss = cross_entropy(model(x[client, rows]), y[client, rows])
                gradients = torch.autograd.grad(loss, parameters)
                with torch.no_grad():
                    torch._foreach_add_(parameters, gradients, alpha=-workload.lr)
            with torch.no_grad():
                if workload.clip_l2 is not None:
                    delta = torch._foreach_sub(parameters, start)  # noqa: SLF001  # torch's own fused form
                    norm = torch.stack(torch._foreach_norm(delta)).norm()  # noqa: SLF001  # torch's own fused form
                    torch._foreach_add_(total, delta, alpha=min(1.0, workload.clip_l2 / float(norm)))
                else:
                    torch._foreach_add_(total, parameters)
                torch._foreach_copy_(parameters, start)
        with torch.no_grad():
            if workload.clip_l2 is not None:
                for part in total:
                    part.add_(torch.randn_like(part), alpha=_noise(workload))
                torch._foreach_add_(parameters, total, alpha=1 / workload.cohort)
            else:
                torch._foreach_copy_(parameters, torch._foreach_div(total, workload.cohort))  # noqa: SLF001  # torch's own fused form
        watch.lap()
    return {name: p.detach().numpy().copy() for name, p in model.named_parameters()}


def opacus(workload: Workload, rounds: int, watch: Watch) -> dict[str, np.ndarray]:
    """DP-SGD as Opacus documents it: a privacy engine for each client's model, optimiser and loader."""
    import torch
    from opacus import PrivacyEngine
    from torch.nn.functional import cross_entropy
    from torch.utils.data import DataLoader, TensorDataset

    torch.set_num_threads(1)
    x, y = map(torch.from_numpy, TASKS[workload.task](workload.population).arrays())
    model = first_model(workload)
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    for cohort in orders_of(workload, rounds):
        total = {name: torch.zeros_like(p) for name, p in state.items()}
        for client, _ in cohort:
            mine = first_model(workload)
            mine.load_state_dict(state)
            private, optimizer, loader = PrivacyEngine().make_private(
                module=mine,
                optimizer=torch.optim.SGD(mine.parameters(), lr=workload.lr),
                data_loader=DataLoader(TensorDataset(x[client], y[client]), batch_size=workload.batch, shuffle=True),
                noise_multiplier=_noise(workload),
                max_grad_norm=workload.record_clip_l2,
                poisson_sampling=False,
            )
            for bx, by in loader:
                optimizer.zero_grad()
                cross_entropy(private(bx), by).backward()
                optimizer.step()
            for name, p in mine.named_parameters():
                total[name] += p.detach()
        state = {name: t / workload.cohort for name, t in total.items()}
        watch.lap()
    return {name: t.numpy() for name, t in state.items()}


def pfl(
    workload: Workload, rounds: int, watch: Watch, *, metrics: bool = False, rule: str = "fedavg"
) -> dict[str, np.ndarray]:
    """Apple's pfl: a rule on its simulated backend, clients' tensors in memory.

    With `metrics`, each user's loss is evaluated before and after training in every round, which is how pfl gets the training loss that
    fedlearn always reports. Without, it trains and nothing else.
    """
    import torch
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.pytorch import PyTorchTensorDataset
    from pfl.hyperparam import NNTrainHyperParams
    from pfl.metrics import Metrics, Weighted
    from pfl.model.pytorch import PyTorchModel
    from pfl.privacy.gaussian_mechanism import GaussianMechanism
    from pfl.privacy.privacy_mechanism import CentrallyAppliedPrivacyMechanism
    from torch.nn.functional import cross_entropy

    torch.set_num_threads(1)
    x, y = map(torch.from_numpy, TASKS[workload.task](workload.population).arrays())
    module = first_model(workload)
    module.loss = lambda bx, by: cross_entropy(module(bx), by)

    def scores(bx: Any, by: Any) -> dict[str, Any]:
        with torch.no_grad():
            return {"loss": Weighted(float(cross_entropy(module(bx), by, reduction="sum")), len(by))}

    module.metrics = scores
    queue = iter([pair for cohort in orders_of(workload, rounds) for pair in cohort])

    def user(pair: Any) -> PyTorchTensorDataset:
        client, order = pair
        return PyTorchTensorDataset((x[client, order], y[client, order]), user_id=str(client))

    class Lap(TrainingProcessCallback):
        def after_central_iteration(self, *args: Any, **named: Any) -> tuple[bool, Metrics]:  # noqa: ARG002
            watch.lap()
            return False, Metrics()

    model = PyTorchModel(module, torch.optim.SGD, torch.optim.SGD(module.parameters(), lr=1.0))
    steps = []
    if workload.clip_l2 is not None:
        steps = [CentrallyAppliedPrivacyMechanism(GaussianMechanism(workload.clip_l2, _noise(workload)))]
    data = FederatedDataset(user, lambda: next(queue))
    algorithm, settings = _pfl_rule(rule, workload)
    algorithm.run(
        settings(
            central_num_iterations=rounds,
            evaluation_frequency=1 if metrics else 10**9,
            train_cohort_size=workload.cohort,
            val_cohort_size=0,
        ),
        SimulatedBackend(data, data, steps),
        model,
        NNTrainHyperParams(local_batch_size=workload.batch, local_num_epochs=1, local_learning_rate=workload.lr),
        callbacks=[Lap()],
        send_metrics_to_platform=False,
    )
    return {name: p.detach().numpy().copy() for name, p in module.named_parameters()}


def _pfl_rule(rule: str, workload: Workload) -> tuple[Any, Callable[..., Any]]:
    """The algorithm, and its parameters but for those that all have; states of clients on disk, where any number fits."""
    import tempfile

    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.algorithm.fedprox import FedProx, FedProxParams
    from pfl.algorithm.scaffold import SCAFFOLD, SCAFFOLDParams
    from pfl.data.user_state import DiskUserStateStorage

    if rule == "fedprox":
        return FedProx(), functools.partial(FedProxParams, mu=0.01)
    if rule == "scaffold":
        os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"  # pfl reads back what it pickled itself
        folder = tempfile.TemporaryDirectory(prefix="pfl-states-")
        states = DiskUserStateStorage(folder.name)
        states.folder = folder  # gone with it
        return SCAFFOLD(), functools.partial(
            SCAFFOLDParams,
            population=workload.population,
            use_gradient_as_control_variate=False,
            user_state_storage=states,
        )
    return FederatedAveraging(), NNAlgorithmParams


def _noise(workload: Workload) -> float:
    return 0.0 if QUIET else workload.noise_multiplier


QUIET = False
"""Without noise, so that final weights can be compared."""

RULES = ("fedprox", "scaffold")
CONTENDERS: dict[str, Callable[..., dict[str, np.ndarray]]] = {
    "ours": ours,
    "sequential": lambda *a: ours(*a, backend="sequential"),
    **{f"ours:{rule}": functools.partial(ours, strategy=rule) for rule in RULES},
    "loop": loop,
    "pfl": pfl,
    "pfl+loss": functools.partial(pfl, metrics=True),
    **{f"pfl:{rule}": functools.partial(pfl, rule=rule) for rule in RULES},
    "opacus": opacus,
    "flower200": lambda *a: flower(*a, nodes=200),
    "flower1000": lambda *a: flower(*a, nodes=1000),
}


def main() -> int:
    global QUIET
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contender", choices=[*CONTENDERS, "gflops"])
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quiet", action="store_true", help="no noise")
    parser.add_argument("--out", type=Path, help="final weights go here")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    QUIET = arguments.quiet
    if arguments.contender == "gflops":
        print(json.dumps({"gflops": gflops()}))
        return 0
    watch = Watch()
    weights = CONTENDERS[arguments.contender](WORKLOADS[arguments.workload], arguments.rounds, watch)
    family_mb = weights.pop("family_mb", None)
    if arguments.out is not None:
        np.savez(arguments.out, **weights)
    found = {
        "cpu_s": watch.cpu_s,
        "wall_s": watch.wall_s,
        "peak_mb": status_mb("VmHWM") if family_mb is None else float(family_mb),
        "resident_mb": watch.resident_mb,
    }
    print(json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
