"""Regional compilation: a model's blocks are compiled one by one, and stay so while it grows.

`torch.compile` over a whole growing model compiles all of it again at every change, reaches
torch's limit after eight changes and silently stays eager. Here each block is compiled alone, and
anew for each set of seeds that contribute to it, always isolated from the others: torch limits
recompilations by code object, also of the parts into which a graph break cuts a forward, and so
no structure uses up the limit of another.

Shapes are static: what runs depends on the structure and the shapes alone, not on what ran
before, so a run that is resumed computes the same bits.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from esper.core.morphology import ROOT, Morphology
from esper.errors import ManifestError, WorkFailed, WrapError, one_line
from esper.execution.branches import Branch
from esper.execution.checkpointing import CONTROL_FLOW
from esper.execution.kasmina_layer import KasminaLayer

Backend = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]
"""Makes a callable of a graph and example inputs, as `torch.compile` takes it."""

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
KEPT_STRUCTURES = 4
"""Structures whose code a block keeps; a recovery trial goes back and forth between two."""

MOST_COMPILATIONS = 2**16
"""Of one code object in a process; torch's own cap of 256 a growing model would reach in a day."""

_COMPILED = "_compiled_call_impl"  # what nn.Module.__call__ runs instead of itself, if set

_log = logging.getLogger(__name__)


@dataclass
class _Code:
    """What a block runs with some seeds in one mode, and the graphs that its first call ran."""

    call: Callable[..., Any]
    graphs: int = 0


class CompiledBlock:
    """What the `__call__` of a compiled block runs, and counts.

    `calls` are the calls that were to run compiled, `graph_calls` the compiled graphs that ran in
    them, `compilations` the graphs compiled so far, and `eager_calls` those of the `calls` in
    which none ran, or fewer than in the first call with the same seeds in the same mode: then
    torch has given up a part of the block.
    """

    def __init__(self, name: str, module: nn.Module, backend: Backend) -> None:
        self.name = name
        self.calls = self.graph_calls = self.compilations = self.eager_calls = 0
        self._module = module
        self._backend = backend
        self._hosts = [part for part in module.modules() if isinstance(part, KasminaLayer)]
        self._structures: OrderedDict[Hashable, dict[Hashable, _Code]] = OrderedDict()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The block's output.

        Where code with seeds in it can't be compiled, or fails, the block runs eager.

        Raises:
            WorkFailed: torch can't compile the block as it is without seeds.
        """
        live = [host for host in self._hosts if host.live]
        if any(host.site.trialled for host in live):
            # A seed that a measurement has switched on is gone in a moment.
            return self._module._call_impl(*args, **kwargs)
        codes = self._codes(_structure(live))
        mode = (self._module.training, torch.is_grad_enabled())
        if mode not in codes:
            codes[mode] = _Code(_isolated(self._module, self._compile))
        code = codes[mode]
        self.calls += 1
        before = self.graph_calls
        try:
            output = code.call(*args, **kwargs)
        except CONTROL_FLOW:
            raise  # checkpointing has what it needs
        except Exception as error:
            uncompilable = isinstance(error, torch._dynamo.exc.TorchDynamoException)
            if not live and not uncompilable:
                raise
            if not live:
                raise WorkFailed(
                    f"{self.name}: torch.compile failed: {one_line(str(error), 400)}; set "
                    "spec.training.compile to false"
                ) from error
            if uncompilable:
                code.call = self._module._call_impl
            # A seed on trial may be at fault; eager, its layer finds out and answers alone.
            output = self._module._call_impl(*args, **kwargs)
        ran = self.graph_calls - before
        code.graphs = code.graphs or ran
        if ran == 0 or ran < code.graphs:
            self._note_eager_call()
        return output

    def _codes(self, structure: Hashable) -> dict[Hashable, _Code]:
        """What runs for these contributing seeds, by the block's mode and torch's."""
        codes = self._structures.setdefault(structure, {})
        self._structures.move_to_end(structure)
        if len(self._structures) > KEPT_STRUCTURES:
            self._structures.popitem(last=False)
        return codes

    def _compile(self, graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        compiled = self._backend(graph, inputs)
        self.compilations += 1

        def counted(*arguments: Any) -> Any:
            self.graph_calls += 1
            return compiled(*arguments)

        return counted

    def _note_eager_call(self) -> None:
        if not self.eager_calls:
            _log.warning(
                "%s runs eager, or a part of it: torch gave up compiling it; "
                "TORCH_LOGS=recompiles,graph_breaks says why",
                self.name,
            )
        self.eager_calls += 1


def compile_blocks(model: nn.Module, backend: Backend | None = None) -> dict[str, CompiledBlock]:
    """Compile each of the model's blocks, in place, and return them by name.

    As with `nn.Module.compile` the modules stay what they are: names, `state_dict`, pickles and
    copies know nothing of it, and copies are not compiled. Compilation itself happens at a
    block's first calls. Hooks put on later are not seen; `uncompiled` lets them be.

    Args:
        model: a wrapped and probed model, or a plain one.
        backend: what compiles the graphs; left out, inductor, whose tools are tried out first.

    Raises:
        ManifestError: inductor's tools don't work here.
        WrapError: the model has compiled blocks already, or was wrapped and not yet probed.
    """
    morphology = model.__dict__.get("morphology")
    if isinstance(morphology, Morphology) and not morphology.probed:
        raise WrapError("model", "a model not yet probed", "one wrapped with example inputs")
    if compiled_blocks(model):
        raise WrapError("model", "a model with compiled blocks", "a model without")
    if backend is None:
        _refuse_without_tools(next((p.device for p in model.parameters()), torch.device("cpu")))
        backend = _inductor
    limits = torch._dynamo.config
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, MOST_COMPILATIONS)
    for name in block_names(model):
        module = model if name == ROOT else model.get_submodule(name)
        setattr(module, _COMPILED, CompiledBlock(name, module, backend))
    return compiled_blocks(model)


def compiled_blocks(model: nn.Module) -> dict[str, CompiledBlock]:
    """The blocks that `compile_blocks` has compiled, by name."""
    found = (module.__dict__.get(_COMPILED) for module in model.modules())
    return {block.name: block for block in found if isinstance(block, CompiledBlock)}


def decompile(model: nn.Module) -> None:
    """Undo `compile_blocks`; a model without compiled blocks stays as it is."""
    for module in model.modules():
        if isinstance(module.__dict__.get(_COMPILED), CompiledBlock):
            delattr(module, _COMPILED)


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Inside, the model runs eager, so that every hook and every operation is seen."""
    found = [(module, module.__dict__.get(_COMPILED)) for module in model.modules()]
    decompile(model)
    try:
        yield
    finally:
        for module, block in found:
            if isinstance(block, CompiledBlock):
                setattr(module, _COMPILED, block)


def block_names(model: nn.Module) -> list[str]:
    """The modules that are compiled one by one, in the model's order.

    They are the members of containers (Sequential, ModuleList, ModuleDict), wherever these lie;
    a Sequential of layers only is one block, and so is what lies in no such container. Layers
    alone are none, there is nothing to fuse in them; a model of layers only is one block itself.
    """
    names: dict[nn.Module, str] = {}
    for name, block in _blocks("", model, opened=True):
        names.setdefault(block, name)
    return list(names.values()) or [ROOT]


def _blocks(name: str, module: nn.Module, *, opened: bool) -> list[tuple[str, nn.Module]]:
    if _is_layer(module):
        return []
    container = isinstance(module, CONTAINERS)
    inner: list[tuple[str, nn.Module]] = []
    if container or opened:
        for key, child in module.named_children():
            inside = f"{name}.{key}" if name else key
            inner += _blocks(inside, child, opened=not container and _holds_blocks(child))
    if inner or isinstance(module, nn.ModuleList | nn.ModuleDict):  # which have no forward
        return inner
    return [(name or ROOT, module)]


def _holds_blocks(module: nn.Module) -> bool:
    return any(
        isinstance(part, CONTAINERS) and not all(map(_is_layer, part.children()))
        for part in module.modules()
        if not _is_layer(part)
    )


def _is_layer(module: nn.Module) -> bool:
    """Whether there is nothing to open: no children, or none that are the model's own."""
    return (
        isinstance(module, KasminaLayer | torch.jit.ScriptModule)
        or getattr(module, _COMPILED) is not None
        or parametrize.is_parametrized(module)
        or next(module.children(), None) is None
    )


def _structure(live: Sequence[KasminaLayer]) -> Hashable:
    """What contributes to a block, and how: for each such set its code is compiled anew."""
    parts = [part for host in live for part in host.live]
    for part in parts:
        if isinstance(part, Branch) and part.scaled:
            part.alpha()  # else the compiled code would meet a view made while it was traced
    return tuple((part, isinstance(part, Branch) and part.scaled) for part in parts)


def _isolated(module: nn.Module, backend: Backend) -> Callable[..., Any]:
    """The module's own call, compiled; its recompilations are counted apart from all others."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return module._call_impl(*args, **kwargs)

    # torch's declared overloads lack the last argument, its documentation has it.
    compiled = torch.compile(call, backend=backend, dynamic=False, isolate_recompiles=True)  # type: ignore[call-overload]
    return cast("Callable[..., Any]", compiled)


def _inductor(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    # Imported here: it takes a second, which sessions that do not compile need not wait.
    from torch._inductor.compile_fx import compile_fx

    # Kernels chosen by their measured speed would differ from run to run.
    compiled = compile_fx(graph, inputs, config_patches={"deterministic": True})
    return cast("Callable[..., Any]", compiled)


def _refuse_without_tools(device: torch.device) -> None:
    """Look for the compiler and use it once: without Python's headers it is of no use."""
    try:
        if device.type == "cpu":
            # What is compiled below may come from inductor's cache on disk.
            from torch._inductor.cpp_builder import get_cpp_compiler

            get_cpp_compiler()
        torch.compile(_anything, backend=_inductor, dynamic=False)(torch.ones(2, device=device))
    # Whatever goes wrong, it is the machine's fault and not the model's.
    except Exception as error:
        cause = getattr(error, "inner_exception", error)
        reason = next(iter(str(cause).splitlines()), type(cause).__name__)
        raise ManifestError(
            "spec.training.compile",
            f"true, and torch.compile does not work here ({reason})",
            "false, or a machine with a C++ compiler and Python's headers, and Triton for a GPU",
        ) from error


def _anything(x: Tensor) -> Tensor:
    return x.sin() + 1
