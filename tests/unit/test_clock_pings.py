"""Pings over real sockets on this machine, between clocks that go wrong."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Iterator

import pytest
from clock_worlds import SECOND_NS, WrongClock

from truedag.tracer.record.clock_pings import TOKEN_BYTES, Pinger, Responder, keep_quickest
from truedag.tracer.record.clock_socket import Address, StampedSocket, list_addresses

HERE, THERE = WrongClock(offset_ns=10 * SECOND_NS, drift=2e-4), WrongClock(offset_ns=-4 * SECOND_NS, drift=-2e-4)


@pytest.fixture
def responder() -> Iterator[Responder]:
    responder = Responder(THERE)
    yield responder
    responder.stop()


def local(responder: Responder) -> list[Address]:
    return [("127.0.0.1", responder.port)]


def nothing() -> None:
    """No pause."""


def test_every_ping_bounds_the_difference_of_two_clocks(responder: Responder) -> None:
    pinger = Pinger(responder.token, local(responder), 1, HERE)
    began = time.monotonic_ns()
    pings = pinger.ping(50, nothing)
    ended = time.monotonic_ns()
    pinger.close()
    assert len(pings) == 50
    differences = [THERE(moment) - HERE(moment) for moment in (began, ended)]
    for sent, arrived, left, returned in pings:
        assert min(differences) <= arrived - sent
        assert left - returned <= max(differences)
        assert HERE(began) <= sent <= returned <= HERE(ended)
        assert THERE(began) <= arrived <= left <= THERE(ended)
    kept = keep_quickest(pings)
    assert min(ping[1] - ping[0] for ping in kept) == min(ping[1] - ping[0] for ping in pings)
    assert min(ping[3] - ping[2] for ping in kept) == min(ping[3] - ping[2] for ping in pings)


def test_strangers_are_not_answered(responder: Responder) -> None:
    pinger = Pinger(bytes(TOKEN_BYTES), local(responder), 1)
    assert pinger.ping(50, nothing) == []  # and gives up before the 50
    pinger.close()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        for message in (b"", b"x", responder.token, responder.token * 3, bytes(500)):
            stranger.sendto(message, ("127.0.0.1", responder.port))
        stranger.settimeout(0.2)
        with pytest.raises(TimeoutError):
            stranger.recv(100)
    pinger = Pinger(responder.token, local(responder), 1)
    assert len(pinger.ping(3, nothing)) == 3
    pinger.close()


def test_an_address_that_answers_is_found_among_those_that_do_not(responder: Responder) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        addresses = [silent.getsockname(), ("192.0.2.1", 9), *local(responder)]
        pinger = Pinger(responder.token, addresses, 1)
        assert len(pinger.ping(5, nothing)) == 5
        pinger.close()


def test_nobody_there_is_no_ping_and_no_hang() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        pinger = Pinger(bytes(TOKEN_BYTES), [silent.getsockname()], 1)
        assert pinger.ping(1000, nothing) == []
        pinger.close()


def test_a_responder_waits_for_those_who_have_not_said_goodbye(responder: Responder) -> None:
    pinger = Pinger(responder.token, local(responder), 7)
    assert pinger.ping(1, nothing)
    began = time.monotonic()
    responder.wait_for_pingers(0.2)
    assert time.monotonic() - began >= 0.2
    pinger.close()
    responder.wait_for_pingers(60.0)
    assert time.monotonic() - began < 60.0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux stamps messages as they arrive")
def test_a_message_that_is_read_late_arrived_early() -> None:
    receiver, sender = StampedSocket(), StampedSocket()
    try:
        for _ in range(100):  # the first ones may go by before the system has begun to stamp; a busy machine has doubts
            sent = time.monotonic_ns()
            assert sender.send(b"now", ("127.0.0.1", receiver.port))
            time.sleep(0.02)
            before_reading = time.monotonic_ns()
            got = receiver.receive(10.0)
            assert got is not None
            assert sent <= got[2] <= time.monotonic_ns()
            if got[2] < before_reading:
                break
        else:
            pytest.fail("no message had arrived before it was read")
    finally:
        receiver.close()
        sender.close()


def test_a_host_has_addresses_and_the_local_one_comes_last() -> None:
    addresses = list_addresses()
    assert addresses[-1] == "127.0.0.1"
    assert len(set(addresses)) == len(addresses)
    assert "::1" not in addresses
