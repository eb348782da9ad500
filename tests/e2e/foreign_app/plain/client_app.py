"""Each client fits y = a x + b to ten points of its own by gradient descent."""

from __future__ import annotations

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()
STEPS = 20


def points(node_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Around y = 2 x - 1, drawn from the node's id."""
    generator = np.random.default_rng(node_id % 2**32)
    x = generator.uniform(-1, 1, 10)
    return x, 2 * x - 1 + generator.normal(0, 0.01, 10)


@app.train()
def train(message: Message, context: Context) -> Message:
    a, b = message.content["arrays"].to_numpy_ndarrays()
    lr = float(message.content["config"]["lr"])
    x, y = points(context.node_id)
    calls = context.state.get("calls", MetricRecord({"n": 0}))["n"] + 1
    context.state["calls"] = MetricRecord({"n": calls})
    for _ in range(STEPS):
        error = a * x + b - y
        a, b = a - lr * 2 * (error * x).mean(), b - lr * 2 * error.mean()
    content = RecordDict(
        {
            "arrays": ArrayRecord([np.asarray(a), np.asarray(b)]),
            "metrics": MetricRecord({"num-examples": len(x), "calls": calls}),
        }
    )
    return Message(content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    a, b = message.content["arrays"].to_numpy_ndarrays()
    x, y = points(context.node_id)
    metrics = MetricRecord({"num-examples": len(x), "mse": float(((a * x + b - y) ** 2).mean())})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)
