"""Flower's own FedAvg, as in Flower's tutorials."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    strategy = FedAvg(fraction_train=1.0, fraction_evaluate=1.0, min_available_nodes=2)
    result = strategy.start(
        grid,
        ArrayRecord([np.zeros(()), np.zeros(())]),
        num_rounds=int(context.run_config.get("num-server-rounds", 3)),
        train_config=ConfigRecord({"lr": float(context.run_config.get("lr", 0.1))}),
    )
    if out := str(context.run_config.get("out", "")):
        a, b = (float(array) for array in result.arrays.to_numpy_ndarrays())
        rounds = {str(number): dict(metrics) for number, metrics in result.evaluate_metrics_clientapp.items()}
        calls = {str(number): metrics["calls"] for number, metrics in result.train_metrics_clientapp.items()}
        Path(out).write_text(json.dumps({"a": a, "b": b, "rounds": rounds, "calls": calls}))
