"""Kernels from a hub that fails in every way: the slot stays dormant, the model as it was.

A real server on the loopback interface, real artifacts, the real cache in its own thread.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch
from torch import nn

from esper.configs import HubConfig
from esper.contracts.blueprints import KernelTarget, builtin
from esper.contracts.kernels import KernelMetadata
from esper.core import wrap
from esper.errors import BadInput, EsperError, HubUnavailable, KernelError, Unavailable
from esper.execution import kernel_cache
from esper.execution.fetching import FetchingThread
from esper.execution.kernel_cache import KernelCache
from esper.execution.state_layout import SeedLifecycleState
from esper.services.tezzeret.compiler import compile_kernel
from esper.services.urza.http_kernels import HttpKernelSource

TOKEN = "for-this-hub-alone"
ATTEMPTS = 3

Answer = tuple[int, bytes, int]
"""Status, body, and the length that the header announces."""


class Hub:
    """Urza's two kernel routes, with a fault to inject into either."""

    def __init__(self) -> None:
        self.artifacts: dict[str, bytes] = {}
        self.known: dict[str, KernelMetadata] = {}
        self.fault: Callable[[str, Answer], Answer | None] | None = None
        self.paths: list[str] = []
        self.tokens: set[str | None] = set()
        self.released = threading.Event()
        self._server: ThreadingHTTPServer | None = None
        self._thread: threading.Thread | None = None
        # The port is this hub's also while it is down.
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]

    def stock(self, name: str, target: KernelTarget, **arguments: Any) -> str:
        compiled = compile_kernel(builtin(name, arguments), target)
        self.artifacts[compiled.metadata.kernel] = compiled.data
        self.known[compiled.metadata.kernel] = compiled.metadata
        return compiled.metadata.kernel

    def start(self) -> None:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.answer(self)

            def log_message(self, format: str, *arguments: object) -> None:
                """The tests read what matters from `paths`."""

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def stop(self) -> None:
        self.released.set()
        if self._server is not None and self._thread is not None:
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()
        self._server = None

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        self.paths.append(handler.path)
        self.tokens.add(handler.headers.get("Authorization"))
        kernel, _, part = handler.path.removeprefix("/api/v1/kernels/").partition("/")
        answer: Answer | None = (404, b"", 0)
        if kernel in self.known:
            body = (
                self.artifacts[kernel]
                if part == "artifact"
                else self.known[kernel].model_dump_json().encode()
            )
            answer = (200, body, len(body))
        if self.fault is not None:
            answer = self.fault(part, answer)
        if answer is None:
            return
        status, body, length = answer
        handler.send_response(status)
        handler.send_header("Content-Length", str(length))
        handler.end_headers()
        handler.wfile.write(body)


class Place:
    """A model that may grow, its bare twin, and the hub that it loads kernels from."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.bare = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
        self.x = torch.randn(5, 12)
        self.model = wrap(self.bare, self.x, copy=True)
        self.layer = self.model.morphology.layers["0"]
        self.target = self.model.morphology.target("0")
        self.hub = Hub()
        self.kernel = self.hub.stock("bottleneck-mlp", self.target)
        config = HubConfig(
            url=f"http://127.0.0.1:{self.hub.port}",
            token=TOKEN,
            connect_timeout_seconds=2.0,
            read_timeout_seconds=0.3,
            timeout_seconds=2.0,
            attempts=ATTEMPTS,
            backoff_seconds=0.0,
            breaker_failures=100,
        )
        self.fetching = FetchingThread(HttpKernelSource(config))

    def load(self, kernel: str | None = None) -> None:
        """As training does: on its own thread, with weights from a seed."""
        asyncio.run(self.layer.load_kernel(0, kernel or self.kernel, self.cache, generator_seed=3))

    def open(self) -> None:
        self.fetching.__enter__()
        self.cache = KernelCache(self.fetching.source, loop=self.fetching.loop)

    def close(self) -> None:
        self.fetching.__exit__(None, None, None)
        self.hub.stop()

    def untouched(self) -> bool:
        """Whether slot and model are as if no kernel had ever been asked for."""
        record = self.model.morphology.record("0", 0)
        return (
            record.state is SeedLifecycleState.DORMANT
            and record.kernel is None
            and list(self.model.state_dict()) == list(self.bare.state_dict())
            and type(self.layer).forward is nn.Linear.forward
            and all(map(torch.equal, self._passes(self.model), self._passes(self.bare)))
        )

    def _passes(self, model: nn.Module) -> list[torch.Tensor]:
        model.zero_grad()
        out = model(self.x)
        out.square().sum().backward()
        return [out.detach(), *(parameter.grad for parameter in model.parameters())]


@pytest.fixture
def place() -> Iterator[Place]:
    found = Place()
    found.hub.start()
    found.open()
    yield found
    found.close()


def refusal(place: Place, kind: type[EsperError], kernel: str | None = None) -> str:
    with pytest.raises(EsperError) as caught:
        place.load(kernel)
    assert type(caught.value) is kind
    assert caught.value.permanent is (kind is KernelError)
    assert "\n" not in str(caught.value)
    assert TOKEN not in str(caught.value)
    assert place.untouched()
    return str(caught.value)


def germinates(place: Place) -> None:
    """A retry succeeds, and the seed does what a kernel without faults does."""
    place.hub.fault = None
    place.load()
    record = place.model.morphology.record("0", 0)
    assert (record.state, record.kernel) == (SeedLifecycleState.GERMINATED, place.kernel)
    assert torch.equal(place.model(place.x), place.bare(place.x))
    assert sum(part.numel() for part in place.model.morphology.seed_parameters("0", 0)) > 0


def test_a_kernel_comes_from_the_hub_with_the_token(place: Place) -> None:
    germinates(place)
    assert place.hub.paths == [
        f"/api/v1/kernels/{place.kernel}/metadata",
        f"/api/v1/kernels/{place.kernel}/artifact",
    ]
    assert place.hub.tokens == {f"Bearer {TOKEN}"}
    found = place.cache.statistics()
    assert (found.misses, found.failures, found.pinned) == (1, 0, 1), "a seed lives on it"


def test_a_hub_that_is_down(place: Place) -> None:
    place.hub.stop()
    assert f"in {ATTEMPTS} attempts" in refusal(place, HubUnavailable)
    place.hub.start()
    germinates(place)
    assert place.cache.statistics().failures == 1


def test_a_hub_that_goes_down_between_two_kernels(place: Place) -> None:
    other = place.hub.stock("low-rank", place.target)
    asyncio.run(place.cache.load(other))
    place.hub.stop()
    refusal(place, HubUnavailable)
    place.load(other)
    assert place.model.morphology.record("0", 0).kernel == other


def of(part: str, change: Callable[[Answer], Answer | None]) -> Callable[..., Answer | None]:
    """A fault in one of the routes."""
    return lambda asked, answer: change(answer) if asked == part else answer


PARTS = pytest.mark.parametrize("part", ["metadata", "artifact"])


@PARTS
def test_a_hub_that_is_slow(place: Place, part: str) -> None:
    def sleep(_: Answer) -> None:
        place.hub.released.wait(5)

    place.hub.fault = of(part, sleep)
    assert "ReadTimeout" in refusal(place, HubUnavailable)
    place.hub.released.set()
    germinates(place)


@PARTS
def test_a_connection_that_is_cut_in_the_middle(place: Place, part: str) -> None:
    place.hub.fault = of(part, lambda answer: (answer[0], answer[1][:40], answer[2]))
    assert f"in {ATTEMPTS} attempts" in refusal(place, HubUnavailable)
    germinates(place)


@PARTS
@pytest.mark.parametrize("status", [500, 502, 503, 504, 429])
def test_a_hub_with_troubles_of_its_own(place: Place, part: str, status: int) -> None:
    place.hub.fault = of(part, lambda _: (status, b"trouble", 7))
    assert f"HTTP {status}" in refusal(place, HubUnavailable)
    germinates(place)


def test_a_fault_that_passes_while_it_is_tried_again_goes_unnoticed(place: Place) -> None:
    left = [1, 1]

    def stumble(asked: str, answer: Answer) -> Answer:
        of_bytes = asked == "artifact"
        if left[of_bytes]:
            left[of_bytes] -= 1
            return (answer[0], answer[1][:9], answer[2]) if of_bytes else (503, b"", 0)
        return answer

    place.hub.fault = stumble
    place.load()
    assert place.model.morphology.record("0", 0).kernel == place.kernel
    assert place.fetching.source.statistics().retries == 2


def test_a_body_that_is_shorter_than_the_artifact(place: Place) -> None:
    place.hub.fault = of("artifact", lambda answer: (200, answer[1][:-8], answer[2] - 8))
    assert "the body ended after" in refusal(place, HubUnavailable)
    germinates(place)


def test_a_body_that_is_longer_than_the_artifact(place: Place) -> None:
    place.hub.fault = of("artifact", lambda answer: (200, answer[1] * 1000, answer[2] * 1000))
    assert "bytes; allowed: " in refusal(place, KernelError)
    germinates(place)


def test_bytes_with_another_digest(place: Place) -> None:
    place.hub.fault = of("artifact", lambda answer: (200, answer[1][:-1] + b"?", answer[2]))
    assert "SHA-256" in refusal(place, KernelError)
    assert sum(path.endswith("/artifact") for path in place.hub.paths) == 2
    germinates(place)


def test_a_kernel_that_the_hub_does_not_have(place: Place) -> None:
    known = place.hub.known.pop(place.kernel)
    assert "does not have it" in refusal(place, KernelError)
    place.hub.known[place.kernel] = known
    germinates(place)


OTHER = pytest.mark.parametrize(
    ("layer", "update", "field"),
    [
        ("2", {}, "layer"),
        ("0", {"input_shape": (7, 12), "output_shape": (7, 8)}, "inputShape"),
        ("0", {"dtype": "float64"}, "dtype"),
    ],
    ids=["shape", "positions", "dtype"],
)


@OTHER
def test_a_kernel_for_another_layer(
    place: Place, layer: str, update: dict[str, object], field: str
) -> None:
    target = place.model.morphology.target(layer).model_copy(update=update)
    other = place.hub.stock("bottleneck-mlp", target)
    message = refusal(place, KernelError, other)
    assert f"kernel {other}: {field}: got " in message
    assert place.cache.statistics().pinned == 0
    germinates(place)


@OTHER
def test_another_layers_artifact_under_the_right_name(
    place: Place, layer: str, update: dict[str, object], field: str
) -> None:
    target = place.model.morphology.target(layer).model_copy(update=update)
    other = place.hub.stock("bottleneck-mlp", target)
    right = place.hub.known[place.kernel], place.hub.artifacts[place.kernel]
    place.hub.known[place.kernel] = place.hub.known[other].model_copy(
        update={"kernel": place.kernel}
    )
    place.hub.artifacts[place.kernel] = place.hub.artifacts[other]
    assert f"got the artifact of kernel {other}" in refusal(place, KernelError)
    place.hub.known[place.kernel], place.hub.artifacts[place.kernel] = right
    germinates(place)


def test_a_device_without_memory(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    with monkeypatch.context() as patch:
        patch.setattr(kernel_cache, "cloned", full)
        assert "no memory left on cpu" in refusal(place, Unavailable)
    assert place.cache.statistics().pinned == 0
    germinates(place)
    assert place.cache.statistics().misses == 1


def test_a_dead_hub_costs_no_time_limits_once_it_is_known_to_be_dead(place: Place) -> None:
    place.hub.stop()
    config = HubConfig(
        url=f"http://127.0.0.1:{place.hub.port}",
        attempts=2,
        backoff_seconds=0.0,
        breaker_failures=2,
        breaker_reset_seconds=3600.0,
    )
    with FetchingThread(HttpKernelSource(config)) as fetching:
        place.cache = KernelCache(fetching.source, loop=fetching.loop)
        refusal(place, HubUnavailable)
        for _ in range(20):
            assert "left alone" in refusal(place, HubUnavailable)
        found = fetching.source.statistics()
        assert (found.requests, found.refused) == (2, 20)


def test_a_slot_that_is_taken_stays_as_it_is(place: Place) -> None:
    germinates(place)
    with pytest.raises(BadInput):
        place.load()
    germinated = place.model.morphology.record("0", 0)
    assert germinated.state is SeedLifecycleState.GERMINATED
    assert place.cache.statistics().pinned == 1, "the first seed alone"


def test_prefetched_kernels_need_no_hub_any_more(place: Place) -> None:
    place.cache.prefetch([place.kernel])
    while place.cache.get(place.kernel) is None:
        assert place.fetching.loop.is_running()
    place.hub.stop()
    germinates(place)
