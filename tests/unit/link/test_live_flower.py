"""Flower's own strategy and a plain ClientApp, unmodified, over the link."""

import asyncio
import time

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from tests.support.link_live import net

CLIENTS = {"a": (1.0, 10), "b": (2.0, 30), "c": (4.0, 60)}


def app_of(name):
    app = ClientApp()
    target, examples = CLIENTS[name]

    @app.train()
    def train(message, _context):
        (weights,) = message.content["arrays"].to_numpy_ndarrays()
        moved = weights + 0.5 * (target - weights)
        content = RecordDict(
            {"arrays": ArrayRecord([moved]), "metrics": MetricRecord({"num-examples": examples, "loss": 1.0})}
        )
        return Message(content, reply_to=message)

    @app.evaluate()
    def evaluate(message, _context):
        (weights,) = message.content["arrays"].to_numpy_ndarrays()
        metrics = MetricRecord({"num-examples": examples, "gap": float(abs(weights - target).mean())})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


async def test_fedavg_ends_with_the_right_weights(tmp_path):
    async with net(tmp_path) as world:
        for name in CLIENTS:
            app = app_of(name)

            async def handle(message, app=app):
                context = Context(message.metadata.run_id, message.metadata.dst_node_id, {}, RecordDict(), {})
                return await asyncio.to_thread(app, message, context)

            world.start(name, handle)
        await world.connected(3)
        began = time.monotonic()
        strategy = FedAvg(min_available_nodes=3, min_train_nodes=3, min_evaluate_nodes=3)
        result = await asyncio.to_thread(
            strategy.start, world.server.grid(1), ArrayRecord([np.zeros((3, 2))]), num_rounds=3, timeout=30
        )
        (weights,) = result.arrays.to_numpy_ndarrays()
    total = sum(n for _, n in CLIENTS.values())
    mean = sum(target * n for target, n in CLIENTS.values()) / total
    np.testing.assert_allclose(weights, np.full((3, 2), mean * (1 - 0.5**3)), rtol=1e-12)
    assert set(result.evaluate_metrics_clientapp) == {1, 2, 3}
    assert time.monotonic() - began < 20
