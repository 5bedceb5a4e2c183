"""A port that leads to another."""

import asyncio
import os
import socket

import pytest

from tools.cluster.containers.forwarder import enter_network, forward
from tools.servers.process import HOST, free_port


async def through(port, words):
    listener = socket.create_server((HOST, 0))
    forwarding = asyncio.create_task(forward(listener, port))
    try:
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        writer.write(words)
        writer.write_eof()
        answer = await reader.read()
        writer.close()
        return answer
    finally:
        forwarding.cancel()


def test_what_is_sent_arrives_and_what_is_answered_comes_back():
    async def check():
        async def shout(reader, writer):
            writer.write((await reader.read()).upper())
            writer.close()

        async with await asyncio.start_server(shout, HOST, 0) as server:
            port = server.sockets[0].getsockname()[1]
            answers = [await through(port, word * 100_000) for word in (b"ab", b"cd")]
        assert answers == [b"AB" * 100_000, b"CD" * 100_000]

    asyncio.run(asyncio.wait_for(check(), 30))


def test_where_nobody_answers_the_connection_ends():
    assert asyncio.run(asyncio.wait_for(through(free_port(), b""), 30)) == b""


def test_a_process_that_is_not_there_has_no_network():
    with pytest.raises(OSError, match=r"ns/net"):
        enter_network(2**22 + os.getpid())
