"""What a correct peer never sends, one case each; and heartbeats, faults and goodbyes."""

import dataclasses

import pytest
import xxhash

from fedlearn.errors import LimitExceededError, LinkError, LocalProtocolError, RemoteProtocolError
from fedlearn.link import framing
from fedlearn.link.faults import MessageError, VersionError
from fedlearn.link.frames import (
    Ack,
    Cancel,
    Chunk,
    End,
    Fault,
    FaultCode,
    Goodbye,
    Heartbeat,
    Hello,
    Resume,
    Retry,
    Start,
    Welcome,
)
from fedlearn.link.limits import LinkLimits
from fedlearn.link.mailbox import Mailbox
from fedlearn.link.session import Session
from fedlearn.link.states import (
    TRANSITIONS,
    Cancelled,
    Closed,
    Damaged,
    Opened,
    Received,
    Refused,
    Resumed,
    Side,
    State,
)
from fedlearn.link.transfer import Outgoing, Payload

LIMITS = LinkLimits(chunk_bytes=8, incoming_messages=3, incoming_bytes=1_000, checksum_retries=2)
HELLO = Hello(1, 1, b"c" * 16)
WELCOME = Welcome(1, b"s" * 16, 7)


def frame(session, value, now=0.0):
    return session.receive(framing.pack(value), now)


def sent(session, now=0.0):
    out = []
    while (data := session.send(now)) is not None:
        out.append(framing.unpack(data, LIMITS))
    return out


def acceptor(*, wanted=True, limits=LIMITS):
    session = Session(Side.ACCEPTOR, Mailbox(limits, lambda _: wanted), b"s" * 16, 0.0, node_id=7)
    (opened,) = frame(session, HELLO)
    assert isinstance(opened, Opened)
    session.wanted(())
    assert [type(f) for f in sent(session)] == [Welcome]
    return session


def initiator():
    session = Session(Side.INITIATOR, Mailbox(LIMITS, lambda _: True), b"c" * 16, 0.0, facts={"a": "b"})
    assert sent(session) == [Hello(1, 1, b"c" * 16, {"a": "b"})]
    frame(session, WELCOME)
    return session


def outgoing(data=b"", message_id="m", reply_to=""):
    return Outgoing(message_id, reply_to, b"meta", Payload((data,), LIMITS.chunk_bytes), 100.0)


def chunk(data, offset=0, payload_id=1):
    return Chunk(payload_id, offset, xxhash.xxh3_64_intdigest(data), data)


def test_a_message_goes_out_as_start_chunks_end():
    session = acceptor()
    message = outgoing(b"0123456789")
    session.mailbox.put(message)
    session.submit(message)
    start, first, second, end = sent(session, now=40.0)
    assert (start.message_id, start.ttl_s, start.buffer_bytes) == ("m", 60.0, (10,))
    assert (bytes(first.data), bytes(second.data), second.offset) == (b"01234567", b"89", 8)
    assert end == End(start.payload_id)


def test_a_message_comes_in_and_is_acknowledged():
    session = acceptor()
    assert frame(session, Start("m", "q", 1, b"meta", (3, 0, 2), 5.0)) == []
    assert frame(session, chunk(b"abcde")) == []
    assert frame(session, End(1)) == [Received("m", "q", b"meta", (b"abc", b"", b"de"), 5.0)]
    assert sent(session) == [Ack("m")]


BAD = {
    "payload never announced": [chunk(b"a")],
    "end of a payload never announced": [End(1)],
    "chunk with a hole before it": [Start("m", "", 1, b"", (9,), 1.0), chunk(b"a", offset=1)],
    "chunk again": [Start("m", "", 1, b"", (9,), 1.0), chunk(b"a"), chunk(b"a")],
    "more than announced": [Start("m", "", 1, b"", (1,), 1.0), chunk(b"ab")],
    "empty chunk": [Start("m", "", 1, b"", (1,), 1.0), chunk(b"")],
    "end too early": [Start("m", "", 1, b"", (2,), 1.0), chunk(b"a"), End(1)],
    "two messages on one payload": [Start("m", "", 1, b"", (2,), 1.0), Start("n", "", 1, b"", (2,), 1.0)],
    "one message on two payloads": [Start("m", "", 1, b"", (2,), 1.0), Start("m", "", 2, b"", (2,), 1.0)],
    "resume that was not offered": [Start("m", "", 1, b"", (2,), 1.0, 1)],
    "too many messages": [Start(str(i), "", i, b"", (2,), 1.0) for i in range(4)],
    "too many announced bytes": [Start(str(i), "", i, b"", (500,), 1.0) for i in range(3)],
    "second hello": [HELLO],
    "welcome from the one who dialled": [WELCOME],
    "frame after goodbye": [Goodbye(), Heartbeat(1.0)],
    "frame after fault": [Fault(FaultCode.PROTOCOL, "x"), Ack("m")],
}


@pytest.mark.parametrize("frames", BAD.values(), ids=BAD)
def test_a_peer_that_breaks_the_protocol_is_refused(frames):
    session = acceptor()
    *good, bad = frames
    for value in good:
        frame(session, value)
    with pytest.raises(RemoteProtocolError) as caught:
        frame(session, bad)
    session.refuse(caught.value)
    (*_, fault) = sent(session)
    assert isinstance(fault, Fault)
    assert fault.reason in caught.value.message
    assert (fault.code is FaultCode.LIMIT) == ("too many" in str([k for k, v in BAD.items() if v is frames]))
    assert session.finished


def test_unwanted_messages_are_bounded_too():
    session = acceptor(wanted=False)
    for i in range(3):
        frame(session, Start(str(i), "", i, b"", (2,), 1.0))
    with pytest.raises(LimitExceededError, match="incoming_messages"):
        frame(session, Start("x", "", 9, b"", (2,), 1.0))


def test_an_unwanted_message_is_acknowledged_at_once_and_its_bytes_are_dropped():
    session = acceptor(wanted=False)
    frame(session, Start("m", "", 1, b"", (2,), 1.0))
    assert sent(session) == [Ack("m")]
    assert frame(session, chunk(b"ab")) == []
    assert frame(session, End(1)) == []
    assert not session.mailbox.incoming


@pytest.mark.parametrize("value", [Start("m", "", 1, b"", (), 1.0), Heartbeat(1.0), Ack("m"), Goodbye()])
def test_nothing_comes_before_hello(value):
    session = Session(Side.ACCEPTOR, Mailbox(LIMITS, lambda _: True), b"s" * 16, 0.0)
    with pytest.raises(RemoteProtocolError, match="while it is idle"):
        frame(session, value)


def test_nothing_but_welcome_answers_hello():
    session = Session(Side.INITIATOR, Mailbox(LIMITS, lambda _: True), b"c" * 16, 0.0)
    sent(session)
    with pytest.raises(RemoteProtocolError):
        frame(session, Start("m", "", 1, b"", (), 1.0))


def test_an_acceptor_cannot_speak_first():
    session = Session(Side.ACCEPTOR, Mailbox(LIMITS, lambda _: True), b"s" * 16, 0.0)
    with pytest.raises(LocalProtocolError):
        session.wanted(())


@pytest.mark.parametrize(("low", "high"), [(2, 9), (0, 0)])
def test_another_version_is_refused_as_such(low, high):
    session = Session(Side.ACCEPTOR, Mailbox(LIMITS, lambda _: True), b"s" * 16, 0.0)
    with pytest.raises(VersionError, match="this end 1") as caught:
        frame(session, Hello(low, high, b"c" * 16))
    session.refuse(caught.value)
    assert sent(session)[0].code is FaultCode.VERSION
    other = Session(Side.INITIATOR, Mailbox(LIMITS, lambda _: True), b"c" * 16, 0.0)
    sent(other)
    with pytest.raises(VersionError):
        frame(other, dataclasses.replace(WELCOME, version=2))


def test_a_damaged_chunk_is_asked_for_again_and_never_used():
    session = acceptor()
    frame(session, Start("m", "q", 1, b"", (16,), 1.0))
    frame(session, chunk(b"01234567"))
    assert frame(session, dataclasses.replace(chunk(b"89abcdef", 8), data=b"89abcdeX")) == [Damaged("m", 8, 1)]
    assert sent(session) == [Retry(1, 8)]
    # What the peer sent before it saw our Retry is passed over, its End too.
    assert frame(session, End(1)) == []
    assert frame(session, chunk(b"89abcdef", 8)) == []
    (received,) = frame(session, End(1))
    assert received.buffers == (b"0123456789abcdef",)


def test_a_message_that_is_damaged_again_and_again_is_given_up_by_name():
    session = acceptor()
    frame(session, Start("m", "q", 1, b"", (8,), 1.0))
    bad = dataclasses.replace(chunk(b"01234567"), data=b"0123456X")
    frame(session, bad)
    frame(session, bad)
    with pytest.raises(MessageError, match=r"checksum.*damaged 3 times.*checksum_retries is 2") as caught:
        frame(session, bad)
    assert not session.mailbox.incoming
    session.refuse(caught.value)
    assert sent(session)[-1].message_id == "m"


def test_a_sender_goes_back_when_asked_and_only_so_often():
    session = acceptor()
    message = outgoing(b"0123456789abcdef!")
    session.mailbox.put(message)
    session.submit(message)
    start, *_ = sent(session)
    for _ in range(2):
        frame(session, Retry(start.payload_id, 8))
        assert [f.offset for f in sent(session)[:-1]] == [8, 16]
    with pytest.raises(LimitExceededError, match="checksum_retries"):
        frame(session, Retry(start.payload_id, 8))


@pytest.mark.parametrize("offset", [1, 7, 17, 100])
def test_a_retry_from_nowhere_is_refused(offset):
    session = acceptor()
    message = outgoing(b"0123456789abcdef!")
    session.mailbox.put(message)
    session.submit(message)
    start, *_ = sent(session)
    with pytest.raises(RemoteProtocolError, match="retry"):
        frame(session, Retry(start.payload_id, offset))


def test_a_broken_transfer_goes_on_where_it_stopped():
    mailbox = Mailbox(LIMITS, lambda _: True)
    session = Session(Side.ACCEPTOR, mailbox, b"s" * 16, 0.0)
    frame(session, HELLO)
    session.wanted(())
    frame(session, Start("m", "q", 5, b"", (12,), 1.0))
    frame(session, chunk(b"01234567", payload_id=5))

    again = Session(Side.ACCEPTOR, mailbox, b"s" * 16, 0.0)
    assert frame(again, HELLO)[0].resumed
    again.wanted(())
    (welcome,) = sent(again)
    assert welcome.resumes == (Resume("m", 5, 8),)
    assert frame(again, Start("m", "q", 5, b"", (12,), 1.0, 8)) == [Resumed("m", 8, 12)]
    frame(again, chunk(b"89ab", 8, payload_id=5))
    assert frame(again, End(5))[0].buffers == (b"0123456789ab",)


def test_another_process_starts_from_nothing():
    mailbox = Mailbox(LIMITS, lambda _: True)
    session = Session(Side.ACCEPTOR, mailbox, b"s" * 16, 0.0)
    frame(session, HELLO)
    session.wanted(())
    frame(session, Start("m", "q", 5, b"", (12,), 1.0))
    frame(session, chunk(b"01234567", payload_id=5))
    again = Session(Side.ACCEPTOR, mailbox, b"s" * 16, 0.0)
    assert not frame(again, dataclasses.replace(HELLO, incarnation=b"d" * 16))[0].resumed
    again.wanted(())
    assert sent(again)[0].resumes == ()


def test_cancel_stops_a_transfer_midway():
    session = acceptor()
    message = outgoing(b"0123456789abcdef")
    session.mailbox.put(message)
    session.submit(message)
    start = framing.unpack(session.send(0.0), LIMITS)
    session.send(0.0)
    session.cancel("m")
    assert sent(session) == [Cancel("m"), End(start.payload_id)]
    assert not session.mailbox.outgoing


def test_a_message_that_never_began_is_cancelled_without_a_word():
    session = acceptor()
    message = outgoing(b"01234567")
    session.mailbox.put(message)
    session.submit(message)
    session.cancel("m")
    assert sent(session) == []


def test_a_cancelled_message_is_dropped_with_what_still_comes():
    session = initiator()
    frame(session, Start("m", "", 1, b"", (16,), 1.0))
    frame(session, chunk(b"01234567"))
    assert frame(session, Cancel("m")) == [Cancelled("m")]
    assert not session.mailbox.incoming
    assert frame(session, chunk(b"89abcdef", 8)) == []
    assert frame(session, End(1)) == []


def test_silence_is_broken_by_heartbeats_and_ends_by_their_absence():
    session = acceptor()
    limits = session.limits
    assert session.deadline() == limits.heartbeat_s
    session.tick(limits.heartbeat_s)
    assert sent(session, limits.heartbeat_s) == [Heartbeat(limits.heartbeat_s)]
    frame(session, Heartbeat(30.0), now=6.0)
    session.tick(6.0 + 30.0 + limits.heartbeat_grace_s - 0.1)
    with pytest.raises(LinkError, match="no sign of life"):
        session.tick(6.0 + 30.0 + limits.heartbeat_grace_s)


def test_a_handshake_has_a_deadline():
    session = Session(Side.ACCEPTOR, Mailbox(LIMITS, lambda _: True), b"s" * 16, 0.0)
    with pytest.raises(LinkError, match="no handshake"):
        session.tick(session.deadline())


def test_goodbye_and_fault_are_told():
    assert frame(acceptor(), Goodbye("enough")) == [Closed("enough")]
    session = acceptor()
    assert frame(session, Fault(FaultCode.LIMIT, "too big", "m")) == [Refused("m", FaultCode.LIMIT, "too big")]
    assert session.peer_closed


def test_nothing_is_sent_after_goodbye():
    session = acceptor()
    session.close("done")
    assert sent(session) == [Goodbye("done")]
    assert session.finished
    with pytest.raises(LocalProtocolError):
        session._put(Heartbeat(1.0))


def test_an_instruction_is_kept_until_it_is_answered_and_a_reply_until_it_is_acknowledged():
    session = acceptor()
    instruction, reply = outgoing(b"x", "i"), outgoing(b"y", "r", reply_to="q")
    for message in (instruction, reply):
        session.mailbox.put(message)
        session.submit(message)
    sent(session)
    frame(session, Ack("i"))
    frame(session, Ack("r"))
    assert list(session.mailbox.outgoing) == ["i"]
    assert instruction.acked
    session.mailbox.met(b"another process!")
    assert not instruction.acked


def test_one_payload_is_on_one_connection_once():
    session = acceptor()
    payload = Payload((b"x",), 8)
    for message_id in "ab":
        session.mailbox.put(Outgoing(message_id, "", b"", payload, 1.0))
    session.submit(session.mailbox.outgoing["a"])
    with pytest.raises(LocalProtocolError, match="on its way already"):
        session.submit(session.mailbox.outgoing["b"])


def test_every_state_of_the_table_can_close_once_it_can_speak():
    for side, states in TRANSITIONS.items():
        for state, moves in states.items():
            if state is not State.CLOSED and not (side is Side.INITIATOR and state is State.IDLE):
                assert moves[Goodbye] is State.CLOSED, (side, state)


@pytest.mark.parametrize(
    ("limits", "name"),
    [
        (LinkLimits(message_bytes=3), "message_bytes"),
        (LinkLimits(metadata_bytes=3), "metadata_bytes"),
        (LinkLimits(outgoing_messages=1), "outgoing_messages"),
        (LinkLimits(outgoing_bytes=5), "outgoing_bytes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_mailbox_refuses_what_no_receiver_would_take(limits, name):
    mailbox = Mailbox(limits, lambda _: True)
    if name.startswith("outgoing"):
        mailbox.put(outgoing(b"data", "a"))
    with pytest.raises(LimitExceededError, match=f"limit {name} is"):
        mailbox.put(outgoing(b"data", "b"))
