"""The coordinator's signed word that a run is over."""

from __future__ import annotations

import datetime as dt
import json

import pytest

from fedlearn.errors import LimitExceededError, RemoteProtocolError
from fedlearn.link import Role, TlsBundle, create_authority, issue
from fedlearn.link.closing import MAX_CLOSING_BYTES, closing, read_closing
from fedlearn.privacy.chain import verify


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("closing")
    mine, other = create_authority(folder / "mine"), create_authority(folder / "other")
    return {
        name: TlsBundle.load(issue(authority, "coordinator", role, folder / name))
        for name, authority, role in (
            ("server", mine, Role.SERVER),
            ("operator", mine, Role.OPERATOR),
            ("stranger", other, Role.SERVER),
        )
    }


def test_a_word_is_read_back_and_its_signature_holds(bundles):
    closed, key = read_closing(closing(bundles["server"], "r", 3), "r", bundles["server"].ca_pem)
    assert (closed.run, closed.rounds) == ("r", 3)
    assert verify(key, closed.message(), closed.signature)
    other, key = read_closing(closing(bundles["server"], "r", 3), "s", bundles["server"].ca_pem)
    assert not verify(key, other.message(), other.signature)


@pytest.mark.parametrize("who", ["operator", "stranger"])
def test_only_a_server_of_the_sites_authority_may_say_it(bundles, who):
    with pytest.raises(RemoteProtocolError, match="end of run r"):
        read_closing(closing(bundles[who], "r", 3), "r", bundles["server"].ca_pem)


def test_an_expired_certificate_says_nothing(bundles):
    late = dt.datetime.now(dt.UTC) + dt.timedelta(days=400)
    with pytest.raises(RemoteProtocolError, match="not valid now"):
        read_closing(closing(bundles["server"], "r", 3), "r", bundles["server"].ca_pem, late)


@pytest.mark.parametrize(
    "change",
    [
        {"rounds": "many"},
        {"rounds": None},
        {"rounds": float("inf")},
        {"rounds": True},
        {"signature": "zz"},
        {"signature": 3},
        {"certificate": "no"},
        {"certificate": 5},
    ],
)
def test_what_is_no_word_is_refused(bundles, change):
    word = json.loads(closing(bundles["server"], "r", 3))
    with pytest.raises(RemoteProtocolError, match="cannot be taken"):
        read_closing(json.dumps(word | change).encode(), "r", bundles["server"].ca_pem)


@pytest.mark.parametrize("word", [b"", b"\xff", b"[]", b"{}", b"[" * 20_000])
def test_what_is_no_json_object_is_refused(bundles, word):
    with pytest.raises(RemoteProtocolError):
        read_closing(word, "r", bundles["server"].ca_pem)


def test_a_long_word_is_not_read(bundles):
    with pytest.raises(LimitExceededError, match="MAX_CLOSING_BYTES"):
        read_closing(b" " * (MAX_CLOSING_BYTES + 1), "r", bundles["server"].ca_pem)
