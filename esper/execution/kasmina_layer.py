"""Host layers: a layer with slots for seeds, at no cost while nothing contributes.

A layer becomes a host by taking on a Kasmina subclass of its own class, which has no forward of
its own: names, parameters, state_dict keys and `isinstance` stay, and what runs is the host's own
code. Only while something contributes does the layer take on a second subclass, whose forward adds
it. A seed that is germinated or in training does not contribute: the host's forward does not touch
it, so the host's bits can't depend on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, SupportsIndex, cast

from torch import Tensor, nn

from esper.contracts.ir import Graph, GraphSource, source_of
from esper.errors import BadInput, one_line
from esper.execution.artifact import check_target
from esper.execution.branches import Branch, Site, Tap
from esper.execution.checkpointing import CONTROL_FLOW, Region, current_region, in_backward
from esper.execution.kernel_cache import KernelCache
from esper.execution.state_layout import (
    ACTIVE_STATES,
    GROWN_STATES,
    SeedLifecycleState,
    SlotRecord,
    check_transition,
)

GROWN = "grown"
"""The submodule that holds a layer's live seeds, by slot."""


class KasminaLayer(nn.Module):
    """A layer that hosts seeds. `wrap` makes them; `live` is () while nothing contributes."""

    host_class: ClassVar[type[nn.Module]]
    live: tuple[Branch | Tap, ...] = ()
    site: Site

    def pickled_plain(self) -> bool:
        """Whether pickles and copies of the layer are of the class that it was wrapped from.

        They are without seeds. With them a copy stays a host and computes what this one does, but
        takes no kernels without the model; `shed` and then `release` make it plain.
        """
        return type(self) in _IMPORTABLE and "site" in self.__dict__ and not self.site.branches

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """Without its ties to the model, which restores them where it comes along."""
        reduced = super().__reduce_ex__(protocol)
        if not self.pickled_plain():
            return reduced
        _, _, state, *rest = cast("tuple[Any, ...]", reduced)
        plain = {name: value for name, value in state.items() if name not in {"site", "live"}}
        return object.__new__, (self.host_class,), plain, *rest

    def germinate(
        self,
        slot: int,
        module: nn.Module,
        *,
        kernel: str,
        source: GraphSource = "host",
        graph: Graph | None = None,
    ) -> None:
        """Put a seed into a dormant slot; it is germinated and contributes nothing yet.

        `module` maps what `source` names (the host's input, its output, or the producer's input)
        to an addition to the host's output; it takes the layer's training mode. `graph` is the IR
        it was built from.

        Raises:
            BadInput: the slot is not dormant, no producer was traced for the layer, or the seed
                would read positions that it may not.
        """
        self._refuse_without_producer(slot, source)
        self.site.admit(graph)
        self.site.layout.transition(self.site.index, slot, SeedLifecycleState.GERMINATED)
        self.site.layout.write(self.site.index, slot, kernel=kernel)
        self.attach(slot, module, source=source, graph=graph)

    def attach(
        self, slot: int, module: nn.Module, *, source: GraphSource, graph: Graph | None
    ) -> None:
        """Give a slot its module, whatever its state: for germinating, and for checkpoints.

        Raises:
            BadInput: no producer was traced for a seed that reads one.
        """
        self._refuse_without_producer(slot, source)
        site = self.site
        tap = Tap() if source == "producer" else None
        site.branches[slot] = Branch(module, site.layout, site.index, slot, source, graph, tap)
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
            KernelError, Unavailable: the kernel can't be had, or was compiled for another layer;
                the slot stays dormant.
        """
        site = self.site
        check_transition(site.record(slot).state, SeedLifecycleState.GERMINATED)
        with site.loads.counting():
            async with cache.using(kernel_id) as template:
                check_target(template, site.target())
                module = cache.instantiate(template, generator_seed)
            self.germinate(
                slot,
                module,
                kernel=kernel_id,
                source=source_of(template.graph),
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

    def record_fault(self, slot: int, reason: str) -> bool:
        """Count a fault of a seed; True when its circuit is open: the host answers alone."""
        opened = self.site.layout.record_fault(self.site.index, slot, reason)
        self.refresh()
        return opened

    def count_faults(self, slot: int, errors: int, fallbacks: int, fault: str) -> None:
        """Set a seed's faults in a row and in all, and the last of them: what ranks agreed on."""
        layout, index = self.site.layout, self.site.index
        layout.write(index, slot, errors=errors, fallbacks=fallbacks, fault=fault)
        # Where it failed elsewhere, it is here that it may be seen to work again.
        self.site.branch(slot).failing = errors > 0
        self.refresh()

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
            if not isinstance(self, LiveLayer):
                become(self, live_class(type(self)))
        else:
            self.__dict__.pop("live", None)
            if isinstance(self, LiveLayer):
                become(self, dormant_class(type(self)))
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

    def _refuse_without_producer(self, slot: int, source: GraphSource) -> None:
        if source == "producer" and self.site.producer is None:
            raise BadInput(
                f"{self.site.name}[{slot}]",
                "a kernel that reads the producer's input",
                "a kernel that reads the layer's own input: no producer was traced",
            )


class LiveLayer(KasminaLayer):
    """A host whose seeds contribute, or whose input one of its consumer's seeds reads."""

    def forward(self, input: Tensor) -> Tensor:
        """The host's output, with what its seeds add; shapes as the host's.

        A seed on trial that raises is left out, and its fault counted; what a fossilized one
        raises is raised, for it is part of the model. A forward that recomputes an earlier one,
        for activation checkpointing, leaves out what that did, and counts nothing twice.
        """
        out: Tensor = super().forward(input)
        host = out
        region = current_region()
        for part in self.live:
            if (part.failing or region is not None) and self._leaves_out(part, region):
                continue
            try:
                out = part.join(out, input, host)
            except Exception as error:
                self._answer_alone(part, error, region)
            else:
                if part.failing:
                    self._recovered(part, region)
        return out

    def _leaves_out(self, part: Branch | Tap, region: Region | None) -> bool:
        """Whether the host answers without `part`: its circuit has opened, now or at first."""
        if isinstance(part, Tap):
            return False
        if region is not None and region.repeats_without(part):
            return True
        if not part.failing or (region is not None and region.recomputing):
            return False
        # The class stays the live one till the next transition: what was computed with the seed
        # before its circuit opened may have to be computed again.
        opened = self.site.record(part.slot).circuit_open
        if opened and region is not None:
            region.leave_out(part)
        return opened

    def _answer_alone(self, part: Branch | Tap, error: Exception, region: Region | None) -> None:
        """Count the fault of a seed on trial; the host's output stands.

        Raises:
            Exception: `error`, where it is no seed's on trial, or no fault at all, or where the
                seed raises only as a region is recomputed, whose outputs it is part of already.
        """
        if isinstance(part, Tap) or not self._on_trial(part) or isinstance(error, CONTROL_FLOW):
            raise error
        if not (part.failing and in_backward()):
            part.failing = True
            reason = f"{type(error).__name__}: {one_line(str(error))}"
            self.site.layout.note_fault(self.site.index, part.slot, reason)
        if region is not None:
            if region.recomputing:
                raise error
            region.leave_out(part)

    def _recovered(self, part: Branch | Tap, region: Region | None) -> None:
        """Count the faults of a seed from 0 again, unless it has only repeated itself."""
        assert isinstance(part, Branch)
        if in_backward() or (region is not None and region.recomputing):
            return
        part.failing = False
        self.site.layout.note_recovery(self.site.index, part.slot)

    def _on_trial(self, part: Branch) -> bool:
        return self.site.record(part.slot).state in ACTIVE_STATES


class KasminaLinear(KasminaLayer, nn.Linear):
    """`nn.Linear` that hosts seeds."""

    host_class = nn.Linear


class KasminaConv1d(KasminaLayer, nn.Conv1d):
    """`nn.Conv1d` that hosts seeds."""

    host_class = nn.Conv1d


class KasminaConv2d(KasminaLayer, nn.Conv2d):
    """`nn.Conv2d` that hosts seeds."""

    host_class = nn.Conv2d


class KasminaLayerNorm(KasminaLayer, nn.LayerNorm):
    """`nn.LayerNorm` that hosts seeds."""

    host_class = nn.LayerNorm


class KasminaBatchNorm2d(KasminaLayer, nn.BatchNorm2d):
    """`nn.BatchNorm2d` that hosts seeds."""

    host_class = nn.BatchNorm2d


class KasminaEmbedding(KasminaLayer, nn.Embedding):
    """`nn.Embedding` that hosts seeds."""

    host_class = nn.Embedding


class LiveKasminaLinear(LiveLayer, KasminaLinear):
    """`KasminaLinear` while something contributes."""


class LiveKasminaConv1d(LiveLayer, KasminaConv1d):
    """`KasminaConv1d` while something contributes."""


class LiveKasminaConv2d(LiveLayer, KasminaConv2d):
    """`KasminaConv2d` while something contributes."""


class LiveKasminaLayerNorm(LiveLayer, KasminaLayerNorm):
    """`KasminaLayerNorm` while something contributes."""


class LiveKasminaBatchNorm2d(LiveLayer, KasminaBatchNorm2d):
    """`KasminaBatchNorm2d` while something contributes."""


class LiveKasminaEmbedding(LiveLayer, KasminaEmbedding):
    """`KasminaEmbedding` while something contributes."""


KASMINA_CLASSES: dict[type[nn.Module], type[KasminaLayer]] = {
    layer.host_class: layer
    for layer in (
        KasminaLinear,
        KasminaConv1d,
        KasminaConv2d,
        KasminaLayerNorm,
        KasminaBatchNorm2d,
        KasminaEmbedding,
    )
}
"""The host classes that can take on seeds, exactly these and no subclass."""

_LIVE_CLASSES: dict[type[nn.Module], type[LiveLayer]] = {
    live.__bases__[1]: live
    for live in (
        LiveKasminaLinear,
        LiveKasminaConv1d,
        LiveKasminaConv2d,
        LiveKasminaLayerNorm,
        LiveKasminaBatchNorm2d,
        LiveKasminaEmbedding,
    )
}


_IMPORTABLE = frozenset[type]({*KASMINA_CLASSES.values(), *_LIVE_CLASSES.values()})
"""The classes that a layer has as a host, unless somebody else made one of them."""


def live_class(dormant: type[nn.Module]) -> type[LiveLayer]:
    """The class that a layer of class `dormant` has while something contributes.

    Those of the Kasmina classes can be imported; a class made from one of them by somebody else
    (sharding does that, and a model that is itself a host) gets one made on the way.
    """
    if dormant not in _LIVE_CLASSES:
        body = {name: getattr(dormant, name) for name in ("__module__", "__qualname__", "__doc__")}
        _LIVE_CLASSES[dormant] = type(dormant.__name__, (LiveLayer, dormant), body)
    return _LIVE_CLASSES[dormant]


def dormant_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The class that `live_class` made `kind` of; any other class is its own."""
    return kind.__bases__[1] if kind.__bases__[:1] == (LiveLayer,) else kind


def become(module: nn.Module, kind: type[nn.Module]) -> None:
    """Give a module another class; its contents stay.

    Raises:
        TypeError: instances of the two classes are laid out differently.
    """
    module.__class__ = kind


def _no_change(module: nn.Module, inputs: object, output: object) -> None:
    """A forward hook that does nothing; its presence keeps fused paths off."""
