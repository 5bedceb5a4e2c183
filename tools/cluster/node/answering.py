"""The node's own address: its health, the logs for `kubectl logs`, and what tests ask of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

from tools.cluster.node.container import Container

if TYPE_CHECKING:
    from tools.cluster.node.agent import Node

HOST = "127.0.0.1"
POLL_SECONDS = 0.1


class NotThereError(Exception):
    """No such pod, container or path."""


class Answering:
    """HTTPS with the certificate of the API server, which asks here for logs.

    ``GET /healthz``; ``GET /containers``; ``POST /oom/NAMESPACE/POD/CONTAINER``;
    ``GET /containerLogs/NAMESPACE/POD/CONTAINER?follow=&tailLines=&previous=``.
    """

    def __init__(self, node: Node) -> None:
        self._node = node

    async def serve(self) -> None:
        """Answer until cancelled."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        settings = self._node._settings
        context.load_cert_chain(settings["certificate"], settings["key"])
        server = await asyncio.start_server(self._answer, HOST, self._node.port, ssl=context)
        async with server:
            await server.serve_forever()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            method, target, _ = head.split("\r\n")[0].split(" ", 2)
            try:
                body = self._found(method, target)
                status = HTTPStatus.OK
            except NotThereError as missing:
                body, status = _once(str(missing).encode()), HTTPStatus.NOT_FOUND
            writer.write(
                f"HTTP/1.1 {status.value} {status.phrase}\r\n"
                "Content-Type: text/plain\r\nConnection: close\r\n\r\n".encode()
            )
            async for chunk in body:
                writer.write(chunk)
                await writer.drain()
        with contextlib.suppress(OSError):
            writer.close()
            await writer.wait_closed()

    def _found(self, method: str, target: str) -> AsyncIterator[bytes]:
        address = urlsplit(target)
        query = {name: values[-1] for name, values in parse_qs(address.query).items()}
        match [method, *address.path.strip("/").split("/")]:
            case ["GET", "healthz"]:
                return _once(b"ok")
            case ["GET", "containers"]:
                return _once(json.dumps(self._containers()).encode())
            case ["POST", "oom", namespace, pod, container]:
                process = self._container(namespace, pod, container).process
                if process is None or process.pid is None:
                    raise NotThereError(f"container {container} of {namespace}/{pod} does not run")
                process.run_out_of_memory()
                return _once(b"ok")
            case ["GET", "containerLogs", namespace, pod, container]:
                return _log_of(self._container(namespace, pod, container), query)
        raise NotThereError(f"{method} {address.path}")

    def _containers(self) -> list[dict[str, object]]:
        return [
            {
                "namespace": worker.pod["metadata"]["namespace"],
                "pod": worker.pod["metadata"]["name"],
                "container": container.view.name,
                "pid": container.process.pid,
                "address": worker.address,
                "folder": str(worker.folder / container.view.name),
            }
            for worker in self._node.workers.values()
            for container in worker.containers
            if container.process is not None and container.process.pid is not None
        ]

    def _container(self, namespace: str, pod: str, name: str) -> Container:
        for worker in self._node.workers.values():
            meta = worker.pod["metadata"]
            if (meta["namespace"], meta["name"]) == (namespace, pod):
                for container in worker.containers:
                    if container.view.name == name:
                        return container
        raise NotThereError(f"container {name} of {namespace}/{pod} is not on this node")


async def _once(content: bytes) -> AsyncIterator[bytes]:
    yield content


async def _log_of(container: Container, query: dict[str, str]) -> AsyncIterator[bytes]:
    process = container.process
    if process is None:
        return
    path: Path = process.log
    if query.get("previous") == "true":
        path = path.with_name(f"{container.view.restarts - 1}.log")
    position = 0
    if path.is_file() and (lines := query.get("tailLines")) is not None:
        content = path.read_bytes()
        kept = content.splitlines(keepends=True)[-int(lines) :] if int(lines) else []
        position = len(content) - sum(map(len, kept))
    while True:
        ended = not container.at_work
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            file.seek(position)
            content = file.read()
            position += len(content)
            yield content
        if ended or query.get("follow") != "true":
            return
        await asyncio.sleep(POLL_SECONDS)
