"""What can grow in a wrapped model, and what has; all changes of its structure pass here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from pydantic import JsonValue, ValidationError
from torch import nn

from esper.contracts.enums import SeedState
from esper.contracts.ir import (
    Graph,
    GraphSource,
    KernelTarget,
    LayerGeometry,
    ProducerDescription,
)
from esper.core.positions import refuse_mixing
from esper.core.probing import LayerShapes, probe
from esper.core.tracing import Dataflow, WidenPair
from esper.errors import WrapError
from esper.execution.branches import Branch, LoadStatistics, Site, Tap
from esper.execution.kasmina_layer import GROWN, KasminaLayer, become
from esper.execution.state_layout import (
    GROWN_STATES,
    KasminaStateLayout,
    SeedLifecycleState,
    SlotRecord,
)

ROOT = "model"
"""The name of a model that is itself a host layer; torch's own name for it is empty."""


class Morphology:
    """The hosts of one model, their seeds and their state.

    `layers` are the hosts by name, in execution order once probed; `refused` names the layers
    that can't host, `unmixed` those whose positions may not look at each other, with the reason;
    `edges` are dataflow pairs (producer, consumer). Layers are
    named by their `named_modules` name throughout, slots from 0. Unknown names raise WrapError,
    steps that the lifecycle does not have BadInput.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, KasminaLayer],
        refused: Mapping[str, str],
        *,
        seeds_per_layer: int,
    ) -> None:
        self._model = model
        self.layers = dict(layers)
        self.refused = dict(refused)
        self._refuse_taken_names()
        self.seeds_per_layer = seeds_per_layer
        self.parameters_base = sum(parameter.numel() for parameter in model.parameters())
        self.probed = False
        self._dataflow = Dataflow()
        self._shapes: dict[str, LayerShapes] = {}
        self.unmixed: dict[str, str] = {}
        self.loads = LoadStatistics()
        self._place()

    def __getstate__(self) -> dict[str, Any]:
        """With what the hosts leave behind when they are copied or pickled; see `_Link`."""
        links = {name: _Link.of(host) for name, host in self.layers.items()}
        return self.__dict__ | {"_links": links}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make the layers hosts of this model again."""
        links = state.pop("_links")
        self.__dict__.update(state)
        for name, link in links.items():
            link.site.target = partial(self.target, name)
            link.site.admit = partial(self.refuse_misplaced, name)
            link.restore(self.layers[name])

    @property
    def model(self) -> nn.Module:
        """The wrapped model itself."""
        return self._model

    @property
    def edges(self) -> tuple[tuple[str, str], ...]:
        """Dataflow pairs (producer, consumer) between hosts."""
        return self._dataflow.edges

    @property
    def pairs(self) -> tuple[WidenPair, ...]:
        """The pairs that can be widened."""
        return self._dataflow.pairs

    @property
    def lent(self) -> frozenset[str]:
        """The hosts whose parameters the model reads outside of them, too."""
        return self._dataflow.lent

    @property
    def active(self) -> int:
        """How many seeds are on trial: germinated, in training or grafting."""
        return self.layout.active

    def probe(self, *args: Any, **kwargs: Any) -> None:
        """Run the model in both modes on these inputs, once, and learn what its layers do.

        Layers found unfit stop being hosts and stand in `refused`. Raises what the model raises,
        as the cause of a WrapError, if it runs in neither mode.
        """
        found = probe(self._model, self.layers, args, kwargs)
        if found.failure is not None:
            raise WrapError(
                "example_inputs", f"{found.failure}", "inputs that the model's forward takes"
            ) from found.failure
        for name, reason in found.refused.items():
            self._refuse(name, reason)
        self.layers = {name: self.layers[name] for name in found.order}
        self._shapes, self._dataflow = found.shapes, found.dataflow
        self.unmixed = found.unmixed
        self.probed = True
        self._place()

    def target(self, layer: str) -> KernelTarget:
        """What a kernel for this layer is compiled for.

        Raises:
            WrapError: the model was not probed yet, or its dtype has no kernels.
        """
        host = self._probed_layer(layer)
        weight = next(host.parameters(recurse=False))
        shapes = self._shapes[layer]
        pair = self._pair(layer)
        producer = None
        try:
            if pair is not None:
                producer = ProducerDescription(
                    layer=geometry(self.layers[pair.producer]),
                    name=pair.producer,
                    input_shape=self._shapes[pair.producer].input,
                    chain=pair.chain,
                )
            return KernelTarget(
                layer=geometry(host),
                input_shape=shapes.input,
                output_shape=shapes.output,
                dtype=str(weight.dtype).removeprefix("torch."),  # type: ignore[arg-type]
                device=str(weight.device),
                producer=producer,
            )
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise WrapError(f"layer {layer}: {where}", first["input"], first["msg"]) from error

    def germinate(
        self,
        layer: str,
        slot: int,
        module: nn.Module,
        *,
        kernel: str,
        source: GraphSource = "host",
        graph: Graph | None = None,
    ) -> None:
        """Put a seed into a dormant slot; it contributes nothing until it is grafted.

        `source` says what `module` reads, see `KasminaLayer.germinate`. `graph` is the bound IR of
        `module`; without it the seed can't be written into a checkpoint's structure, and folds or
        exports only as the module it is. Raises as `refuse_misplaced`.
        """
        self._probed_layer(layer).germinate(slot, module, kernel=kernel, source=source, graph=graph)

    def refuse_misplaced(self, layer: str, graph: Graph | None) -> None:
        """Raise BlueprintError where a bound graph reads other positions and the layer may not."""
        if graph is not None:
            refuse_mixing(self.unmixed, layer, graph, geometry(self._layer(layer)))

    def transition(
        self, layer: str, slot: int, state: SeedLifecycleState, alpha: float | None = None
    ) -> SlotRecord:
        """Take a step of the lifecycle; `alpha` is where grafting starts (0 if left out)."""
        return self._layer(layer).transition(slot, state, alpha)

    def set_alpha(self, layer: str, slot: int, alpha: float) -> None:
        """Set how much of a grafting seed counts, from 0 to 1."""
        self._layer(layer).set_alpha(slot, alpha)

    def remove(self, layer: str, slot: int) -> None:
        """Drop the module of a culled seed."""
        self._layer(layer).remove(slot)

    def state(self, layer: str, slot: int) -> SeedLifecycleState:
        """Where the slot stands in the lifecycle."""
        return self.record(layer, slot).state

    def record(self, layer: str, slot: int) -> SlotRecord:
        """The host twin of the slot: read it, never write it."""
        return self._layer(layer).site.record(slot)

    def seed_module(self, layer: str, slot: int) -> nn.Module:
        """The module of the seed in the slot."""
        return self._layer(layer).site.branch(slot).module

    def seed_graph(self, layer: str, slot: int) -> Graph | None:
        """The bound IR of the seed in the slot, where it was given."""
        return self._layer(layer).site.branch(slot).graph

    def seed_parameters(self, layer: str, slot: int) -> list[nn.Parameter]:
        """The parameters of the seed in the slot, in the module's order."""
        return list(self.seed_module(layer, slot).parameters())

    def host_parameters(self) -> list[nn.Parameter]:
        """The model's parameters without those of any seed, in the model's order."""
        grown = {
            id(parameter)
            for layer in self.layers.values()
            for branch in layer.site.branches.values()
            for parameter in branch.module.parameters()
        }
        return [p for p in self._model.parameters() if id(p) not in grown]

    def record_fault(self, layer: str, slot: int, reason: str) -> bool:
        """Count a fault of a seed; True when its circuit is open and the host answers alone."""
        return self._layer(layer).record_fault(slot, reason)

    def clear_faults(self, layer: str, slot: int) -> None:
        """The seed has worked again: its faults are counted from 0."""
        host = self._layer(layer)
        self.layout.clear_faults(host.site.index, slot)
        host.refresh()

    def observe(self, layer: str, slot: int, health: float) -> float:
        """Fold a health score in [0, 1] into the slot's average, which is returned."""
        return self.layout.observe(self._layer(layer).site.index, slot, health)

    def observe_contribution(self, layer: str, slot: int, contribution: float) -> float:
        """Fold a measured contribution (nats per sample) into the slot's average; returns that."""
        index = self._layer(layer).site.index
        return self.layout.observe_contribution(index, slot, contribution)

    def move(self, device: torch.device) -> None:
        """The model's tensors have moved to `device`: so do those of the layout."""
        self.layout.to(device)
        for layer in self.layers.values():
            for branch in layer.site.branches.values():
                branch.look_again()

    @contextmanager
    def trialling(self, layer: str, slot: int) -> Iterator[None]:
        """Inside, this one seed counts in full, whatever its state; others are as they were."""
        with self._layer(layer).overriding(trialled=frozenset({slot})):
            yield

    @contextmanager
    def without(self, layer: str, slot: int) -> Iterator[None]:
        """Inside, this one seed counts for nothing; others are as they were."""
        with self._layer(layer).overriding(muted=frozenset({slot})):
            yield

    def statistics(self) -> dict[str, Any]:
        """The model's growth in figures, JSON-ready.

        `states` counts the slots by state and `transitions` the steps taken since `wrap`;
        `parametersBase` and `parameters` are the model's size before growth and now, `seedBytes`
        the memory of all seeds' parameters, `layoutBytes` that of the state layout; `fallbacks`
        counts the faults that the host answered, `kernelLoads` the loads into seeds, with the
        mean and the slowest in milliseconds.
        """
        seeds = [
            parameter
            for layer in self.layers.values()
            for branch in layer.site.branches.values()
            for parameter in branch.module.parameters()
        ]
        return {
            "states": {state.value: count for state, count in self.layout.counts().items()},
            "transitions": self.layout.transitions,
            "parametersBase": self.parameters_base,
            "parameters": sum(parameter.numel() for parameter in self._model.parameters()),
            "seedBytes": sum(parameter.nbytes for parameter in seeds),
            "layoutBytes": sum(tensor.nbytes for tensor in self.layout.tensors().values()),
            "fallbacks": sum(record.fallbacks for _, _, record in self.layout.records()),
            "kernelLoads": {
                "count": self.loads.count,
                "failures": self.loads.failures,
                "meanMilliseconds": 1e3 * self.loads.seconds / max(1, self.loads.count),
                "slowestMilliseconds": 1e3 * self.loads.slowest_seconds,
            },
        }

    def structure(self) -> list[dict[str, JsonValue]]:
        """Every slot that has left its first dormancy, JSON-ready, for `restore`."""
        entries = []
        for name, host in self.layers.items():
            for slot in range(self.seeds_per_layer):
                record = host.site.record(slot)
                if record.state is not SeedLifecycleState.DORMANT or record.cycle:
                    entries.append(_entry(name, slot, record, host.site))
        return entries

    def restore(
        self,
        structure: Sequence[Mapping[str, Any]],
        build: Callable[[Mapping[str, Any]], nn.Module],
    ) -> None:
        """Rebuild the seeds that `structure` lists, their weights as `build` makes them.

        `build` gets the entry; the caller loads the weights afterwards. The model must be
        wrapped as it was, probed, and dormant.

        Raises:
            WrapError: an entry names no host of this model, or its slot is not free.
        """
        for entry in structure:
            host = self._probed_layer(str(entry["layer"]))
            slot, site = int(entry["slot"]), host.site
            state = SeedLifecycleState.of(SeedState(entry["state"]))
            taken = site.record(slot).state
            if taken is not SeedLifecycleState.DORMANT:
                raise WrapError(f"{site.name}[{slot}]", taken.seed_state, "a dormant slot")
            self.layout.write(
                site.index,
                slot,
                state=state,
                kernel=entry["kernel"] or "",
                alpha=entry["alpha"],
                health=math.nan if entry["health"] is None else entry["health"],
                age=entry["age"],
                contribution=math.nan if entry["contribution"] is None else entry["contribution"],
                errors=entry["errors"],
                fallbacks=entry["fallbacks"],
                fault=entry["fault"] or "",
                cycle=entry["cycle"],
            )
            if state in GROWN_STATES:
                graph = entry["graph"] and Graph.model_validate(entry["graph"])
                host.attach(slot, build(entry), source=entry["source"], graph=graph)

    def _place(self) -> None:
        """Give every host its place in a fresh layout, and its neighbours."""
        device = next((p.device for p in self._model.parameters()), "cpu")
        self.layout = KasminaStateLayout(len(self.layers), self.seeds_per_layer, device=device)
        for index, (name, host) in enumerate(self.layers.items()):
            pair = self._pair(name)
            host.site = Site(
                name,
                index,
                self.layout,
                partial(self.target, name),
                partial(self.refuse_misplaced, name),
                self.loads,
                producer=None if pair is None else self.layers[pair.producer],
            )
        self._note_fused_paths()

    def _refuse_taken_names(self) -> None:
        """Refuse layers that have something of their own under a name that hosts need."""
        taken = {"site", GROWN, *(name for name in vars(KasminaLayer) if name[:2] != "__")}
        for name, layer in list(self.layers.items()):
            own = {*layer.__dict__, *layer._parameters, *layer._buffers, *layer._modules}
            if found := ", ".join(sorted(own & taken)):
                self._refuse(name, f"it has attributes that hosts need: {found}")
                del self.layers[name]

    def _refuse(self, name: str, reason: str) -> None:
        self.refused[name] = reason
        if self.layers[name] is not self._model:  # whose class unwrap gives back
            release(self.layers[name])

    def _note_fused_paths(self) -> None:
        for module in self._model.modules():
            if isinstance(module, nn.TransformerEncoderLayer):
                for host in _hosts_in(module):
                    host.site.fused = True
            if isinstance(module, nn.TransformerEncoder) and module.use_nested_tensor:
                for host in _hosts_in(module):
                    host.site.encoders += (module,)

    def _pair(self, consumer: str) -> WidenPair | None:
        return next((pair for pair in self.pairs if pair.consumer == consumer), None)

    def _layer(self, name: str) -> KasminaLayer:
        if name not in self.layers:
            why = self.refused.get(name)
            came = f"{name} ({why})" if why else name
            raise WrapError("layer", came, ", ".join(self.layers) or "no layer hosts seeds")
        return self.layers[name]

    def _probed_layer(self, name: str) -> KasminaLayer:
        if not self.probed:
            raise WrapError(
                "example_inputs", "none yet", "example inputs for wrap, or one call of the model"
            )
        return self._layer(name)


@dataclass
class _Link:
    """What ties a host to its model, kept by the model: a copy of the layer alone has no part.

    `kind` and `live` are for a host without seeds, which is pickled as the plain layer it was.
    """

    site: Site
    kind: type[KasminaLayer] | None
    live: tuple[Branch | Tap, ...]
    producer: KasminaLayer | None
    encoders: tuple[nn.TransformerEncoder, ...]

    @classmethod
    def of(cls, host: KasminaLayer) -> _Link:
        kind = type(host) if host.pickled_plain() else None
        return cls(host.site, kind, host.live, host.site.producer, host.site.encoders)

    def restore(self, host: nn.Module) -> None:
        self.site.producer, self.site.encoders = self.producer, self.encoders
        if self.kind is not None:
            become(host, self.kind)
            host.__dict__["site"] = self.site
            if self.live:
                host.__dict__["live"] = self.live


def geometry(layer: nn.Module) -> LayerGeometry:
    """A host layer's kind and sizes.

    Raises:
        pydantic.ValidationError: the layer has sizes that the IR has no words for.
    """
    match layer:
        case nn.Linear():
            sizes = {"kind": "Linear", "inputs": layer.in_features, "outputs": layer.out_features}
        case nn.LayerNorm():
            (size,) = layer.normalized_shape
            sizes = {"kind": "LayerNorm", "inputs": size, "outputs": size}
        case nn.BatchNorm2d():
            size = layer.num_features
            sizes = {"kind": "BatchNorm2d", "inputs": size, "outputs": size}
        case nn.Embedding():
            rows, size = layer.num_embeddings, layer.embedding_dim
            sizes = {"kind": "Embedding", "inputs": rows, "outputs": size}
        case nn.Conv1d() | nn.Conv2d():
            sizes = {"kind": "Conv1d" if isinstance(layer, nn.Conv1d) else "Conv2d"}
            sizes |= _window(layer)
        case _:
            raise TypeError(f"{type(layer).__name__} hosts no seeds")
    return LayerGeometry.model_validate(sizes | {"bias": getattr(layer, "bias", None) is not None})


def _window(layer: nn.Conv1d | nn.Conv2d) -> dict[str, object]:
    return {
        "inputs": layer.in_channels,
        "outputs": layer.out_channels,
        "kernel_size": tuple(layer.kernel_size),
        "stride": tuple(layer.stride),
        "padding": layer.padding if isinstance(layer.padding, str) else tuple(layer.padding),
        "dilation": tuple(layer.dilation),
        "groups": layer.groups,
        "padding_mode": layer.padding_mode,
    }


def release(layer: KasminaLayer) -> None:
    """Make a host an ordinary layer of its own class again; its seeds, if any, stay behind."""
    if isinstance(layer.__dict__.get("site"), Site):
        del layer.__dict__["site"]
        layer.__dict__.pop("live", None)
    become(layer, layer.host_class)


def _hosts_in(module: nn.Module) -> list[KasminaLayer]:
    return [m for m in module.modules() if isinstance(m, KasminaLayer) and "site" in m.__dict__]


def _entry(name: str, slot: int, record: SlotRecord, site: Site) -> dict[str, JsonValue]:
    branch = site.branches.get(slot)
    graph = branch.graph if branch is not None else None
    return {
        "layer": name,
        "slot": slot,
        "state": record.state.seed_state.value,
        "alpha": record.alpha,
        "kernel": record.kernel,
        "cycle": record.cycle,
        "age": record.age,
        "health": None if math.isnan(record.health) else record.health,
        "contribution": None if math.isnan(record.contribution) else record.contribution,
        "errors": record.errors,
        "fallbacks": record.fallbacks,
        "fault": record.fault,
        "source": "host" if branch is None else branch.source,
        "graph": None if graph is None else graph.to_wire(),  # type: ignore[dict-item]
    }
