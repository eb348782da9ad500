"""The Flower ClientApp: one client's work, the same in our warm worker and under Flower's SuperNode."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client import flower_masks
from fedlearn.app import app_of
from fedlearn.data.population import build_population, site_population
from fedlearn.errors import DataError, RemoteProtocolError
from fedlearn.learning import messages
from fedlearn.learning.memory import ClientMemory
from fedlearn.learning.postprocess import apply_on_client, chain_of
from fedlearn.learning.task import Batch, ClientData
from fedlearn.learning.update import Update
from fedlearn.privacy.unfit import in_range
from fedlearn.study import Study, study_from_json
from fedlearn.tasks import task_of

if TYPE_CHECKING:
    import torch

    from fedlearn.arrays import Arrays
    from fedlearn.learning.local import FitResult
    from fedlearn.learning.strategy import Strategy
    from fedlearn.learning.task import Task
    from fedlearn.privacy.dpsgd import GradientEngine

app = ClientApp()
log = logging.getLogger("fedlearn.worker")

NO_DATA: Final = ClientData(*[Batch(np.empty((0, 1), np.float32), np.empty(0, np.int64))] * 2)


@dataclass(frozen=True)
class Site:
    """What a client keeps warm between messages of one study."""

    client: str
    study: Study
    task: Task
    strategy: Strategy
    data: ClientData
    device: str
    threads: int

    @property
    def is_unit(self) -> bool:
        """Whether the study protects clients as a whole: then not even that something failed here may be told."""
        return self.study.privacy is not None and self.study.privacy.unit == "client"

    @cached_property
    def engine(self) -> GradientEngine | None:
        """What a plan for records or groups clips with, tried once; None where the study has no such plan."""
        from fedlearn.learning import local
        from fedlearn.privacy.study import protects_rows

        if not protects_rows(self.study):
            return None
        return local.gradient_engine(self.task, self.model, self.study.train, self.data.train)

    @cached_property
    def model(self) -> torch.nn.Module:
        """A module to train in, on the site's device. Not needed to say who the client is, which is therefore quick."""
        import torch

        from fedlearn.learning.device import resolve_device
        from fedlearn.learning.task import build_model

        torch.set_num_threads(self.threads)
        return build_model(self.task, self.study.seed).to(resolve_device(self.device))


@app.query()
def describe(message: Message, context: Context) -> Message:
    """Who this client is in the study."""
    request = messages.decode_request(message.content)
    site = _site(request.study, context)
    return Message(messages.encode_description(site.client, {}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round of local training."""
    request = messages.decode_request(message.content)
    site = _site(request.study, context)
    update = _trained(site, request, context)
    if site.study.secure_aggregation.enabled and not context.node_config.get(flower_masks.BY_AGENT, False):
        masks = flower_masks.FlowerMasks(context, site.study, site.client)
        return Message(masks.masked(request, site.strategy, update), reply_to=message)
    return Message(messages.encode_update(update), reply_to=message)


def _trained(site: Site, request: messages.Request, context: Context) -> Update:
    """The update as it leaves this client but for its masks; the client's memory is in the context."""
    memory = _read_memory(context.state)
    state = memory.at(request.base) if site.strategy.stateful else {}
    learnt = _learnt(site, request, state)
    if site.strategy.stateful:
        # The server counts on a candidate of every update, also of one in which nothing was learnt.
        memory.candidates[request.round, request.attempt] = state if learnt is None else learnt.state
        _write_memory(context.state, memory)
    if learnt is not None:
        return learnt.update
    zeros = {name: np.zeros_like(array) for name, array in request.model.items()}
    update = Update({release.name: zeros for release in site.strategy.releases}, examples=1)
    return apply_on_client(chain_of(site.study, request.shared), update)


def _learnt(site: Site, request: messages.Request, state: Arrays) -> FitResult | None:
    """What training gives; None where an update of zero goes out in its place, because a failure would tell what no budget pays for."""
    from fedlearn.learning import local
    from fedlearn.privacy.site import site_plan

    try:
        private = site_plan(site.study, request.round, site.client, site.data.train, rehearsal=False)
        result = local.fit(
            site.task,
            site.model,
            site.strategy,
            site.study.train,
            site.data,
            place=local.Place(site.study.seed, request.round, site.client),
            global_model=request.model,
            shared=request.shared,
            state=state,
            private=private,
            engine=site.engine,
        )
        update = apply_on_client(chain_of(site.study, request.shared), result.update)
    except Exception:
        if not site.is_unit:
            raise
        log.exception("round %d: nothing was learnt here; an update of zero goes out in its place", request.round)
        return None
    # Whether noisy steps leave the range of numbers says something of them. Refused, it would be said free of charge: the agent pays for what leaves.
    if private is not None and not in_range(update.private.values()):
        log.warning("round %d: training diverged; an update of zero goes out in its place", request.round)
        return None
    return replace(result, update=update)


@app.query("check_in")
def check_in(message: Message, context: Context) -> Message:
    """Secure aggregation on stock Flower: public keys for an attempt. An agent answers this one itself, as the next four."""
    return _keyed(message, context)


@app.query("reveal")
def reveal(message: Message, context: Context) -> Message:
    """Secure aggregation on stock Flower, above 200 clients: what orders the graph."""
    return _keyed(message, context)


@app.query("share")
def share(message: Message, context: Context) -> Message:
    """Secure aggregation on stock Flower: shares of this client's keys for the others."""
    return _keyed(message, context)


@app.query("agree")
def agree(message: Message, context: Context) -> Message:
    """Secure aggregation on stock Flower: a signature under the survivors, where they are agreed upon."""
    return _keyed(message, context)


@app.query("unmask")
def unmask(message: Message, context: Context) -> Message:
    """Secure aggregation on stock Flower: what opens the sum."""
    return _keyed(message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Metrics of the model on this client's test rows; under a privacy plan noisy sums, or nothing."""
    from fedlearn.learning import local
    from fedlearn.privacy.evaluation import check_may_score, is_charged

    request = messages.decode_request(message.content)
    site = _site(request.study, context)
    check_may_score(site.study)
    if is_charged(site.study):
        _ = site.engine  # refuses a model that mixes rows, as training does: one row would change all of what is scored
        at = (request.round, site.client)
        cells = local.evaluate_noisily(
            site.task, site.model, site.study, site.data.test, request.model, at, rehearsal=False
        )
        return Message(messages.encode_scores({}, 0, cells), reply_to=message)
    state = _read_memory(context.state).peek(request.base) if site.strategy.stateful else {}
    weights = local.client_weights(site.strategy, request.model, request.shared, state)
    metrics = local.evaluate(
        site.task, site.model, site.study.train, site.data.test, weights, site.study.evaluate.batch_size
    )
    return Message(messages.encode_scores(metrics, len(site.data.test)), reply_to=message)


def _keyed(message: Message, context: Context) -> Message:
    request = messages.decode_facts(message.content)
    site = _site(request.study, context)
    return Message(flower_masks.FlowerMasks(context, site.study, site.client).answer(request), reply_to=message)


def _site(study_json: str, context: Context) -> Site:
    """The warm site of a study; `context.node_config` says who this client is and where its data lies.

    Keys: `client-id` (or Flower's `partition-id`, an index into the study's clients), `data`, `device`, `threads`.
    """
    config = context.node_config
    return _warm_site(
        study_json,
        str(config.get("client-id", "")),
        str(config.get("partition-id", "")),
        str(config.get("data", "")),
        str(config.get("device", "cpu")),
        int(config.get("threads", 0)),
    )


@lru_cache(maxsize=2)
def _warm_site(study_json: str, client_id: str, partition_id: str, data: str, device: str, threads: int) -> Site:
    study = study_from_json(study_json)
    task = task_of(study)
    if not client_id:
        clients = sorted(build_population(study, task).client_ids)
        if not partition_id.isdigit() or int(partition_id) >= len(clients):
            raise DataError(
                f"client: node config names no client-id, and partition-id is {partition_id!r} of {len(clients)} clients",
                hint="start the SuperNode with --node-config 'client-id=\"NAME\"' or 'partition-id=0'",
            )
        client_id = clients[int(partition_id)]
    strategy = app_of(__file__).strategy(study.strategy.name, study.strategy.options)
    most = min(study.runtime.threads, threads) if threads else study.runtime.threads
    site = Site(client_id, study, task, strategy, NO_DATA, device, most)
    try:
        return replace(
            site, data=site_population(study, task, client_id, Path(data) if data else None).client(client_id)
        )
    except Exception:
        if not site.is_unit:
            raise
        log.exception("the data cannot be read; this client takes part with updates of zero")
        return site


def _read_memory(state: RecordDict) -> ClientMemory:
    keys = state.get("memory")
    if keys is None:
        return ClientMemory()
    if not isinstance(keys, ConfigRecord):
        raise RemoteProtocolError("client state: record 'memory' is not a ConfigRecord")
    memory = ClientMemory()
    if base := _pair(keys, "base"):
        memory.base, memory.state = base, messages.from_record(state, "memory.base")
    if candidate := _pair(keys, "candidate"):
        memory.candidates[candidate] = messages.from_record(state, "memory.candidate")
    return memory


def _write_memory(state: RecordDict, memory: ClientMemory) -> None:
    (key, candidate) = next(iter(memory.candidates.items()))
    base = memory.base or (0, 0)
    state["memory"] = ConfigRecord({"base": [*base], "candidate": [*key]})
    state["memory.base"] = messages.to_record(memory.state) if memory.base else ArrayRecord()
    state["memory.candidate"] = messages.to_record(candidate)


def _pair(keys: ConfigRecord, name: str) -> tuple[int, int] | None:
    value = keys.get(name)
    if not isinstance(value, list) or len(value) != 2:
        raise RemoteProtocolError(f"client state: {name} is {value!r}, expected [round, attempt]")
    return (int(value[0]), int(value[1])) if value[0] else None
