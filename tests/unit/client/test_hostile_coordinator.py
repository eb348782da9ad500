"""A hostile coordinator against real agents: policy, gate, keys and the worker's code. Each attack ends in a named error, and nothing leaves."""

from __future__ import annotations

import pytest

from fedlearn.errors import RemoteProtocolError
from fedlearn.learning.backend import Exchange
from fedlearn.learning.messages import MESSAGE_TYPES
from fedlearn.link.tls import Role, TlsBundle, create_authority, issue
from tests.support.hostile_coordinator import MASKED, Coordinator
from tests.support.tiny_task import CLIENTS, tiny_study

PLAIN = tiny_study()


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    authority = create_authority(folder / "ca")
    return {name: TlsBundle.load(issue(authority, name, Role.CLIENT, folder / name)) for name in CLIENTS}


async def refused(asked, error, *says):
    with pytest.raises(error) as caught:
        await asked
    for words in says:
        assert words in caught.value.message, caught.value.message
    return caught.value


@pytest.mark.parametrize("study", [MASKED, PLAIN], ids=["masked", "plain"])
@pytest.mark.parametrize("said", Exchange)
async def test_a_message_whose_type_is_not_what_it_says_is_answered_by_nobody(bundles, said, study):
    """`evaluate` by its word and `train` by its type: the worker would train, and neither gate nor masks would see it."""
    server = Coordinator(bundles, study)
    for kind in {*MESSAGE_TYPES.values(), "train.default"} - {MESSAGE_TYPES[said]}:
        await refused(server.ask("ada", said, kind=kind), RemoteProtocolError, "has the type")
    assert server.outbox("ada") == []
