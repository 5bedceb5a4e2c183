"""A way to a server that can be cut: refused, or silent as a network that loses every packet."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Self

from tools.servers.process import HOST, free_port

CHUNK_BYTES = 65536


class TcpProxy:
    """Passes connections to `port` of this class on to `target` of the loopback.

    A context manager; a thread does the work. Ways to be cut: `refuse` ends every connection and
    refuses new ones; `hang` keeps them open, takes new ones, and lets no byte through. `heal` ends
    either: what hung goes on, and nothing that was sent is lost.
    """

    def __init__(self, target: int, *, port: int = 0) -> None:
        """`target` is a port; `port` 0 means a free one."""
        self.target = target
        self.port = port or free_port()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._flowing = asyncio.Event()
        self._listening: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._serving: set[asyncio.Task[None]] = set()

    def refuse(self) -> None:
        """End every connection, and refuse new ones."""
        self._run(self._refuse())

    def hang(self) -> None:
        """Let no byte through, without a word to either side."""
        self._run(self._set_flowing(False))

    def heal(self) -> None:
        """Work again as if nothing had been."""
        self._run(self._listen())
        self._run(self._set_flowing(True))

    @property
    def connections(self) -> int:
        """How many clients are connected."""
        return len(self._serving)

    def start(self) -> Self:
        """Begin to listen."""
        self._thread.start()
        self.heal()
        return self

    def stop(self) -> None:
        """End every connection and the thread."""
        self._run(self._refuse())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _set_flowing(self, flowing: bool) -> None:
        if flowing:
            self._flowing.set()
        else:
            self._flowing.clear()

    async def _listen(self) -> None:
        if self._listening is None:
            self._listening = await asyncio.start_server(self._serve, HOST, self.port)

    async def _refuse(self) -> None:
        if self._listening is not None:
            self._listening.close()
            self._listening = None
        for writer in tuple(self._writers):
            _reset(writer)
        self._flowing.set()  # what hung finds its connection gone
        await asyncio.gather(*self._serving, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        ends = [writer]
        self._writers.add(writer)
        try:
            await self._flowing.wait()
            there, here = await asyncio.open_connection(HOST, self.target)
            ends.append(here)
            self._writers.add(here)
            await asyncio.gather(self._pass(reader, here), self._pass(there, writer))
        except OSError:
            pass  # nobody is there: the client learns it as from the server itself
        finally:
            for end in ends:
                end.close()
                self._writers.discard(end)
            self._serving.discard(task)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while chunk := await reader.read(CHUNK_BYTES):
                await self._flowing.wait()
                writer.write(chunk)
                await writer.drain()
            await self._flowing.wait()
            if writer.can_write_eof():
                writer.write_eof()


def _reset(writer: asyncio.StreamWriter) -> None:
    """End a connection as a machine that knows nothing of it: with a reset, and at once."""
    end = writer.get_extra_info("socket")
    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
