"""Every kind of host in the IR: geometries, layouts, sizes, prices, and what folds."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from pydantic import ValidationError

from esper.contracts.base import digest_of
from esper.contracts.blueprints import (
    BlueprintDocument,
    Graph,
    KernelTarget,
    LayerGeometry,
    bind,
    builtin,
    folds,
    infer,
    input_shape,
    kernel_id,
    source_of,
)
from esper.contracts.ir import ActivationOp, Conv1dNode, EmbeddingNode, LinearNode
from esper.contracts.shapes import host_shape
from esper.errors import BlueprintError
from tests.unit.esper.kernel_targets import (
    Place,
    a_place_of_each_kind,
    conv_pair,
    linear_pair,
    norm_places,
    sequence_places,
)

PLACES = {kind: spot.target for kind, spot in a_place_of_each_kind().items()}


def graph_of(*nodes: dict[str, object], source: str = "host") -> Graph:
    start = {"op": "input", "id": "x", "source": source}
    return Graph.model_validate({"nodes": [start, *nodes], "output": nodes[-1]["id"]})


def node(op: str, name: str, source: str = "x", **fields: object) -> dict[str, object]:
    return {"op": op, "id": name, "input": source, **fields}


@pytest.mark.parametrize(
    ("fields", "window"),
    [
        ({"kernel_size": 3}, ((3,), (1,), (0,), (1,))),
        ({"kernelSize": 3, "stride": 2, "padding": "valid"}, ((3,), (2,), (0,), (1,))),
        ({"kernel_size": [3], "padding": "same", "dilation": (2,)}, ((3,), (1,), "same", (2,))),
    ],
)
def test_a_1d_convolution_has_one_number_for_each_size(
    fields: dict[str, object], window: tuple[object, ...]
) -> None:
    layer = LayerGeometry.model_validate({"kind": "Conv1d", "inputs": 2, "outputs": 3, **fields})
    assert (layer.kernel_size, layer.stride, layer.padding, layer.dilation) == window
    assert LayerGeometry.model_validate(layer.to_wire()) == layer


def test_a_2d_convolution_has_two() -> None:
    layer = LayerGeometry.model_validate(
        {"kind": "Conv2d", "inputs": 2, "outputs": 3, "kernelSize": 3, "padding": 1}
    )
    assert (layer.kernel_size, layer.stride, layer.padding) == ((3, 3), (1, 1), (1, 1))


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"kind": "Conv1d"}, "kernelSize"),
        ({"kind": "Conv1d", "kernel_size": (3, 3)}, "kernelSize"),
        ({"kind": "Conv2d", "kernel_size": (3,)}, "kernelSize"),
        ({"kind": "Conv1d", "kernel_size": 3, "stride": (1, 1)}, "stride"),
        ({"kind": "Conv2d", "kernel_size": 3, "padding": (1,)}, "padding"),
        ({"kind": "Conv1d", "kernel_size": True}, "kernel"),
        ({"kind": "LayerNorm", "outputs": 2, "kernel_size": 3}, "kernelSize"),
        ({"kind": "LayerNorm"}, "outputs"),
        ({"kind": "BatchNorm2d"}, "outputs"),
    ],
)
def test_sizes_that_a_kind_does_not_have(fields: dict[str, object], field: str) -> None:
    with pytest.raises(ValidationError) as caught:
        LayerGeometry.model_validate({"inputs": 2, "outputs": 3, **fields})
    assert field in str(caught.value)


def test_only_an_embedding_reads_single_numbers() -> None:
    table = LayerGeometry(kind="Embedding", inputs=5, outputs=3)
    assert KernelTarget(layer=table, input_shape=(), output_shape=(3,)).input_shape == ()
    dense = LayerGeometry(kind="Linear", inputs=5, outputs=3)
    with pytest.raises(ValidationError, match=r"inputShape: got \(\) for Linear"):
        KernelTarget(layer=dense, input_shape=(), output_shape=(3,))


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.filter_too_much])
@given(sequence_places() | norm_places())
def test_output_shapes_are_torchs(spot: Place) -> None:
    target = spot.target  # its output shape is what torch gave
    assert host_shape(target.layer, target.input_shape) == target.output_shape


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("Linear", (4, 5)),
        ("LayerNorm", (6, 5)),
        ("Conv1d", (6, 3, 3)),
        ("Conv1d", (5, 9)),
        ("BatchNorm2d", (6, 4)),
    ],
)
def test_an_input_that_a_layer_can_not_take(kind: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(BlueprintError) as caught:
        host_shape(PLACES[kind].layer, shape)
    assert caught.value.field == "target.inputShape"


def test_what_a_graph_reads() -> None:
    target = linear_pair(ActivationOp(kind="relu")).target
    for name, source, shape in (
        ("low-rank", "host", (24,)),
        ("widen", "producer", (40,)),
        ("affine", "output", (10,)),
    ):
        graph = builtin(name, {}).graph
        assert source_of(graph) == source
        assert input_shape(graph, target) == shape


def test_inputs_of_one_graph_have_one_source() -> None:
    with pytest.raises(ValidationError, match="one source"):
        graph_of(
            {"op": "input", "id": "o", "source": "output"},
            {"op": "add", "id": "y", "inputs": ["x", "o"]},
        )


def test_a_measured_birth_is_at_the_input_only() -> None:
    first = node("linear", "a", features=3, init="gradient")
    assert graph_of(first).nodes[1].init == "gradient"
    with pytest.raises(ValidationError, match=r"nodes\[2\].init: got 'gradient' on 'b'"):
        graph_of(first, node("linear", "b", "a", features=3, init="gradient"))
    for name in ("low-rank", "bottleneck-mlp", "bottleneck-conv", "widen"):
        document = builtin(name, {"initialisation": "gradient"})
        assert document.graph.nodes[1].init == "gradient"
        assert document.digest != builtin(name, {}).digest
        assert builtin(name, {"initialisation": "default"}).digest == builtin(name, {}).digest


def test_a_table_has_no_measured_birth() -> None:
    graph = builtin("low-rank", {"initialisation": "gradient"}).graph
    with pytest.raises(BlueprintError) as caught:
        bind(graph, PLACES["Embedding"])
    assert caught.value.field == "spec.graph.nodes[1].init"


def test_a_layer_like_the_host_is_of_its_kind() -> None:
    like = {"like": "host", "outputs": "out"}
    bound = bind(graph_of(node("layer", "y", **like)), PLACES["Conv1d"]).nodes[1]
    assert isinstance(bound, Conv1dNode)
    assert (bound.kernel_size, bound.stride, bound.padding) == ((3,), (2,), (1,))
    pointwise = node("layer", "y", "t", pointwise=True, **like)
    table = node("layer", "t", like="host", outputs=2)
    found = bind(graph_of(table, pointwise), PLACES["Embedding"]).nodes[1:]
    assert isinstance(found[0], EmbeddingNode)
    assert (found[0].rows, found[0].features) == (7, 2)
    assert isinstance(found[1], LinearNode)
    assert found[1].features == 5


MEAN, ROW = node("mean", "m"), node("sequence", "s")


@pytest.mark.parametrize(
    ("kind", "nodes", "field"),
    [
        ("vector", [MEAN], "nodes[1].input"),
        ("vector", [ROW], "nodes[1].input"),
        ("Conv2d", [node("linear", "y", features=5)], "nodes[1].op"),
        ("BatchNorm2d", [node("linear", "y", features=6)], "nodes[1].op"),
        ("Conv2d", [node("conv1d", "y", channels=5, kernelSize=1)], "nodes[1].op"),
        ("Conv1d", [node("conv2d", "y", channels=5, kernelSize=1)], "nodes[1].op"),
        ("Linear", [node("embedding", "y", features=5)], "nodes[1].op"),
        ("Embedding", [node("dropout", "y", p=0.5)], "nodes[1].input"),
        ("Conv2d", [ROW, node("conv2d", "y", "s", channels=5, kernelSize=1)], "nodes[2].input"),
        ("Linear", [node("attention", "y")], "nodes[1].input"),
        ("Linear", [ROW, node("attention", "y", "s", heads=4)], "nodes[2].heads"),
        ("Linear", [ROW, node("attention", "y", "s", heads=3)], "nodes[2].heads"),
        ("Linear", [ROW, node("sequence", "y", "s")], "nodes[2].input"),
        ("Linear", [MEAN, node("spread", "y", "m", positions="x")], "nodes[2].input"),
        ("Linear", [ROW, node("spread", "y", "s", positions="s")], "nodes[2].positions"),
        ("Linear", [{"op": "gate", "id": "y", "value": "x", "gate": "x"}], "nodes[1].gate"),
        (
            "Linear",
            [
                MEAN,
                node("linear", "l", "m", features=5),
                {"op": "gate", "id": "y", "value": "x", "gate": "l"},
            ],
            "nodes[3].gate",
        ),
        ("Linear", [node("layer", "y", like="host", outputs="in", depthwise=True)], "nodes[1].dep"),
        ("Linear", [MEAN, {"op": "add", "id": "y", "inputs": ["x", "m"]}], "nodes[2].inputs"),
        ("Conv1d", [MEAN, node("zeros", "y", "m")], "nodes[2].input"),
    ],
)
def test_what_has_no_meaning_is_named(
    kind: str, nodes: list[dict[str, object]], field: str
) -> None:
    with pytest.raises(BlueprintError) as caught:
        bind(graph_of(*nodes), PLACES[kind])
    assert caught.value.field.startswith(f"spec.graph.{field}")


def test_a_sequence_is_no_image_of_the_same_shape() -> None:
    layer = LayerGeometry(kind="Conv1d", inputs=4, outputs=4, kernel_size=1)
    target = KernelTarget(layer=layer, input_shape=(4, 4), output_shape=(4, 4))
    with pytest.raises(BlueprintError, match="one shape and layout"):
        bind(graph_of(ROW, {"op": "add", "id": "y", "inputs": ["x", "s"]}), target)
    with pytest.raises(BlueprintError, match="output"):
        bind(graph_of(ROW), target)


def test_layers_can_not_be_pointwise_and_depthwise() -> None:
    with pytest.raises(ValidationError, match="depthwise"):
        graph_of(node("layer", "y", like="host", outputs="in", depthwise=True, pointwise=True))


@pytest.mark.parametrize(
    ("name", "kind", "parameters", "products"),
    [
        ("affine", "Conv2d", 2 * 5, 2 * (5 * 20)),
        ("low-rank", "Embedding", 7 * 8 + 8 * 5, 4 * 3 * (8 * 5)),
        ("low-rank", "Conv1d", 6 * 8 * 3 + 8 * 5, 5 * (2 * 6 * 8 * 3 + 3 * 8 * 5)),
        ("depthwise-separable-conv", "Conv2d", 60 + 35, 20 * (2 * 6 * 9 + 3 * 6 * 5)),
        ("squeeze-excitation", "Conv2d", 6 * 16 + 17 * 5, 2 * 5 * 16 + 3 * 16 * 5),
        ("bottleneck-conv", "BatchNorm2d", 7 * 16 + 17 * 6, 12 * (2 * 6 * 16 + 3 * 16 * 6)),
    ],
)
def test_prices(name: str, kind: str, parameters: int, products: int) -> None:
    cost = infer(bind(builtin(name, {}).graph, PLACES[kind]), PLACES[kind])
    assert (cost.parameters, cost.flops) == (parameters, 2 * products)


def test_attention_over_too_many_positions_is_over_the_cap() -> None:
    layer = LayerGeometry(kind="Conv2d", inputs=2, outputs=2, kernel_size=1)
    target = KernelTarget(layer=layer, input_shape=(2, 80, 80), output_shape=(2, 80, 80))
    bound = bind(builtin("attention", {"channels": 4}).graph, target)
    with pytest.raises(BlueprintError, match="activation elements"):
        infer(bound, target)


def test_what_folds_beside_every_kind() -> None:
    folding = {
        (name, kind)
        for name in ("noop", "affine", "low-rank", "squeeze-excitation", "bottleneck-conv")
        for kind, target in PLACES.items()
        if target.layer.kind in builtin(name, {}).hosts
        if (name, kind) != ("squeeze-excitation", "vector")
        if folds(bind(builtin(name, {}).graph, target), target.layer)
    }
    everywhere = {(name, kind) for name in ("noop", "affine") for kind in PLACES}
    low_rank = {("low-rank", kind) for kind in ("vector", "Linear", "Conv1d", "Conv2d")}
    assert folding == everywhere | low_rank | {("low-rank", "Embedding")}


@pytest.mark.parametrize("kind", ["LayerNorm", "BatchNorm2d"])
def test_a_norm_has_no_place_for_a_product_of_matrices(kind: str) -> None:
    like = {"like": "host", "outputs": "out"}
    for source in ("host", "output"):
        graph = graph_of(node("layer", "y", **like), source=source)
        assert not folds(bind(graph, PLACES[kind]), PLACES[kind].layer)
    scaled = graph_of(node("affine", "y"))
    assert not folds(scaled, PLACES[kind].layer)


def test_a_product_behind_the_hosts_output_folds_and_a_second_window_does_not() -> None:
    layer = PLACES["Conv2d"].layer
    pointwise = node("layer", "y", like="host", outputs="out", pointwise=True)
    assert folds(graph_of(pointwise, source="output"), layer)
    windowed = node("layer", "y", like="host", outputs="out")
    assert not folds(graph_of(windowed, source="output"), layer)


def test_kernels_compiled_for_linear_and_conv2d_layers_keep_their_identity() -> None:
    linear = linear_pair(ActivationOp(kind="relu")).target
    conv = conv_pair(ActivationOp(kind="relu")).target
    assert kernel_id("digest", linear) == "b75ab206042a23b8acf963dbf8b48775a55f9d25"
    assert kernel_id("digest", conv) == "081c85a1b78d9e069dd16a8e75c39e6499033f5e"
    for name, target, digest in (
        ("noop", linear, "4636133a626c"),
        ("low-rank", linear, "557f83c0dc34"),
        ("bottleneck-mlp", linear, "64ee47ae62e7"),
        ("widen", linear, "a073ffba2a3d"),
        ("noop", conv, "4636133a626c"),
        ("low-rank", conv, "c83e3bfe1b81"),
        ("widen", conv, "bb5322976967"),
    ):
        found = bind(builtin(name, {}).graph, target)
        assert digest_of(found.to_wire())[:12] == digest, name


def test_a_document_with_every_kind_is_one_on_the_wire() -> None:
    document = builtin("noop", {})
    assert BlueprintDocument.model_validate(document.to_wire()).digest == document.digest
    assert len(document.hosts) == 6
