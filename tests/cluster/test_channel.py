"""The wire: whatever arrives in whatever pieces, a message is whole, late, or the end of that connection."""

import os
import socket
import stat
import threading
from pathlib import Path

import msgspec
import pytest

from argosy.cluster.connection import Connection
from argosy.cluster.protocol.channel import (
    Channel,
    FrameReader,
    Listener,
    encode_frame,
    open_socket,
    parse_address,
    secret_matches,
)
from argosy.cluster.protocol.errors import ChannelClosed, ConfigError
from argosy.cluster.protocol.messages import (
    FromEdge,
    FromRank,
    Hello,
    Ping,
    Pong,
    SchedulerOutput,
    StatsRequest,
    StopWorker,
    ToRank,
)


def pair(receive: object = ToRank, **bounds: int) -> tuple[Connection, socket.socket]:
    """A connection of the driver's kind, and the bare socket of its peer."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    theirs.settimeout(5.0)
    return Connection(ours, receive, **bounds), theirs


def same(found: list[object], sent: list[object]) -> bool:
    """Whether they say the same (an empty tuple arrives as an empty list)."""
    return [bytes(encode_frame(m)) for m in found] == [bytes(encode_frame(m)) for m in sent]


def messages_of(frame: bytes, receive: object = ToRank) -> list[object]:
    reader = FrameReader(receive)
    reader.feed(frame)
    found = []
    while (message := reader.next()) is not None:
        found.append(message)
    return found


def test_frames_may_be_cut_anywhere() -> None:
    """TCP gives what it has: a cut may fall into a length, between frames, or into a token id."""
    sent = [Ping(nonce=300), SchedulerOutput(step_id=1, epoch=0, rows=[5, 600, 70000]), StopWorker()]
    wire = b"".join(bytes(encode_frame(message)) for message in sent)
    for cut in range(len(wire) + 1):
        reader, found = FrameReader(ToRank), []
        for piece in (wire[:cut], wire[cut:]):
            reader.feed(piece)
            while (message := reader.next()) is not None:
                found.append(message)
        assert same(found, sent), cut
        assert reader.num_waiting_bytes == 0


def test_a_frame_larger_than_the_first_buffer_arrives_whole() -> None:
    """One long prompt is larger than what a socket or our first buffer holds."""
    output = SchedulerOutput(step_id=1, epoch=0, rows=list(range(200_000)))
    assert same(messages_of(bytes(encode_frame(Ping(nonce=1)) + encode_frame(output))), [Ping(nonce=1), output])


def test_one_huge_message_does_not_keep_its_room() -> None:
    """An edge sends one prompt of a million tokens and then small ones for a month."""
    reader = FrameReader(ToRank)
    reader.feed(bytes(encode_frame(SchedulerOutput(step_id=1, epoch=0, rows=[70_000] * 2_000_000))))
    assert reader.next() is not None
    assert len(reader.space()) < 1_000_000


def test_a_frame_that_announces_too_much_is_refused_before_it_is_read() -> None:
    """Otherwise four bytes of a stranger would make us take memory."""
    reader = FrameReader(ToRank, max_frame_bytes=100)
    reader.feed((101).to_bytes(4, "little"))
    with pytest.raises(ChannelClosed, match="101 bytes"):
        reader.next()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        b"GET / HTTP/1.1\r\n",
        b"\x80",
        msgspec.msgpack.encode(["Hello", 3]),
        msgspec.msgpack.encode(["Ping", "not a number"]),
        msgspec.msgpack.encode(["NoSuchMessage"]),
        b"\x91" * 5000,
    ],
)
def test_garbage_is_the_end_of_that_connection_only(body: bytes) -> None:
    """Whatever is no message of ours raises one error of ours, and never echoes what came."""
    with pytest.raises(ChannelClosed):
        messages_of(len(body).to_bytes(4, "little") + body)


def test_a_connection_ends_with_the_last_whole_message() -> None:
    """A rank writes its last answer and dies inside the next: the answer counts, the rest is an error."""
    connection, peer = pair(FromRank)
    whole = encode_frame(Pong(global_rank=0, nonce=1, step_id=2))
    peer.sendall(bytes(whole) + bytes(whole)[:3])
    peer.close()
    assert connection.receive() == [Pong(global_rank=0, nonce=1, step_id=2)]
    with pytest.raises(ChannelClosed):
        connection.receive()


def test_a_blocking_channel_names_an_end_inside_a_frame(tmp_path: Path) -> None:
    """The log must tell a crash in the middle of a word from an orderly end."""
    listener = Listener.bind(f"unix:{tmp_path}/s")
    client = open_socket(listener.address, 1.0)
    channel = Channel(listener.accept(1.0), FromRank)
    client.sendall(bytes(encode_frame(Pong(global_rank=0, nonce=1, step_id=2)))[:-1])
    client.close()
    with pytest.raises(ChannelClosed, match="inside a frame"):
        channel.recv()
    listener.close()


def test_a_deadline_loses_nothing(tmp_path: Path) -> None:
    """Half a message is here when the time is up; the other half comes later."""
    listener = Listener.bind(f"unix:{tmp_path}/s")
    peer = open_socket(listener.address, 1.0)
    channel = Channel(listener.accept(1.0), FromRank)
    frame = bytes(encode_frame(Pong(global_rank=0, nonce=1, step_id=2)))
    peer.sendall(frame[:4])
    with pytest.raises(TimeoutError):
        channel.recv(0.01)
    peer.sendall(frame[4:])
    assert channel.recv(5.0) == Pong(global_rank=0, nonce=1, step_id=2)
    peer.close()
    listener.close()


def test_many_threads_may_send(tmp_path: Path) -> None:
    """Progress is reported by one thread while another answers: frames never mix."""
    listener = Listener.bind(f"unix:{tmp_path}/s")
    sender = Channel.connect(listener.address, ToRank)
    channel = Channel(listener.accept(1.0), FromRank)
    big = 10_000

    def send(nonce: int) -> None:
        for step_id in range(50):
            sender.send(Pong(global_rank=big, nonce=nonce, step_id=step_id))

    threads = [threading.Thread(target=send, args=(nonce,)) for nonce in range(4)]
    for thread in threads:
        thread.start()
    seen: dict[int, list[int]] = {}
    for _ in range(200):
        pong = channel.recv(5.0)
        seen.setdefault(pong.nonce, []).append(pong.step_id)
    for thread in threads:
        thread.join()
    assert seen == {nonce: list(range(50)) for nonce in range(4)}
    sender.close()
    listener.close()


def test_close_ends_a_wait_in_another_thread(tmp_path: Path) -> None:
    """A rank's main thread stops while its reader waits."""
    listener = Listener.bind(f"unix:{tmp_path}/s")
    channel = Channel.connect(listener.address, ToRank)
    ended = threading.Event()

    def read() -> None:
        with pytest.raises(ChannelClosed):
            channel.recv()
        ended.set()

    thread = threading.Thread(target=read)
    thread.start()
    channel.close()
    channel.close()
    assert ended.wait(5.0)
    thread.join()
    listener.close()


def test_a_slow_reader_never_blocks_the_writer_and_is_given_up_beyond_the_bound() -> None:
    """An edge that stopped reading would otherwise stop all tokens of everybody."""
    connection, peer = pair(max_pending_bytes=4_000_000)
    frame = bytearray(encode_frame(SchedulerOutput(step_id=1, epoch=0, rows=[70_000] * 200_000)))

    def write_for_ever() -> None:
        for _ in range(100):
            connection.send_frame(frame)

    with pytest.raises(ChannelClosed, match="too slowly"):
        write_for_ever()
    assert connection.num_pending_bytes < 4_000_000 + len(frame)
    peer.close()


def test_what_waits_goes_out_in_order_once_the_peer_reads() -> None:
    """Frames kept back are continued at the very byte where the socket was full."""
    connection, peer = pair()
    sent = [SchedulerOutput(step_id=i, epoch=0, rows=[70_000] * 100_000) for i in range(20)]
    for output in sent:
        connection.send(output)
    assert connection.wants_to_write
    reader, found = FrameReader(ToRank), []
    while len(found) < len(sent):
        connection.flush()
        reader.feed(peer.recv(1 << 20))
        while (message := reader.next()) is not None:
            found.append(message)
    assert same(found, sent)
    assert not connection.wants_to_write
    assert connection.num_pending_bytes == 0


def test_only_a_hello_is_expected_of_a_stranger() -> None:
    """Until the secret was shown nothing else is decoded; what came right behind it is then read as what it is."""
    connection, peer = pair(Hello)
    hello = Hello(role="edge", secret="s")
    peer.sendall(bytes(encode_frame(hello) + encode_frame(StatsRequest())))
    assert connection.receive() == [hello]
    connection.accept_as(FromEdge)
    assert connection.decode_rest() == [StatsRequest()]
    stranger, peer = pair(Hello)
    peer.sendall(bytes(encode_frame(StatsRequest())))
    with pytest.raises(ChannelClosed):
        stranger.receive()


@pytest.mark.parametrize("wrong", ["", "secreT", "secret ", "sécret", "\ud800"])
def test_a_wrong_secret_is_just_wrong(wrong: str) -> None:
    """Also one that is no text at all."""
    assert secret_matches(Hello(role="edge", secret="secret"), "secret")
    assert not secret_matches(Hello(role="edge", secret=wrong), "secret")


def test_the_socket_is_its_owners_alone_and_is_removed(tmp_path: Path) -> None:
    """Anyone who can open the file can try secrets; and nothing may be left behind."""
    listener = Listener.bind(f"unix:{tmp_path}/door")
    assert stat.S_IMODE(os.stat(tmp_path / "door").st_mode) == 0o600
    listener.close()
    listener.close()
    assert not (tmp_path / "door").exists()


def test_addresses() -> None:
    """Both kinds, IPv6 too; anything else is refused with the two forms."""
    assert parse_address("unix:/a/b:c") == ("unix", "/a/b:c")
    assert parse_address("tcp:127.0.0.1:80") == ("tcp", ("127.0.0.1", 80))
    assert parse_address("tcp:[::1]:80") == ("tcp", ("::1", 80))
    for address in ("", "unix:", "tcp:host", "tcp:host:x", "http://host:1"):
        with pytest.raises(ConfigError, match="unix:/path or tcp:host:port"):
            parse_address(address)


def test_nobody_there_is_an_error_within_the_deadline(tmp_path: Path) -> None:
    """A driver that never comes up must not hang a rank."""
    with pytest.raises(ChannelClosed, match="nobody answers"):
        open_socket(f"unix:{tmp_path}/nobody", 0.05)


def test_tcp_carries_the_same(tmp_path: Path) -> None:
    """Port 0 takes a free one; small messages are not held back for company."""
    listener = Listener.bind("tcp:127.0.0.1:0")
    client = Channel.connect(listener.address, ToRank, timeout_seconds=5.0)
    server = Channel(listener.accept(5.0), FromRank)
    server.send(Ping(nonce=1))
    assert client.recv(5.0) == Ping(nonce=1)
    client.close()
    with pytest.raises(ChannelClosed):
        server.recv(5.0)
    listener.close()
