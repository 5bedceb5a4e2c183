"""The API server: one connection pool, plain JSON, and its refusals as errors of ours.

Objects come and go as the mappings that they are: of tens of thousands, only a few fields are ever
looked at. Every request has a time limit; the library's own is five minutes.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from contextvars import ContextVar
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlencode

import aiohttp
from kubernetes.aio.client import ApiClient, Configuration
from kubernetes.aio.client.exceptions import ApiException
from kubernetes.aio.config import ConfigException, load_incluster_config, load_kube_config

from esper.errors import ConfigError, one_line
from esper_operator.errors import ApiConflict, ApiNotFound, ApiRefused, ApiUnavailable
from esper_operator.kinds import Kind

Object = Mapping[str, Any]

READ_SECONDS = 15.0
CONNECT_SECONDS = 5.0
CHUNK = 500
"""Objects of one answer to a list."""
APPLY = "application/apply-patch+yaml"
MERGE = "application/merge-patch+json"
METADATA = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"
METADATA_LIST = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
MAX_EVENT_BYTES = 2**23
_SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")
_PASSING = frozenset({408, 429, 500, 502, 503, 504})
_CONFLICT, _NOT_FOUND = 409, 404
_NO_SUCH_FIELD = "failed to create typed patch object"

Fence = Callable[[], None]
"""Raises where a request may not be sent any more."""

_fence: ContextVar[Fence | None] = ContextVar("_fence", default=None)


def in_pod() -> bool:
    """Whether this process has a service account of its own."""
    return _SERVICE_ACCOUNT.is_file()


async def connection(kubeconfig: Path | None) -> Configuration:
    """How the API server is reached: by that file, else as this pod, else by kubectl's own file.

    Raises:
        ConfigError: the file can't be used, or there is neither.
    """
    configuration = Configuration()
    try:
        if kubeconfig is None and in_pod():
            load_incluster_config(configuration)
        else:
            file = None if kubeconfig is None else str(kubeconfig)
            await load_kube_config(file, client_configuration=configuration, persist_config=False)
    except (ConfigException, OSError, ValueError, KeyError) as error:
        raise ConfigError(
            "operator.kubeconfig",
            "none" if kubeconfig is None else str(kubeconfig),
            f"a kubeconfig file that can be read ({one_line(str(error))}), or null in a pod",
        ) from error
    return configuration


class ClusterApi:
    """Reads and writes objects; a context manager. Mutations are the Writer's alone.

    Every method raises ApiUnavailable where there is no answer in time, and ApiRefused, or one of
    its kinds, where the API server refuses.
    """

    def __init__(self, configuration: Configuration, agent: str = "esper-operator") -> None:
        """`configuration` says where the API server is, `agent` who asks, for its audit log."""
        tracing = aiohttp.TraceConfig()
        tracing.on_connection_reuseconn.append(_check_fence)
        tracing.on_connection_create_end.append(_check_fence)
        # A body goes out in a turn of its own, a head with it: the last look is right before.
        tracing.on_request_chunk_sent.append(_check_fence)
        configuration.trace_configs = [tracing]
        configuration.client_session_kwargs = {"trust_env": False}
        configuration.connection_pool_maxsize = 64
        self.configuration = configuration
        self._client = ApiClient(configuration)
        self._client.user_agent = agent

    async def __aenter__(self) -> ClusterApi:
        return self

    async def __aexit__(self, *raised: object) -> None:
        await self._client.close()

    async def get(self, kind: Kind, namespace: str, name: str) -> Object:
        """The object of that name."""
        return await self.send("GET", kind.path(namespace, name))

    async def chunks(
        self,
        kind: Kind,
        namespace: str | None,
        selecting: Mapping[str, str],
        *,
        metadata_only: bool = False,
    ) -> AsyncIterator[tuple[list[Object], str]]:
        """All objects of a kind, a few hundred at a time, each time with the list's version.

        `selecting` are selectors, as in ``{"labelSelector": "a=b"}``.
        """
        query = {"limit": str(CHUNK), **selecting}
        path = kind.path(namespace)
        accept = METADATA_LIST if metadata_only else "application/json"
        while True:
            answer = await self.send("GET", path, query=query, accept=accept)
            about = answer["metadata"]
            yield answer.get("items") or [], about["resourceVersion"]
            if not about.get("continue"):
                return
            query["continue"] = about["continue"]

    async def send(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Object | None = None,
        content_type: str = "application/json",
        accept: str = "application/json",
        seconds: float = READ_SECONDS,
        fence: Fence | None = None,
    ) -> dict[str, Any]:
        """The API server's answer to one request.

        `fence` is asked once more at the last moment, when there is a connection to send it on.
        """
        what = f"{method} {path}"
        limit = aiohttp.ClientTimeout(total=seconds, sock_connect=min(CONNECT_SECONDS, seconds))
        token = _fence.set(fence)
        try:
            answer = await self._request(
                what, method, path, query, body, content_type, accept, limit
            )
            status, data = answer.status, await answer.read()
        except (aiohttp.ClientError, TimeoutError, OSError, ApiException) as error:
            reason = one_line(str(error)) if str(error) else type(error).__name__
            raise ApiUnavailable(f"{what}: the API server gives no answer ({reason})") from error
        finally:
            _fence.reset(token)
        if status >= 400:
            raise refusal(what, status, data)
        try:
            found: dict[str, Any] = json.loads(data)
        except ValueError as error:
            raise ApiUnavailable(f"{what}: the API server's answer is no JSON") from error
        return found

    @asynccontextmanager
    async def watching(
        self,
        kind: Kind,
        namespace: str | None,
        version: str,
        selecting: Mapping[str, str],
        *,
        metadata_only: bool,
    ) -> AsyncIterator[AsyncIterator[Object]]:
        """What happens to objects of a kind from `version` on; bookmarks come along.

        A watch that is silent for too long has lost its server, and ends.
        """
        query = {"watch": "true", "allowWatchBookmarks": "true", "resourceVersion": version}
        query |= selecting
        accept = METADATA if metadata_only else "application/json"
        limit = aiohttp.ClientTimeout(sock_connect=CONNECT_SECONDS, sock_read=WATCH_SILENCE_SECONDS)
        path = kind.path(namespace)
        what = f"WATCH {path}"
        try:
            answer = await self._request(
                what, "GET", path, query, None, "application/json", accept, limit
            )
            try:
                if answer.status >= 400:
                    raise refusal(what, answer.status, await answer.read())
                yield _lines(answer.response)
            finally:
                answer.response.close()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise ApiUnavailable(f"{what}: broke off ({type(error).__name__})") from error

    async def _request(
        self,
        what: str,
        method: str,
        path: str,
        query: Mapping[str, str] | None,
        body: Object | None,
        content_type: str,
        accept: str,
        limit: aiohttp.ClientTimeout,
    ) -> Any:
        headers = {"Accept": accept, "Content-Type": content_type, **self._client.default_headers}
        await self._client.update_params_for_auth(headers, [], ["BearerToken"], path, method, body)
        url = self._client.configuration.host + path
        if query:
            url = f"{url}?{urlencode(query)}"
        rest: Any = self._client.rest_client  # whose methods have no types
        return await rest.request(method, url, headers=headers, body=body, _request_timeout=limit)


WATCH_SILENCE_SECONDS = 70.0
"""Bookmarks come every minute; a watch that is silent for longer has lost its server."""


async def _check_fence(
    session: aiohttp.ClientSession, context: SimpleNamespace, parameters: object
) -> None:
    fence = _fence.get()
    if fence is not None:
        fence()


async def _lines(response: aiohttp.ClientResponse) -> AsyncIterator[Object]:
    rest = b""
    async for piece in response.content.iter_any():
        *lines, rest = (rest + piece).split(b"\n")
        if len(rest) > MAX_EVENT_BYTES:
            raise TimeoutError
        for line in lines:
            if line:
                yield json.loads(line)


def refusal(what: str, status: int, data: bytes) -> ApiRefused | ApiUnavailable:
    """The error that an answer of that HTTP status means."""
    try:
        answer = json.loads(data)
        said, reason = str(answer.get("message", "")), str(answer.get("reason", ""))
    except (ValueError, AttributeError):
        said, reason = data[:200].decode(errors="replace"), ""
    said = one_line(said, 1000)
    if _NO_SUCH_FIELD in said:  # which comes as an error of the server's own, though it is not
        return ApiRefused(what, status, "Invalid", said)
    if status in _PASSING:
        return ApiUnavailable(f"{what}: the API server asks to come again ({status} {said})")
    kinds = {_NOT_FOUND: ApiNotFound, _CONFLICT: ApiConflict}
    return kinds.get(status, ApiRefused)(what, status, reason or str(status), said)
