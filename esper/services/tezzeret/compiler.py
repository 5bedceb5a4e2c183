"""From a blueprint and a target to a kernel's artifact: lower, validate, measure, package."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from torch import fx

from esper.contracts.blueprints import (
    BlueprintDocument,
    Graph,
    GraphCost,
    KernelTarget,
    infer,
    input_shape,
    kernel_id,
    lower,
)
from esper.contracts.ir import source_of
from esper.contracts.kernels import KernelFigures, KernelManifest, KernelMetadata
from esper.errors import BlueprintError, KernelError, one_line
from esper.execution.artifact import artifact_digest, pack, unpack
from esper.execution.builders import DTYPES, WeightedNode, build
from esper.execution.isolation import preserved_randomness

VALIDATION_BATCHES = (2, 3)
LATENCY_BATCH = 2
LATENCY_REPEATS = 5
_RANDOM_SEED = 0


@dataclass(frozen=True)
class CompiledArtifact:
    """A kernel ready for the store: its bytes, and what the hub keeps beside them."""

    data: bytes
    manifest: KernelManifest
    metadata: KernelMetadata


def compile_kernel(document: BlueprintDocument, target: KernelTarget) -> CompiledArtifact:
    """The artifact of `document` for `target`.

    The artifact's bytes follow from the two arguments alone; only the measured figures vary.

    Raises:
        KernelError: the blueprint does not fit the target, is over a cap, changes its host's
            function at birth, can't learn, gives a wrong shape or a non-finite value, or torch
            can't run it on the target's device.
    """
    identity = kernel_id(document.digest, target)
    target = _anonymous(target)
    try:
        graph = lower(document, target)
        cost = infer(graph, target)
        with preserved_randomness(_RANDOM_SEED):
            _validate(graph, target)
            figures = _measure(graph, target, cost)
    except (BlueprintError, RuntimeError, AssertionError) as error:
        raise KernelError(f"blueprint {document.name}: {one_line(str(error), 400)}") from error
    except KernelError as error:
        raise KernelError(f"blueprint {document.name}: {error}") from error
    manifest = KernelManifest.describing(identity, document.digest, graph, target, cost)
    data = pack(graph, target, manifest)
    digest = artifact_digest(data)
    unpack(data, digest)  # what is stored is what a session can load
    metadata = KernelMetadata(
        kernel=identity,
        blueprint_digest=document.digest,
        artifact_digest=digest,
        artifact_bytes=len(data),
        figures=figures,
    )
    return CompiledArtifact(data, manifest, metadata)


def _anonymous(target: KernelTarget) -> KernelTarget:
    """The target without the producer's name, which is no part of the kernel."""
    if target.producer is None:
        return target
    return target.model_copy(update={"producer": target.producer.model_copy(update={"name": ""})})


def _validate(graph: Graph, target: KernelTarget) -> None:
    newborn = build(graph, target, generator_seed=_RANDOM_SEED)
    # With its zero weights drawn like the others, the graph shows gradients everywhere.
    awake = build(_without_zeros(graph), target, generator_seed=_RANDOM_SEED)
    for batch in VALIDATION_BATCHES:
        for training in (True, False):
            output = _run(newborn.train(training), graph, target, batch)
            if torch.count_nonzero(output):
                raise KernelError(
                    f"got an output up to {output.abs().max().item():.3g} at birth; allowed: "
                    "exactly 0, as with init 'zero' on the last layer"
                )
            _refuse_unlearnable(newborn)
            _run(awake.train(training), graph, target, batch)
            for name, parameter in awake.named_parameters():
                if parameter.grad is None or not parameter.grad.isfinite().all():
                    raise KernelError(f"got no finite gradient for {name}; allowed: one for each")


def _refuse_unlearnable(newborn: fx.GraphModule) -> None:
    gradients = [parameter.grad for parameter in newborn.parameters()]
    if gradients and not any(grad is not None and grad.count_nonzero() for grad in gradients):
        raise KernelError(
            "got no gradient in any parameter at birth, so it would never learn; allowed: one "
            "zero-initialised layer on the way to the output, not several in a row"
        )


def _without_zeros(graph: Graph) -> Graph:
    nodes = tuple(
        node.model_copy(update={"init": "default"}) if isinstance(node, WeightedNode) else node
        for node in graph.nodes
    )
    return graph.model_copy(update={"nodes": nodes})


def _run(module: fx.GraphModule, graph: Graph, target: KernelTarget, batch: int) -> torch.Tensor:
    """The output for a random batch, after a backward pass where there is something to learn."""
    output: torch.Tensor = module(_inputs(graph, target, batch))
    if tuple(output.shape) != (batch, *target.output_shape):
        raise KernelError(
            f"got an output of shape {tuple(output.shape)}; allowed: "
            f"{(batch, *target.output_shape)}"
        )
    if not output.isfinite().all():
        raise KernelError("got a non-finite output; allowed: finite numbers")
    if output.requires_grad:
        module.zero_grad()
        torch.autograd.backward(output, torch.randn_like(output))
    return output.detach()


def _inputs(graph: Graph, target: KernelTarget, batch: int) -> torch.Tensor:
    """A random batch of what the graph reads, equal on every device."""
    shape = (batch, *input_shape(graph, target))
    if target.layer.kind == "Embedding" and source_of(graph) == "host":
        return torch.randint(target.layer.inputs, shape).to(target.device)
    return torch.randn(shape).to(device=target.device, dtype=DTYPES[target.dtype])


def _measure(graph: Graph, target: KernelTarget, cost: GraphCost) -> KernelFigures:
    """Sizes, and the median time of a forward and backward pass."""
    module = build(graph, target, generator_seed=_RANDOM_SEED)
    seconds = []
    for _ in range(LATENCY_REPEATS):
        started = time.perf_counter()
        _run(module, graph, target, LATENCY_BATCH)
        if torch.device(target.device).type == "cuda":
            torch.cuda.synchronize(target.device)
        seconds.append(time.perf_counter() - started)
    return KernelFigures(
        parameters=cost.parameters,
        flops=cost.flops,
        parameter_bytes=sum(parameter.nbytes for parameter in module.parameters()),
        latency_microseconds=statistics.median(seconds) * 1e6,
        latency_batch=LATENCY_BATCH,
        device=target.device,
        threads=torch.get_num_threads(),
    )
