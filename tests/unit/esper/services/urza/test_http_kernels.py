"""Kernels over HTTP: what is tried again, what is refused, and what never leaves the process."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.configs import HubConfig
from esper.contracts.kernels import KernelMetadata
from esper.errors import ConfigError, EsperError, HubUnavailable, KernelError
from esper.services.urza.http_kernels import MAX_RETRY_AFTER_SECONDS, HttpKernelSource
from esper.utils.circuit_breaker import CircuitState

KERNEL = "0123456789" * 4
BYTES = b"the artifact of a kernel" * 9
TOKEN = "a-token-that-nobody-sees"
METADATA = KernelMetadata(
    kernel=KERNEL,
    blueprint_digest="0" * 64,
    artifact_digest=hashlib.sha256(BYTES).hexdigest(),
    artifact_bytes=len(BYTES),
)

Answer = httpx.Response | Exception


def told(**changes: Any) -> httpx.Response:
    return httpx.Response(200, content=METADATA.model_copy(update=changes).model_dump_json())


def body(data: bytes = BYTES) -> httpx.Response:
    return httpx.Response(200, content=data)


class Scripted(httpx.AsyncBaseTransport):
    """Gives the answers it was given, in order, the last one again and again."""

    def __init__(self, answers: Sequence[Answer | Callable[[], Answer]]) -> None:
        self.answers = list(answers)
        self.requests: list[httpx.Request] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        await asyncio.sleep(0)  # as on a network, others get their turn
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if callable(answer):
            answer = answer()
        if isinstance(answer, Exception):
            raise answer
        # A fresh one each time: a response can be read once.
        return httpx.Response(answer.status_code, headers=answer.headers, stream=answer.stream)


class Hub:
    """A source over scripted answers, with a clock that only its waits move."""

    def __init__(self, *answers: Answer | Callable[[], Answer], **settings: Any) -> None:
        self.transport = Scripted(answers)
        self.now = 0.0
        self.waits: list[float] = []
        self.bounds: list[tuple[float, float]] = []
        self.config = HubConfig(url="http://hub.example:8000/esper", **settings)
        self.source = HttpKernelSource(
            self.config,
            transport=self.transport,
            clock=lambda: self.now,
            sleep=self._sleep,
            uniform=self._uniform,
        )

    async def _sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds

    def _uniform(self, low: float, high: float) -> float:
        self.bounds.append((low, high))
        return high

    def metadata(self, kernel: str = KERNEL) -> KernelMetadata:
        return asyncio.run(self.source.metadata(kernel))

    def artifact(self) -> bytes:
        return asyncio.run(self.source.artifact(KERNEL))

    def refusal(self, kind: type[EsperError], *, artifact: bool = False) -> str:
        with pytest.raises(kind) as caught:
            self.artifact() if artifact else self.metadata()
        assert type(caught.value) is kind
        assert "\n" not in str(caught.value)
        return str(caught.value)


def test_a_kernel_is_asked_for_under_the_configured_address() -> None:
    hub = Hub(told(), body(), token=TOKEN)
    assert hub.metadata() == METADATA
    assert hub.artifact() == BYTES
    assert [str(request.url) for request in hub.transport.requests] == [
        f"http://hub.example:8000/esper/api/v1/kernels/{KERNEL}/metadata",
        f"http://hub.example:8000/esper/api/v1/kernels/{KERNEL}/artifact",
    ]
    for request in hub.transport.requests:
        assert request.method == "GET"
        assert request.headers["Authorization"] == f"Bearer {TOKEN}"
        assert request.headers["Accept-Encoding"] == "identity"
    found = hub.source.statistics()
    assert (found.requests, found.retries, found.failures, found.refused) == (2, 0, 0, 0)
    assert found.received_bytes == len(BYTES) + len(told().content)
    assert found.circuit is CircuitState.CLOSED


def test_an_artifact_asked_for_alone_brings_its_metadata() -> None:
    hub = Hub(told(), body())
    assert hub.artifact() == BYTES
    assert "Authorization" not in hub.transport.requests[0].headers


def test_without_an_address_there_is_no_source() -> None:
    with pytest.raises(ConfigError, match=r"hub\.url"):
        HttpKernelSource(HubConfig())


@pytest.mark.parametrize("kernel", ["", "../" * 13 + "a", "A" * 40, KERNEL + "\n", "0" * 39])
def test_what_is_no_kernel_id_reaches_no_address(kernel: str) -> None:
    hub = Hub(told())
    with pytest.raises(KernelError, match="allowed: a kernel's id, 40 hex digits"):
        hub.metadata(kernel)
    assert not hub.transport.requests


TEMPORARY = [
    httpx.ConnectError("refused"),
    httpx.ConnectTimeout("slow"),
    httpx.ReadTimeout("slow"),
    httpx.ReadError("reset"),
    httpx.RemoteProtocolError("peer closed connection"),
    httpx.Response(429),
    httpx.Response(408),
    httpx.Response(425),
    httpx.Response(500),
    httpx.Response(502),
    httpx.Response(503),
    httpx.Response(504),
]


@pytest.mark.parametrize("answer", TEMPORARY, ids=lambda a: repr(a))
def test_what_may_heal_is_tried_again(answer: Answer) -> None:
    hub = Hub(answer, answer, told(), attempts=3)
    assert hub.metadata() == METADATA
    found = hub.source.statistics()
    assert (found.requests, found.retries, found.failures) == (3, 2, 2)


@pytest.mark.parametrize("answer", TEMPORARY, ids=lambda a: repr(a))
def test_what_does_not_heal_in_time_is_temporary(answer: Answer) -> None:
    hub = Hub(answer, attempts=3)
    message = hub.refusal(HubUnavailable)
    assert "in 3 attempts" in message
    assert "see hub.url" in message
    assert len(hub.transport.requests) == 3
    assert len(hub.waits) == 2


def test_pauses_double_up_to_a_limit_with_full_jitter() -> None:
    hub = Hub(
        httpx.Response(503),
        attempts=6,
        backoff_seconds=1.0,
        max_backoff_seconds=5.0,
        breaker_failures=100,
    )
    hub.refusal(HubUnavailable)
    assert hub.bounds == [(0.0, 1.0), (0.0, 2.0), (0.0, 4.0), (0.0, 5.0), (0.0, 5.0)]
    assert hub.waits == [1.0, 2.0, 4.0, 5.0, 5.0]


def in_seconds(seconds: float) -> str:
    return format_datetime(datetime.now(UTC) + timedelta(seconds=seconds), usegmt=True)


@pytest.mark.parametrize(
    ("header", "low", "high"),
    [
        ("7", 7, 7),
        ("0", 0.25, 0.25),
        ("86400", MAX_RETRY_AFTER_SECONDS, MAX_RETRY_AFTER_SECONDS),
        (20.0, 1, 20),
        (1e6, MAX_RETRY_AFTER_SECONDS, MAX_RETRY_AFTER_SECONDS),
        (-100.0, 0.25, 0.25),
        ("soon", 0.25, 0.25),
        ("-3", 0.25, 0.25),
        ("9" * 400, MAX_RETRY_AFTER_SECONDS, MAX_RETRY_AFTER_SECONDS),
        ("Wed, 21 Oct 2015 07:28:00", 0.25, 0.25),
    ],
)
def test_the_hub_says_how_long_to_wait_up_to_a_limit(
    header: str | float, low: float, high: float
) -> None:
    # A number stands for a date that many seconds from now.
    header = in_seconds(header) if isinstance(header, float) else header
    busy = httpx.Response(503, headers={"Retry-After": header})
    hub = Hub(busy, told(), backoff_seconds=0.25)
    assert hub.metadata() == METADATA
    assert low <= hub.waits[0] <= high


@given(st.text(max_size=40))
def test_no_wish_to_be_left_alone_breaks_a_request(text: str) -> None:
    busy = httpx.Response(503, headers={"Retry-After": text.encode()})
    hub = Hub(busy, told())
    assert hub.metadata() == METADATA
    assert 0.0 <= hub.waits[0] <= MAX_RETRY_AFTER_SECONDS


@pytest.mark.parametrize("status", [404, 410, 422])
def test_a_kernel_that_the_hub_does_not_have(status: int) -> None:
    hub = Hub(httpx.Response(status))
    assert f"the hub does not have it (HTTP {status})" in hub.refusal(KernelError)
    assert len(hub.transport.requests) == 1


@pytest.mark.parametrize(
    ("status", "setting"), [(400, "url"), (401, "token"), (403, "token"), (418, "url")]
)
def test_other_refusals_are_permanent_and_name_a_setting(status: int, setting: str) -> None:
    hub = Hub(httpx.Response(status))
    message = hub.refusal(KernelError)
    assert f"HTTP {status}" in message
    assert f"see hub.{setting}" in message
    assert len(hub.transport.requests) == 1


def test_what_is_encoded_is_refused_as_what_it_is() -> None:
    for answer in (told(), body()):
        answer.headers["Content-Encoding"] = "gzip"
        hub = Hub(answer)
        assert "got Content-Encoding gzip" in hub.refusal(KernelError)
        assert len(hub.transport.requests) == 1


@pytest.mark.parametrize("url", ["http://xn--a", "http://host/\x00"])
def test_an_address_that_is_none_is_refused_at_once(url: str) -> None:
    with pytest.raises(ConfigError, match=r"^hub\.url: got "):
        HttpKernelSource(HubConfig.model_construct(url=url))


@pytest.mark.parametrize("place", ["http://elsewhere.example/", "/esper/other"])
def test_no_redirect_is_followed(place: str) -> None:
    hub = Hub(httpx.Response(307, headers={"Location": place}), told(), token=TOKEN)
    assert "HTTP 307" in hub.refusal(KernelError)
    assert len(hub.transport.requests) == 1


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (httpx.Response(200, content=b"<html>"), "no kernel's metadata"),
        (httpx.Response(200, content=b"[" * 10_000), "no kernel's metadata"),
        (httpx.Response(200, content=b'{"kernel": 3}'), "no kernel's metadata"),
        (httpx.Response(200, content=b" " * 70_000), "got more than 65536 bytes"),
        (told(kernel="f" * 40), "the hub answered with kernel ffff"),
        (told(artifact_bytes=2**30), "see hub.max_artifact_bytes"),
    ],
)
def test_metadata_that_is_none(answer: httpx.Response, message: str) -> None:
    assert message in Hub(answer).refusal(KernelError)


def test_a_body_that_ends_early_is_fetched_again() -> None:
    hub = Hub(told(), body(BYTES[:-1]), body(b""), body())
    assert hub.artifact() == BYTES
    assert hub.source.statistics().retries == 2
    hub = Hub(told(), body(BYTES[:-1]), attempts=3)
    message = hub.refusal(HubUnavailable, artifact=True)
    assert f"ended after {len(BYTES) - 1} of {len(BYTES)} bytes" in message


def test_wrong_bytes_are_fetched_once_more() -> None:
    wrong = body(b"?" + BYTES[1:])
    hub = Hub(told(), wrong, body())
    assert hub.artifact() == BYTES
    hub = Hub(told(), wrong, lambda: body(b"?" + BYTES[1:]), body())
    message = hub.refusal(KernelError, artifact=True)
    assert "twice; allowed: " + METADATA.artifact_digest in message
    assert len(hub.transport.requests) == 3


class Endless(httpx.AsyncByteStream):
    """A body without an end, which counts what was taken of it."""

    def __init__(self) -> None:
        self.given = 0

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            self.given += 64
            yield b"x" * 64


@pytest.mark.parametrize("artifact", [False, True])
def test_no_more_is_read_than_was_announced(artifact: bool) -> None:
    stream = Endless()
    endless = httpx.Response(200, stream=stream)
    hub = Hub(*([told()] if artifact else []), endless)
    limit = len(BYTES) if artifact else 2**16
    assert f"more than {limit} bytes" in hub.refusal(KernelError, artifact=artifact)
    assert stream.given <= limit + 64


class Dripping(httpx.AsyncByteStream):
    """A body that comes byte by byte and takes longer than anyone waits."""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            await asyncio.sleep(0.01)
            yield b""


def test_a_request_ends_even_if_bytes_keep_dripping() -> None:
    hub = Hub(lambda: httpx.Response(200, stream=Dripping()), timeout_seconds=0.05, attempts=2)
    assert "TimeoutError" in hub.refusal(HubUnavailable)
    assert len(hub.transport.requests) == 2


def test_a_dead_hub_is_left_alone_until_a_trial_finds_it_alive() -> None:
    hub = Hub(
        *[httpx.ConnectError("refused")] * 4,
        told(),
        attempts=2,
        breaker_failures=3,
        breaker_reset_seconds=60.0,
        backoff_seconds=0.0,
    )
    assert "in 2 attempts" in hub.refusal(HubUnavailable)
    assert "left alone for 60.0 s more" in hub.refusal(HubUnavailable)
    assert len(hub.transport.requests) == 3
    for _ in range(5):
        hub.refusal(HubUnavailable)
    assert len(hub.transport.requests) == 3
    assert hub.source.statistics().refused == 6
    assert hub.source.statistics().circuit is CircuitState.OPEN
    hub.now += 61.0
    hub.refusal(HubUnavailable)
    assert len(hub.transport.requests) == 4
    hub.now += 61.0
    assert hub.metadata() == METADATA
    assert hub.source.statistics().circuit is CircuitState.CLOSED


def test_one_trial_goes_out_however_many_ask() -> None:
    async def scenario() -> None:
        hub = Hub(httpx.Response(503), told, attempts=1, breaker_failures=1)
        with pytest.raises(HubUnavailable):
            await hub.source.metadata(KERNEL)
        hub.now += 31.0
        outcomes = await asyncio.gather(
            *(hub.source.metadata(KERNEL) for _ in range(10)), return_exceptions=True
        )
        assert outcomes[0] == METADATA
        assert all(isinstance(outcome, HubUnavailable) for outcome in outcomes[1:])
        assert len(hub.transport.requests) == 2

    asyncio.run(scenario())


def test_a_refusal_shows_that_the_hub_is_alive() -> None:
    hub = Hub(httpx.Response(404), attempts=1, breaker_failures=2)
    for _ in range(5):
        hub.refusal(KernelError)
    assert hub.source.statistics().circuit is CircuitState.CLOSED


def test_a_request_that_is_broken_off_says_nothing_about_the_hub() -> None:
    async def scenario() -> None:
        hub = Hub(
            httpx.Response(503),
            lambda: httpx.Response(200, stream=Dripping()),
            attempts=1,
            breaker_failures=1,
        )
        with pytest.raises(HubUnavailable):
            await hub.source.metadata(KERNEL)
        hub.now += 31.0
        trial = asyncio.create_task(hub.source.metadata(KERNEL))
        for _ in range(20):
            await asyncio.sleep(0)
        assert len(hub.transport.requests) == 2
        with pytest.raises(HubUnavailable, match="left alone"):
            await hub.source.metadata(KERNEL)
        trial.cancel()
        await asyncio.gather(trial, return_exceptions=True)
        assert hub.source.statistics().circuit is CircuitState.HALF_OPEN

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "answer", [*TEMPORARY, httpx.Response(401), httpx.Response(302), httpx.Response(200)]
)
def test_the_token_shows_in_no_error(answer: Answer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    hub = Hub(answer, attempts=2, token=TOKEN)
    with pytest.raises(EsperError) as caught:
        hub.metadata()
    error: BaseException | None = caught.value
    while error is not None:
        assert TOKEN not in f"{error!s} {error!r}"
        error = error.__cause__
    assert TOKEN not in caplog.text + repr(hub.config) + str(hub.source.statistics())


def test_no_proxy_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "ALL_PROXY", "http_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    source = HttpKernelSource(HubConfig(url="http://127.0.0.1:8"))
    assert not source._requests._client._mounts
    assert not source._requests._client.trust_env
