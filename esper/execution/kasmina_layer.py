"""Host layers: Linear and Conv2d with slots for seeds, at no cost while nothing contributes.

A layer becomes a host by taking on a Kasmina subclass of its own class. Names, parameters,
state_dict keys and `isinstance` stay; `forward` is the host's own operation behind one look at
`live`, a Python tuple of what contributes just now. A seed that is germinated or in training is
not in `live`: the host's forward does not touch it, so the host's bits can't depend on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from esper.contracts.ir import Graph, reads_producer
from esper.errors import BadInput, KernelError
from esper.execution.blending import blend
from esper.execution.kernel_cache import KernelCache, instantiate
from esper.execution.state_layout import (
    GROWN_STATES,
    KasminaStateLayout,
    SeedLifecycleState,
    SlotRecord,
)

GROWN = "grown"
"""The submodule that holds a layer's live seeds, by slot."""


@dataclass(eq=False)
class Tap:
    """Keeps a producer's input for a seed of its consumer, from one forward to the next."""

    kept: Tensor | None = None

    def __reduce__(self) -> tuple[type[Tap], tuple[()]]:
        """Copied and pickled empty: what is kept belongs to one forward, and has its graph."""
        return Tap, ()

    def join(self, out: Tensor, source: Tensor) -> Tensor:
        """Keep `source`, the producer's input; its output passes unchanged."""
        self.kept = source
        return out

    def take(self) -> Tensor:
        """The input kept, which is then forgotten.

        Raises:
            KernelError: the producer has not run since the last time.
        """
        kept, self.kept = self.kept, None
        if kept is None:
            raise KernelError("a seed that reads its producer's input ran before the producer")
        return kept


@dataclass(eq=False)
class Branch:
    """A seed's module in its slot, and how it joins the host's output.

    `tap` is set for a seed that reads the producer's input; `graph` is the bound IR the module
    was built from, where it was. `scaled` says that alpha counts.
    """

    module: nn.Module
    layout: KasminaStateLayout
    layer: int
    slot: int
    graph: Graph | None = None
    tap: Tap | None = None
    scaled: bool = False

    def join(self, out: Tensor, source: Tensor) -> Tensor:
        """`out`, the host's output so far, with the seed's added to it."""
        addition = self.module(source if self.tap is None else self.tap.take())
        # The view is made here and not kept: a kept one would go stale when the model moves.
        alpha = self.layout.alpha[self.layer, self.slot] if self.scaled else None
        return blend(out, addition, alpha)


@dataclass(eq=False)
class Site:
    """What a layer knows as a host: its place in the layout, its neighbours, its seeds.

    `encoders` are the TransformerEncoders around it, innermost first, that pass nested tensors
    to fused layers; `fused` says that it lies in a TransformerEncoderLayer. `trialled` and
    `muted` are the slots that a measurement has switched on or off for now.
    """

    name: str
    index: int
    layout: KasminaStateLayout
    fused: bool = False
    encoders: tuple[nn.TransformerEncoder, ...] = ()
    producer: KasminaLayer | None = None
    branches: dict[int, Branch] = field(default_factory=dict)
    trialled: frozenset[int] = frozenset()
    muted: frozenset[int] = frozenset()
    hook: RemovableHandle | None = None

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
                parts.append(branch)
        return tuple(parts)


class KasminaLayer(nn.Module):
    """A layer that hosts seeds. `wrap` makes them; `live` is () while nothing contributes."""

    host_class: ClassVar[type[nn.Module]]
    live: tuple[Branch | Tap, ...] = ()
    site: Site

    def forward(self, input: Tensor) -> Tensor:
        """The host's output, with what its seeds add; shapes as the host's."""
        raise NotImplementedError

    def _host_forward(self, input: Tensor) -> Tensor:
        raise NotImplementedError

    def _forward_grown(self, input: Tensor) -> Tensor:
        out = self._host_forward(input)
        for part in self.live:
            out = part.join(out, input)
        return out

    def germinate(
        self,
        slot: int,
        module: nn.Module,
        *,
        kernel: str,
        reads_producer: bool = False,
        graph: Graph | None = None,
    ) -> None:
        """Put a seed into a dormant slot; it is germinated and contributes nothing yet.

        `module` maps the host's input (the producer's, if `reads_producer`) to an addition to the
        host's output; it takes the layer's training mode. `graph` is the IR it was built from.

        Raises:
            BadInput: the slot is not dormant, or no producer was traced for the layer.
        """
        self._refuse_without_producer(slot, reads_producer)
        self.site.layout.transition(self.site.index, slot, SeedLifecycleState.GERMINATED)
        self.site.layout.write(self.site.index, slot, kernel=kernel)
        self.attach(slot, module, reads_producer=reads_producer, graph=graph)

    def attach(
        self, slot: int, module: nn.Module, *, reads_producer: bool, graph: Graph | None
    ) -> None:
        """Give a slot its module, whatever its state: for germinating, and for checkpoints.

        Raises:
            BadInput: no producer was traced for a seed that reads one.
        """
        self._refuse_without_producer(slot, reads_producer)
        site = self.site
        site.branches[slot] = Branch(
            module, site.layout, site.index, slot, graph, Tap() if reads_producer else None
        )
        if GROWN not in self._modules:
            self.add_module(GROWN, nn.ModuleDict())
        grown = self._modules[GROWN]
        assert isinstance(grown, nn.ModuleDict)
        grown.training = self.training
        grown[str(slot)] = module.train(self.training)
        self.refresh()

    async def load_kernel(
        self, slot: int, kernel_id: str, cache: KernelCache, *, generator_seed: int
    ) -> None:
        """Germinate a compiled kernel in a dormant slot, its weights drawn from `generator_seed`.

        Raises:
            BadInput: the slot is not dormant, or the kernel needs a producer that is not there.
            KernelError, Unavailable: the kernel can't be had; the slot stays dormant.
        """
        template = await cache.load(kernel_id)
        self.germinate(
            slot,
            instantiate(template, generator_seed),
            kernel=kernel_id,
            reads_producer=reads_producer(template.graph),
            graph=template.graph,
        )

    def unload_kernel(self, slot: int) -> None:
        """Cull the seed in `slot` and drop its module.

        Raises:
            BadInput: the slot holds no seed, or a fossilized one, which is part of the model.
        """
        self.site.branch(slot)
        if self.site.record(slot).state is not SeedLifecycleState.CULLED:
            self.transition(slot, SeedLifecycleState.CULLED)
        self.remove(slot)

    def transition(
        self, slot: int, state: SeedLifecycleState, alpha: float | None = None
    ) -> SlotRecord:
        """Take a step of the lifecycle; `alpha` is where grafting starts, by default 0.

        For other states it counts for nothing: it is 1 for a fossilized seed, else 0. A seed that
        becomes dormant again loses its module, if it still has one.

        Raises:
            BadInput: the lifecycle has no such step.
        """
        if state in GROWN_STATES:
            self.site.branch(slot)
        begin = 1.0 if state is SeedLifecycleState.FOSSILIZED else 0.0
        if state is SeedLifecycleState.GRAFTING and alpha is not None:
            begin = alpha
        record = self.site.layout.transition(self.site.index, slot, state, alpha=begin)
        if state is SeedLifecycleState.DORMANT:
            self._detach(slot)
        self.refresh()
        return record

    def set_alpha(self, slot: int, alpha: float) -> None:
        """Set how much of a grafting seed's output counts, from 0 to 1.

        Raises:
            BadInput: the seed is not grafting, or `alpha` is out of range.
        """
        state = self.site.record(slot).state
        if state is not SeedLifecycleState.GRAFTING:
            raise BadInput(f"{self.site.name}[{slot}]", state.seed_state, "a grafting seed")
        self.site.layout.write(self.site.index, slot, alpha=alpha)
        self.refresh()

    def remove(self, slot: int) -> None:
        """Drop the module of a culled seed.

        Raises:
            BadInput: the seed is not culled.
        """
        state = self.site.record(slot).state
        if state is not SeedLifecycleState.CULLED:
            raise BadInput(f"{self.site.name}[{slot}]", state.seed_state, "a culled seed")
        self._detach(slot)
        self.refresh()

    def shed(self) -> None:
        """Let go of every seed, whatever its state, without a word to the lifecycle."""
        for slot in list(self.site.branches):
            self._detach(slot)
        self.refresh()

    def record_fault(self, slot: int) -> bool:
        """Count a fault of a seed; True when its circuit is open: the host answers alone."""
        opened = self.site.layout.record_fault(self.site.index, slot)
        self.refresh()
        return opened

    @contextmanager
    def overriding(
        self, *, trialled: frozenset[int] = frozenset(), muted: frozenset[int] = frozenset()
    ) -> Iterator[None]:
        """Inside, the `trialled` slots count in full and the `muted` ones not at all.

        Raises:
            BadInput: one of the slots holds no seed.
        """
        site = self.site
        for slot in trialled | muted:
            site.branch(slot)
        before = site.trialled, site.muted
        site.trialled, site.muted = site.trialled | trialled, site.muted | muted
        self.refresh()
        try:
            yield
        finally:
            site.trialled, site.muted = before
            self.refresh()

    def refresh(self) -> None:
        """Work out anew what contributes, here and at the producer that keeps its input."""
        branches = self.site.contributing()
        taps = tuple(part for part in self.live if isinstance(part, Tap))
        self._set_live(taps + branches)
        if self.site.producer is not None:
            own = {id(branch.tap) for branch in self.site.branches.values()}
            wanted = tuple(branch.tap for branch in branches if branch.tap is not None)
            self.site.producer.exchange_taps(own, wanted)

    def exchange_taps(self, retired: set[int], wanted: tuple[Tap, ...]) -> None:
        """As a producer: drop the taps with these ids, then keep the input for `wanted`."""
        kept = tuple(
            part for part in self.live if not isinstance(part, Tap) or id(part) not in retired
        )
        self._set_live(wanted + kept)

    def _set_live(self, live: tuple[Branch | Tap, ...]) -> None:
        # The class attribute answers while the tuple is empty: a dormant layer has no own one.
        if live:
            self.__dict__["live"] = live
        else:
            self.__dict__.pop("live", None)
        self._keep_off_fused_path(bool(live))

    def _keep_off_fused_path(self, live: bool) -> None:
        """A fused TransformerEncoderLayer calls no layer of its own, unless one has hooks."""
        site = self.site
        if not site.fused or live == (site.hook is not None):
            return
        if live:
            site.hook = self.register_forward_hook(_no_change)
        elif site.hook is not None:
            site.hook.remove()
            site.hook = None
        for encoder in site.encoders:
            # Unfused layers do not take the nested tensors that the encoder would make.
            encoder.use_nested_tensor = not any(
                isinstance(module, KasminaLayer) and module.live for module in encoder.modules()
            )

    def _detach(self, slot: int) -> None:
        branch = self.site.branches.pop(slot, None)
        if branch is None:
            return
        if branch.tap is not None and self.site.producer is not None:
            self.site.producer.exchange_taps({id(branch.tap)}, ())
        grown = self._modules[GROWN]
        assert isinstance(grown, nn.ModuleDict)
        del grown[str(slot)]
        if not grown:
            del self._modules[GROWN]

    def _refuse_without_producer(self, slot: int, reads_producer: bool) -> None:
        if reads_producer and self.site.producer is None:
            raise BadInput(
                f"{self.site.name}[{slot}]",
                "a kernel that reads the producer's input",
                "a kernel that reads the layer's own input: no producer was traced",
            )


class KasminaLinear(KasminaLayer, nn.Linear):
    """`nn.Linear` that hosts seeds."""

    host_class = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Linear`: (*, in) to (*, out)."""
        if self.live:
            return self._forward_grown(input)
        return F.linear(input, self.weight, self.bias)

    def _host_forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias)


class KasminaConv2d(KasminaLayer, nn.Conv2d):
    """`nn.Conv2d` that hosts seeds."""

    host_class = nn.Conv2d

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Conv2d`: (batch, in, height, width) to (batch, out, height', width')."""
        if self.live:
            return self._forward_grown(input)
        out: Tensor = self._conv_forward(input, self.weight, self.bias)
        return out

    def _host_forward(self, input: Tensor) -> Tensor:
        out: Tensor = self._conv_forward(input, self.weight, self.bias)
        return out


KASMINA_CLASSES: dict[type[nn.Module], type[KasminaLayer]] = {
    layer.host_class: layer for layer in (KasminaLinear, KasminaConv2d)
}
"""The host classes that can take on seeds, exactly these and no subclass."""


def become(module: nn.Module, kind: type[nn.Module]) -> None:
    """Give a module another class; its contents stay.

    Raises:
        TypeError: instances of the two classes are laid out differently.
    """
    module.__class__ = kind


def _no_change(module: nn.Module, inputs: object, output: object) -> None:
    """A forward hook that does nothing; its presence keeps fused paths off."""
