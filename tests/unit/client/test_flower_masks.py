"""Secure aggregation as plain Flower messages: the simulation's bytes, and state that does not outlive its round."""

from __future__ import annotations

import pytest
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.common.serde import context_from_proto, context_to_proto

import fedlearn
from client.app import app as client_app
from client.flower_masks import BY_AGENT, PREFIX
from fedlearn import events
from fedlearn.arrays import digest
from fedlearn.learning.backend import Exchange
from fedlearn.learning.messages import MASKED, PRIVATE, RECORD, decode_facts, from_record, to_record
from fedlearn.link.tls import Role, create_authority, issue
from fedlearn.secagg.messages import Survivors, from_bytes, to_bytes
from tests.support.memory_grid import MemoryGrid, Node, nodes_of
from tests.support.runs import run_server_app
from tests.support.secagg_world import sparse_graphs
from tests.support.shared_noise import noisy_study
from tests.support.tiny_task import CLIENTS, tiny_study

MASKS = ("secure_aggregation.enabled=true", "secure_aggregation.max_examples=20", "task.options={hidden=6}")


def study_of(*overrides):
    return tiny_study(*MASKS, *overrides)


def simulated(study):
    return digest(fedlearn.simulate(study).weights)


def states(grid):
    """Names of what clients keep."""
    proto = type(context_to_proto(Context(1, 1, {}, RecordDict(), {})))
    kept = [node.state for node in grid.nodes.values() if node.state]
    return {name for state in kept for name in context_from_proto(proto.FromString(state)).state}


@pytest.mark.parametrize("strategy", ["fedavg", "scaffold"])
def test_a_masked_run_on_flower_ends_with_the_simulations_bytes(strategy):
    study = study_of(f"strategy.name={strategy}")
    grid = MemoryGrid(nodes_of(CLIENTS), order=3)
    run = run_server_app(study, grid)
    assert not run.of(events.ClientDropped)
    assert digest(run.model) == simulated(study)
    asked = [request.exchange for request in grid.requests]
    rounds, each = 3, len(CLIENTS)
    assert asked.count(Exchange.CHECK_IN) == each, "from the second round on keys ride on the answers before"
    assert (asked.count(Exchange.SHARE), asked.count(Exchange.TRAIN)) == (rounds * each, rounds * each)


@pytest.mark.parametrize("surplus", ["false", "true"])
def test_clients_on_flower_add_the_noise_that_a_simulation_adds(surplus):
    study = noisy_study("task.options={hidden=6}", f"privacy.surplus={surplus}")
    run = run_server_app(study, MemoryGrid(nodes_of(CLIENTS), order=3))
    assert not run.of(events.ClientDropped)
    assert digest(run.model) == simulated(study)


def test_what_an_attempt_keeps_is_gone_after_it():
    grid = MemoryGrid(nodes_of(CLIENTS))
    during = []

    def watch(request, reply):
        if decode_facts(request.content).exchange is Exchange.TRAIN:
            during.append({name for name in states(grid) if name.startswith(PREFIX)})
        return reply

    grid.fault = watch
    run_server_app(study_of(), grid)
    assert all(during)
    assert not {name for name in states(grid) if name.startswith(PREFIX)}


def test_the_server_never_gets_an_update_in_the_clear():
    grid = MemoryGrid(nodes_of(CLIENTS))
    seen = []

    def watch(request, reply):
        if decode_facts(request.content).exchange is Exchange.TRAIN:
            seen.append(set(reply.content))
        return reply

    grid.fault = watch
    run_server_app(study_of(), grid)
    assert len(seen) == 12
    assert all(MASKED in names and not any(n.startswith(PRIVATE) or n == "facts" for n in names) for names in seen)


def test_a_server_that_leaves_the_keys_out_gets_nothing():
    grid = MemoryGrid(nodes_of(CLIENTS))
    requests = []

    def keep(request, reply):
        if decode_facts(request.content).exchange is Exchange.TRAIN:
            requests.append(request)
        return reply

    grid.fault = keep
    run_server_app(study_of("rounds=1"), grid)
    node = next(iter(grid.nodes.values()))
    for config, allowed in ((node.config, False), ({**node.config, BY_AGENT: True}, True)):
        context = Context(1, 1, dict(config), RecordDict(), {})
        if allowed:
            assert PRIVATE + "delta" in client_app(requests[0], context).content
        else:
            with pytest.raises(Exception, match="holds no keys"):
                client_app(requests[0], context)


def test_a_client_whose_state_is_lost_is_out_for_a_round():
    grid = MemoryGrid(nodes_of(CLIENTS))
    lost = []

    def lose(request, reply):
        facts = decode_facts(request.content)
        if facts.exchange is Exchange.SHARE and facts.round == 2 and not lost:
            node = grid.nodes[request.metadata.dst_node_id]
            lost.append(node.config["client-id"])
            node.state = b""
        return reply

    grid.fault = lose
    run = run_server_app(study_of(), grid)
    dropped = run.of(events.ClientDropped)
    assert [(event.client, event.round) for event in dropped] == [(lost[0], 2)]
    assert "holds no keys" in dropped[0].reason
    assert [event.clients for event in run.of(events.RoundFinished)] == [4, 3, 4]


def test_certificates_are_used_where_nodes_have_them(tmp_path):
    """Three clients of one authority take each other; a fourth with another's is in no roster that they accept."""
    own, other = create_authority(tmp_path / "own"), create_authority(tmp_path / "other")
    grid = MemoryGrid(nodes_of(CLIENTS))
    for number, node in grid.nodes.items():
        name = str(node.config["client-id"])
        folder = issue(other if name == "dee" else own, name, Role.CLIENT, tmp_path / name)
        grid.nodes[number] = Node({**node.config, "tls": str(folder)})
    runs = run_server_app(study_of(), grid, authority_pem=(own / "ca.pem").read_bytes())
    assert [event.clients for event in runs.of(events.RoundFinished)] == [3, 3, 3]
    assert {event.client for event in runs.of(events.ClientDropped)} == {"dee"}


def test_a_lost_vector_is_a_dropout():
    grid = MemoryGrid(nodes_of(CLIENTS))

    def lose(request, reply):
        facts = decode_facts(request.content)
        if facts.exchange is Exchange.TRAIN and facts.round == 2 and not grid_lost:
            grid_lost.append(facts)
            return Message(Error(ErrorCode.UNKNOWN, "lost"), reply_to=request)
        return reply

    grid_lost = []
    grid.fault = lose
    run = run_server_app(study_of(), grid)
    assert [event.clients for event in run.of(events.RoundFinished)] == [4, 3, 4]


def test_a_model_of_its_own_for_one_client_is_refused():
    grid, shifted = MemoryGrid(nodes_of(CLIENTS)), []
    push = grid.push_messages

    def lie(asked):
        asked = list(asked)
        for message in asked:
            facts = decode_facts(message.content)
            if facts.exchange is Exchange.TRAIN and not shifted:
                shifted.append(message)
                model = from_record(message.content, "model")
                message.content["model"] = to_record({name: array + 1 for name, array in model.items()})
        return push(asked)

    grid.push_messages = lie
    run = run_server_app(study_of("rounds=1"), grid)
    assert [event.clients for event in run.of(events.RoundFinished)] == [3]
    assert "bound to another model" in run.of(events.ClientDropped)[0].reason


TWELVE = (
    "data.partition=iid",
    "data.clients=12",
    "data.folds=1",
    "cohort.wait_for=12",
    "secure_aggregation.adversarial=0",
)
NAMES = tuple(f"client-{number:04d}" for number in range(12))


@pytest.mark.parametrize(
    ("names", "overrides"),
    [(CLIENTS, ("secure_aggregation.profile=malicious",)), (NAMES, TWELVE)],
    ids=["agreed", "not complete"],
)
def test_survivors_are_agreed_upon(names, overrides):
    grid = MemoryGrid(nodes_of(names), order=5)
    with sparse_graphs(above=10):
        run = run_server_app(study_of(*overrides), grid)
        assert digest(run.model) == simulated(study_of(*overrides))
    assert not run.of(events.ClientDropped)
    asked = [request.exchange for request in grid.requests]
    assert asked.count(Exchange.AGREE) == 3 * len(names)
    assert asked.count(Exchange.REVEAL) == (3 * len(names) if names is NAMES else 0)
    assert not {name for name in states(grid) if name.startswith(PREFIX)}


def test_a_second_set_of_survivors_is_not_signed_and_nothing_is_opened_on_the_servers_word():
    grid, refused = MemoryGrid(nodes_of(CLIENTS)), []

    def ask_again(request, reply):
        facts, number = decode_facts(request.content), request.metadata.dst_node_id
        if facts.exchange is not Exchange.AGREE or refused:
            return reply
        told = from_bytes(facts.body)
        fewer = to_bytes(Survivors(told.survivors & ~1, told.inclusions[1:]))
        kept = grid.nodes[number]
        blank = Context(1, number, dict(kept.config), RecordDict(), {})
        for exchange, body, why in (("agree", fewer, "other survivors"), ("unmask", facts.body, "expected Agreements")):
            record = ConfigRecord({**request.content[RECORD], "exchange": exchange, "body": body})
            context = context_from_proto(type(context_to_proto(blank)).FromString(kept.state))
            with pytest.raises(Exception, match=why):
                client_app(Message(RecordDict({RECORD: record}), number, f"query.{exchange}"), context)
            refused.append(why)
        return reply

    grid.fault = ask_again
    run = run_server_app(study_of("rounds=1", "secure_aggregation.profile=malicious"), grid)
    assert len(refused) == 2
    assert [event.clients for event in run.of(events.RoundFinished)] == [4]
