"""Flower's simulator on a workload of `benchmarks/workloads.py`."""

from __future__ import annotations

import os
import time

import numpy as np

from benchmarks.watch import Watch, family, family_cpu_s, status_mb
from benchmarks.workloads import TASKS, Workload, arrays_of, first_model, orders_of


def flower(workload: Workload, rounds: int, watch: Watch, *, nodes: int) -> dict[str, np.ndarray]:
    """Flower's simulator on Ray, one CPU: the message API, one reply a client, averaged as they lie."""
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.simulation import run_simulation

    server, client = ServerApp(), ClientApp()
    batch, lr, task = workload.batch, workload.lr, workload.task
    result: dict[str, np.ndarray] = {}
    orders = orders_of(workload, rounds)

    @client.train()
    def train(message: Message, context: Context) -> Message:  # noqa: ARG001  # Flower's interface
        import torch
        from torch.nn.functional import cross_entropy

        torch.set_num_threads(1)
        number = int(message.content["client"]["number"])
        x, y = (torch.from_numpy(a[number]) for a in arrays_of(task))
        (order,) = (torch.from_numpy(a) for a in message.content["order"].to_numpy_ndarrays())
        model = TASKS[task]().model()
        model.load_state_dict(message.content["model"].to_torch_state_dict())
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        for rows in order.split(batch):
            optimizer.zero_grad()
            cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
        content = RecordDict({"model": ArrayRecord(model.state_dict()), "count": MetricRecord({"n": len(y)})})
        return Message(content, reply_to=message)

    @server.main()
    def main(grid: Grid, context: Context) -> None:  # noqa: ARG001  # Flower's interface
        state = first_model(workload).state_dict()
        while len(ids := sorted(grid.get_node_ids())) < nodes:
            time.sleep(0.1)
        watch.__init__(family_cpu_s)
        for cohort in orders:
            model = ArrayRecord(state)
            messages = [
                Message(
                    RecordDict(
                        {
                            "model": model,
                            "order": ArrayRecord([order.numpy()]),
                            "client": ConfigRecord({"number": number}),
                        }
                    ),
                    ids[number % nodes] if nodes == workload.population else ids[place],
                    "train",
                )
                for place, (number, order) in enumerate(cohort)
            ]
            replies = list(grid.send_and_receive(messages))
            assert not any(r.has_error() for r in replies)
            states = [r.content["model"].to_torch_state_dict() for r in replies]
            state = {name: sum(s[name] for s in states) / len(states) for name in state}
            watch.lap()
        result.update({name: t.numpy() for name, t in state.items()})
        result["family_mb"] = np.array(sum(status_mb("VmRSS", pid) for pid in family()))

    run_simulation(
        server,
        client,
        num_supernodes=nodes,
        backend_config={
            "init_args": {"num_cpus": 1, "include_dashboard": False},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )
    return result
