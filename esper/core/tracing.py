"""Dataflow between host layers, and the pairs that can be widened, from one traced forward.

Every torch function that the model calls is seen by a TorchFunctionMode; every host layer's call
is one event, whatever it does inside. A tensor is followed by the number of its value: an in-place
operation gives the same tensor a new number, so that later readers are readers of the new value.
What runs without a torch function (scripted code, an extension) shows in the operations that it
dispatches: they are events like any other.
"""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.jit import ScriptModule
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from esper.contracts.ir import (
    ActivationOp,
    AvgPool2dOp,
    ChainOp,
    DropoutOp,
    MaxPool2dOp,
)
from esper.execution.kasmina_layer import (
    KasminaConv1d,
    KasminaConv2d,
    KasminaLayer,
    KasminaLinear,
)

Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class WidenPair:
    """A consumer's producer, and the operations between the two, in order.

    The producer's output, and each value up to the consumer, is used for nothing else; so new
    units may join both layers, and nobody else sees them. What the producer reads is still the
    same when the consumer is called.
    """

    producer: str
    consumer: str
    chain: tuple[ChainOp, ...]


@dataclass(frozen=True)
class Dataflow:
    """What one traced forward shows: edges between hosts, in execution order, and widen pairs.

    `lent` are the hosts whose parameters the model reads outside of them, too: those must stay
    what they are.
    """

    edges: tuple[tuple[str, str], ...] = ()
    pairs: tuple[WidenPair, ...] = ()
    lent: frozenset[str] = frozenset()


@dataclass
class _Value:
    """One value: the event that made it, the hosts whose output it depends on, its readers."""

    maker: _Event | None
    sources: tuple[str, ...]
    readers: list[_Event] = field(default_factory=list)


@dataclass
class _Event:
    """A call of a host (`host` set), of a chain operation (`op` set), or of anything else."""

    host: str | None = None
    op: ChainOp | None = None
    read: int | None = None


def _elementwise(kind: str, *names: str) -> Callable[[Sequence[Any], Arguments], ChainOp]:
    """A reader of a function's arguments; those in `names` travel into the operation."""

    def parse(args: Sequence[Any], kwargs: Arguments) -> ChainOp:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        kept = {name: given[name] for name in names if name in given and name != "inplace"}
        return ActivationOp.model_validate({"kind": kind, **kept})

    return parse


def _dropout(args: Sequence[Any], kwargs: Arguments) -> ChainOp:
    given = {**dict(zip(("p", "training"), args, strict=False)), **kwargs}
    return DropoutOp(p=float(given.get("p", 0.5)))


def _drops(args: Sequence[Any], kwargs: Arguments) -> bool:
    """Whether a dropout is on in this call."""
    return bool(
        {**dict(zip(("p", "training"), args, strict=False)), **kwargs}.get("training", True)
    )


def _pool(
    op: type[MaxPool2dOp] | type[AvgPool2dOp], names: Sequence[str]
) -> Callable[[Sequence[Any], Arguments], ChainOp]:
    def parse(args: Sequence[Any], kwargs: Arguments) -> ChainOp:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        given.pop("return_indices", None)
        kept = {name: _plain(value) for name, value in given.items() if value is not None}
        return op.model_validate({name: value for name, value in kept.items() if value != ()})

    return parse


def _plain(value: Any) -> Any:
    """A size as torch takes it (a one-element tuple means both directions) as the IR takes it."""
    if isinstance(value, tuple | list):
        return value[0] if len(value) == 1 else tuple(value)
    return value


_RELU = _elementwise("relu")
_TANH = _elementwise("tanh")
_SIGMOID = _elementwise("sigmoid")
_MAX_POOL = _pool(
    MaxPool2dOp, ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
)
_PARSERS: Mapping[object, Callable[[Sequence[Any], Arguments], ChainOp]] = {
    F.relu: _RELU,
    torch.relu: _RELU,
    torch.relu_: _RELU,
    Tensor.relu: _RELU,
    Tensor.relu_: _RELU,
    torch.tanh: _TANH,
    Tensor.tanh: _TANH,
    torch.tanh_: _TANH,
    Tensor.tanh_: _TANH,
    torch.sigmoid: _SIGMOID,
    Tensor.sigmoid: _SIGMOID,
    torch.sigmoid_: _SIGMOID,
    Tensor.sigmoid_: _SIGMOID,
    F.gelu: _elementwise("gelu", "approximate"),
    F.silu: _elementwise("silu"),
    F.leaky_relu: _elementwise("leaky_relu", "negative_slope", "inplace"),
    F.elu: _elementwise("elu", "alpha", "inplace"),
    F.dropout: _dropout,
    F.max_pool2d: _MAX_POOL,
    torch.max_pool2d: _MAX_POOL,
    F.avg_pool2d: _pool(
        AvgPool2dOp,
        ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
    ),
}
_HARMLESS = frozenset(
    cast("Any", getter).__get__
    for getter in (
        Tensor.dtype,
        Tensor.device,
        Tensor.requires_grad,
        Tensor.is_cuda,
        Tensor.is_nested,
        Tensor.is_sparse,
        Tensor.layout,
        Tensor.ndim,
    )
) | {Tensor.dim, Tensor.is_floating_point, torch.is_floating_point}
"""Questions about a tensor whose answers do not depend on how many units it has."""
_SIZES = frozenset(
    {cast("Any", Tensor.shape).__get__, Tensor.size, Tensor.numel, Tensor.nelement, Tensor.__len__}
)
"""Questions about a tensor whose answers do not depend on what it holds."""


class _Recorder(TorchFunctionMode):
    """Records events while it is entered; `hosts` are told apart by hooks."""

    def __init__(self, hosts: Mapping[str, KasminaLayer], training: bool) -> None:
        super().__init__()
        self.training = training
        self.values: list[_Value] = []
        self.calls: Counter[str] = Counter()
        self.edges: dict[tuple[str, str], None] = {}
        self.tied: set[str] = set()
        self.lent: set[str] = set()
        self.stale: set[tuple[str, str]] = set()
        self.alive: list[Tensor] = []
        self._fed: dict[str, tuple[list[Tensor], list[int]]] = {}
        self._number: dict[int, int] = {}
        self._inside = 0
        self._seen = False
        self._own: Counter[int] = Counter()
        self._owners: dict[int, str] = {}
        for name, layer in hosts.items():
            for parameter in layer.parameters(recurse=False):
                if id(parameter) in self._owners:
                    self.tied |= {name, self._owners[id(parameter)]}
                self._owners[id(parameter)] = name

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run `func`, and note what it read and made, unless it runs inside a host."""
        given = kwargs or {}
        if self._inside or func in _HARMLESS:
            return func(*args, **given)
        read = self._tensors((args, given))
        event = _Event(op=_chain_op(func, args, given, len(read), self.training))
        numbers = self._read(read, event, lends=func not in _SIZES)
        self._seen = True
        try:
            result = func(*args, **given)
        finally:
            self._seen = False
        self._made(self._tensors(result), event, self._sources(numbers))
        return result

    def dispatched(self, run: Callable[[], Any], arguments: Any) -> Any:
        """Run an operation; where no torch function and no host called it, note it."""
        if self._inside or self._seen:
            return run()
        event = _Event()
        numbers = self._read(self._tensors(arguments), event)
        result = run()
        self._made(self._tensors(result), event, self._sources(numbers))
        return result

    def enter_holder(self, module: nn.Module) -> None:
        """A module that holds parameters of hosts under names of its own is called."""
        self._own.update(id(parameter) for parameter in module.parameters(recurse=False))

    def leave_holder(self, module: nn.Module) -> None:
        """It has returned."""
        self._own.subtract(id(parameter) for parameter in module.parameters(recurse=False))

    def holds_some(self, module: nn.Module) -> bool:
        """Whether a module without parts has a parameter of a host under a name of its own."""
        own = module.parameters(recurse=False)
        return not module._modules and any(id(parameter) in self._owners for parameter in own)

    def enter_host(self, name: str, read: Any) -> None:
        """A host is called; what happens inside is its own affair."""
        # Nothing that is asked here is the model's doing.
        self._inside += 1
        if self._inside > 1:
            return
        event, tensors = _Event(host=name), self._tensors(read)
        sources = self._sources(self._read(tensors, event))
        self.calls[name] += 1
        self.edges.update(dict.fromkeys((source, name) for source in sources))
        for source in sources:
            if _versions(self._fed[source][0]) != self._fed[source][1]:
                self.stale.add((source, name))
        self._fed[name] = tensors, _versions(tensors)

    def leave_host(self, name: str, made: Any) -> None:
        """A host has returned."""
        self._inside -= 1
        if not self._inside:
            self._made(self._tensors(made), _Event(host=name), (name,))

    def finish(self, output: Any) -> dict[int, weakref.ref[Tensor]]:
        """Note the model's outputs as read; let go of every tensor, but know it while it lives.

        The references go by the number of the value that the tensor held last.
        """
        self._read(self._tensors(output), _Event())
        held = {self._number[id(tensor)]: weakref.ref(tensor) for tensor in self.alive}
        self.alive.clear()
        self._fed.clear()
        return held

    def _tensors(self, tree: Any) -> list[Tensor]:
        return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]

    def _read(self, tensors: list[Tensor], event: _Event, *, lends: bool = True) -> list[int]:
        numbers = []
        for tensor in tensors:
            if id(tensor) in self._owners:
                self.tied.add(self._owners[id(tensor)])
                if lends and not self._own[id(tensor)]:
                    self.lent.add(self._owners[id(tensor)])
            if id(tensor) not in self._number:
                self._made([tensor], None, ())
            numbers.append(self._number[id(tensor)])
        for number in numbers:
            self.values[number].readers.append(event)
        event.read = numbers[0] if len(numbers) == 1 else None
        return numbers

    def _made(self, tensors: list[Tensor], event: _Event | None, sources: tuple[str, ...]) -> None:
        for tensor in tensors:
            # Kept alive, or a later tensor might get the same id.
            if id(tensor) not in self._number:
                self.alive.append(tensor)
            self._number[id(tensor)] = len(self.values)
            self.values.append(_Value(event, sources))

    def _sources(self, numbers: list[int]) -> tuple[str, ...]:
        found = dict.fromkeys(source for n in numbers for source in self.values[n].sources)
        return tuple(found)


class _Dispatches(TorchDispatchMode):
    """Tells a recorder of every operation that runs."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recorder = recorder

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run `func`, under the recorder's eyes."""
        given = kwargs or {}
        return self._recorder.dispatched(lambda: func(*args, **given), (args, given))


def trace(
    model: nn.Module,
    hosts: Mapping[str, KasminaLayer],
    forward: Callable[[], Any],
    *,
    training: bool = False,
) -> tuple[Dataflow, list[str]]:
    """Run `forward` of `model` once, traced; the caller has set the mode and keeps the state.

    `training` says which mode that is: dropout must be on there, and off in eval mode.

    Returns:
        The dataflow, and the hosts that were called, in order of their first call.
    """
    recorder = _Recorder(hosts, training)
    hooked = {
        name for name, layer in hosts.items() if layer._forward_hooks or layer._forward_pre_hooks
    }
    handles = []
    for name, layer in hosts.items():
        handles.append(layer.register_forward_pre_hook(_entering(recorder, name), with_kwargs=True))
        handles.append(layer.register_forward_hook(_leaving(recorder, name)))
    for module in model.modules():
        if not isinstance(module, KasminaLayer | ScriptModule) and recorder.holds_some(module):
            handles.append(module.register_forward_pre_hook(_holding(recorder.enter_holder)))
            handles.append(module.register_forward_hook(_holding(recorder.leave_holder)))
    try:
        # Optimised, scripted code would fuse operations into kernels that dispatch nothing.
        with _unoptimised(), _Dispatches(recorder), recorder:
            output = forward()
    finally:
        for handle in handles:
            handle.remove()
    held = recorder.finish(output)
    made_by = {id(value.maker): n for n, value in enumerate(recorder.values) if value.maker}
    pairs = []
    for number in range(len(recorder.values)):
        pair, along = _pair_from(recorder.values, made_by, number)
        if pair is None or {pair.producer, pair.consumer} & (recorder.tied | hooked):
            continue
        if (pair.producer, pair.consumer) in recorder.stale:
            continue
        once = recorder.calls[pair.producer] == recorder.calls[pair.consumer] == 1
        fits = _fits(hosts[pair.producer], hosts[pair.consumer], pair.chain)
        if once and fits and not _escaped(held, along):
            pairs.append(pair)
    found = Dataflow(tuple(recorder.edges), tuple(pairs), frozenset(recorder.lent))
    return found, list(recorder.calls)


def _unoptimised() -> AbstractContextManager[None]:
    context: AbstractContextManager[None] = cast("Any", torch.jit).optimized_execution(False)
    return context


def _escaped(held: Mapping[int, weakref.ref[Tensor]], numbers: Iterable[int]) -> bool:
    """Whether something outside the trace still holds one of these values."""
    references = [held[number] for number in numbers if number in held]
    if any(reference() is not None for reference in references):
        # Garbage in a cycle holds nothing; looking twice saves most traces a collection.
        gc.collect()
    return any(reference() is not None for reference in references)


def _pair_from(
    values: list[_Value], made_by: Mapping[int, int], start: int
) -> tuple[WidenPair | None, list[int]]:
    """The pair that begins with value `start`, if any, and the values between the two layers."""
    maker = values[start].maker
    along = [start]
    if maker is None or maker.host is None:
        return None, along
    chain: list[ChainOp] = []
    while True:
        readers = values[along[-1]].readers
        if len(readers) != 1 or readers[0].read != along[-1]:
            return None, along
        reader = readers[0]
        if reader.host is not None:
            return WidenPair(maker.host, reader.host, tuple(chain)), along
        if reader.op is None or id(reader) not in made_by:
            return None, along
        chain.append(reader.op)
        along.append(made_by[id(reader)])


def _fits(producer: KasminaLayer, consumer: KasminaLayer, chain: Sequence[ChainOp]) -> bool:
    """Whether the two layers speak of the same units: one kind, no groups, pools on maps only."""
    if isinstance(producer, KasminaConv2d) and isinstance(consumer, KasminaConv2d):
        return producer.groups == consumer.groups == 1
    if any(isinstance(op, MaxPool2dOp | AvgPool2dOp) for op in chain):
        return False
    if isinstance(producer, KasminaConv1d) and isinstance(consumer, KasminaConv1d):
        return producer.groups == consumer.groups == 1
    return isinstance(producer, KasminaLinear) and isinstance(consumer, KasminaLinear)


def _chain_op(
    func: object, args: tuple[Any, ...], kwargs: Arguments, tensors: int, training: bool
) -> ChainOp | None:
    """The call as an operation of the IR; None if it is not one, or not with these arguments."""
    parser = _PARSERS.get(func)
    if parser is None or tensors != 1:
        return None
    given = {name: value for name, value in kwargs.items() if name != "input"}
    rest = args[1:] if "input" not in kwargs else args
    if func is F.dropout and _drops(rest, given) is not training:
        return None
    try:
        return parser(rest, given)
    except (ValidationError, TypeError, ValueError):
        return None


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    """How often each was written to, which inference tensors do not tell."""
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


def _entering(
    recorder: _Recorder, name: str
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recorder.enter_host(name, (args, kwargs))

    return hook


def _leaving(recorder: _Recorder, name: str) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        recorder.leave_host(name, output)

    return hook


def _holding(tell: Callable[[nn.Module], None]) -> Callable[..., None]:
    def hook(module: nn.Module, *_: Any) -> None:
        tell(module)

    return hook
