"""What a host layer knows of its seeds: their branches, and the site they stand on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from esper.contracts.ir import Graph, GraphSource, KernelTarget
from esper.errors import BadInput, KernelError, WrapError
from esper.execution.blending import blend
from esper.execution.state_layout import KasminaStateLayout, SeedLifecycleState, SlotRecord

if TYPE_CHECKING:
    from esper.execution.kasmina_layer import KasminaLayer


@dataclass(eq=False)
class Tap:
    """Keeps a producer's input for a seed of its consumer, from one forward to the next.

    It is not forgotten once read: activation checkpointing runs the consumer a second time.
    """

    kept: Tensor | None = None
    failing: ClassVar[bool] = False

    def __reduce__(self) -> tuple[type[Tap], tuple[()]]:
        """Copied and pickled empty: what is kept belongs to one forward, and has its graph."""
        return Tap, ()

    def join(self, out: Tensor, source: Tensor, host: Tensor) -> Tensor:
        """Keep `source`, the producer's input; its output passes unchanged."""
        del host
        self.kept = source
        return out

    def take(self) -> Tensor:
        """The input kept.

        Raises:
            KernelError: the producer has not run yet.
        """
        if self.kept is None:
            raise KernelError("a seed that reads its producer's input ran before the producer")
        return self.kept


@dataclass(eq=False)
class Branch:
    """A seed's module in its slot, and how it joins the host's output.

    `source` says what the module reads: the layer's input ("host"), its output before any seed is
    added ("output"), or the producer's input, which `tap` keeps. `graph` is the bound IR the
    module was built from, where it was. `scaled` says that alpha counts, and `failing` that the
    last call raised.
    """

    module: nn.Module
    layout: KasminaStateLayout
    layer: int
    slot: int
    source: GraphSource = "host"
    graph: Graph | None = None
    tap: Tap | None = None
    scaled: bool = False
    failing: bool = False
    _alpha: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copied without its view of the layout, which would not follow the copied layout."""
        return self.__dict__ | {"_alpha": None}

    def join(self, out: Tensor, source: Tensor, host: Tensor) -> Tensor:
        """`out`, the host's output so far, with the seed's added to it.

        `source` is the layer's input and `host` its output without any seed.
        """
        if self.tap is not None:
            source = self.tap.take()
        elif self.source == "output":
            source = host
        seed = self.module(source)
        # A kernel was found to fit its layer when it was bound; a module of anybody's was not.
        if self.graph is None and seed.shape != host.shape:
            raise KernelError(
                f"the seed's output is {tuple(seed.shape)}, its host's {tuple(host.shape)}"
            )
        return blend(out, seed, self.alpha() if self.scaled else None)

    def alpha(self) -> Tensor:
        """The slot's alpha in the layout, 0-d."""
        if self._alpha is None:
            self._alpha = self.layout.alpha[self.layer, self.slot]
        return self._alpha

    def look_again(self) -> None:
        """Forget the view of the layout, whose tensors may have moved."""
        self._alpha = None


@dataclass
class LoadStatistics:
    """How often kernels were loaded into a model's seeds, in vain or not, and how long it took."""

    count: int = 0
    failures: int = 0
    seconds: float = 0.0
    slowest_seconds: float = 0.0

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count and time what happens inside as one load."""
        started = time.perf_counter()
        try:
            yield
        except BaseException:
            self.failures += 1
            raise
        finally:
            taken = time.perf_counter() - started
            self.count += 1
            self.seconds += taken
            self.slowest_seconds = max(self.slowest_seconds, taken)


@dataclass(eq=False)
class Site:
    """What a layer knows as a host: its place in the layout, its neighbours, its seeds.

    `target` says what a kernel for the layer is compiled for, `admit` refuses the graph of a seed
    that has no place here, `loads` counts the model's kernels.

    `encoders` are the TransformerEncoders around it, innermost first, that pass nested tensors
    to fused layers; `fused` says that it lies in a TransformerEncoderLayer. `trialled` and
    `muted` are the slots that a measurement has switched on or off for now.

    Pickled and copied without what lies outside the layer: the model's Morphology brings it back,
    where it comes along.
    """

    name: str
    index: int
    layout: KasminaStateLayout
    target: Callable[[], KernelTarget]
    admit: Callable[[Graph | None], None]
    loads: LoadStatistics
    fused: bool = False
    encoders: tuple[nn.TransformerEncoder, ...] = ()
    producer: KasminaLayer | None = None
    branches: dict[int, Branch] = field(default_factory=dict)
    trialled: frozenset[int] = frozenset()
    muted: frozenset[int] = frozenset()
    hook: RemovableHandle | None = None

    def __getstate__(self) -> dict[str, Any]:
        """All but what would drag the model along."""
        model = {"target": _without_model, "admit": _any_seed, "producer": None, "encoders": ()}
        return self.__dict__ | model

    def record(self, slot: int) -> SlotRecord:
        """The host twin of a slot of this layer."""
        return self.layout.record(self.index, slot)

    def branch(self, slot: int) -> Branch:
        """The seed in `slot`.

        Raises:
            BadInput: the slot holds none.
        """
        state = self.record(slot).state
        if slot not in self.branches:
            raise BadInput(f"{self.name}[{slot}]", state.seed_state, "a slot that holds a seed")
        return self.branches[slot]

    def contributing(self) -> tuple[Branch, ...]:
        """The branches whose output counts, in slot order, each told whether alpha scales it."""
        parts = []
        for slot, branch in sorted(self.branches.items()):
            record = self.record(slot)
            if slot in self.muted or record.circuit_open:
                continue
            grafting = record.state is SeedLifecycleState.GRAFTING and record.alpha > 0.0
            full = slot in self.trialled or record.state is SeedLifecycleState.FOSSILIZED
            if full or grafting:
                branch.scaled = not full
                branch.look_again()
                parts.append(branch)
        return tuple(parts)


def _without_model() -> KernelTarget:
    raise WrapError("layer", "one copied or unpickled without its model", "a layer of its model")


def _any_seed(graph: Graph | None) -> None:
    """A layer without its model can't tell what its neighbours would feel."""
