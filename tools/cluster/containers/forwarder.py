"""A port of this machine's loopback that leads to a port inside a machine of a cluster.

The socket is opened here, then the process moves into the network of the machine: so nothing of
the cluster's network is seen outside of it.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from tools.servers.process import HOST

_CLONE_NEWNET = 0x40000000
_CHUNK = 65536


def enter_network(process: int) -> None:
    """Move this thread into the network namespace of a process.

    Raises:
        OSError: there is no such process, or it is not allowed.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    with Path(f"/proc/{process}/ns/net").open() as namespace:
        if libc.setns(namespace.fileno(), _CLONE_NEWNET):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))


async def forward(listener: socket.socket, port: int) -> None:
    """Lead each connection to `port` of the loopback, until cancelled."""
    server = await asyncio.start_server(lambda r, w: _connected(r, w, port), sock=listener)
    async with server:
        await server.serve_forever()


async def _connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int) -> None:
    try:
        there, back = await asyncio.open_connection(HOST, port)
    except OSError:  # nobody answers: the caller is told so in the same way
        writer.close()
        return
    try:
        await asyncio.gather(_copied(reader, back), _copied(there, writer))
    finally:
        back.close()
        writer.close()


async def _copied(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Copy until one end has said all, then tell the other so; it may have more to say."""
    try:
        while chunk := await reader.read(_CHUNK):
            writer.write(chunk)
            await writer.drain()
        writer.write_eof()
    except OSError:
        writer.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Forward until it is ended."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--listen", type=int, required=True, help="the port here")
    parser.add_argument("--process", type=int, required=True, help="of the machine")
    parser.add_argument("--port", type=int, required=True, help="the one there")
    arguments = parser.parse_args(argv)
    listener = socket.create_server((HOST, arguments.listen), backlog=128)
    enter_network(arguments.process)
    asyncio.run(forward(listener, arguments.port))
    return 0


if __name__ == "__main__":
    sys.exit(main())
