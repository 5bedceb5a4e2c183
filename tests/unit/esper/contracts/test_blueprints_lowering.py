"""Fitting a graph to a layer: sizes, the traced chain, prices, caps, identities."""

from __future__ import annotations

import pytest

from esper.contracts import lowering
from esper.contracts.blueprints import (
    BlueprintDocument,
    Graph,
    KernelTarget,
    LayerGeometry,
    bind,
    builtin,
    folds,
    infer,
    kernel_id,
    lower,
)
from esper.contracts.ir import (
    ActivationNode,
    ActivationOp,
    AvgPool2dOp,
    Conv2dNode,
    DropoutNode,
    DropoutOp,
    LinearNode,
    MaxPool2dOp,
)
from esper.errors import BlueprintError
from tests.unit.esper.kernel_targets import conv_pair, linear_pair, linear_place

LINEAR = linear_place(40, 16).target
CONV = conv_pair().target


def graph_of(*nodes: dict[str, object], source: str = "host") -> Graph:
    start = {"op": "input", "id": "x", "source": source}
    return Graph.model_validate({"nodes": [start, *nodes], "output": nodes[-1]["id"]})


def linear(name: str, source: str, features: object, **fields: object) -> dict[str, object]:
    return {"op": "linear", "id": name, "input": source, "features": features, **fields}


def conv(name: str, source: str, kernel: object, **fields: object) -> dict[str, object]:
    node = {"op": "conv2d", "id": name, "input": source, "channels": "out", "kernelSize": kernel}
    return {**node, **fields}


def refusal(graph: Graph, target: KernelTarget) -> BlueprintError:
    with pytest.raises(BlueprintError) as caught:
        bind(graph, target)
    return caught.value


def test_words_become_the_hosts_sizes() -> None:
    bound = bind(graph_of(linear("a", "x", "in"), linear("b", "a", "out")), LINEAR)
    assert [node.features for node in bound.nodes if isinstance(node, LinearNode)] == [40, 16]


def test_the_hosts_window_becomes_numbers() -> None:
    window = {"kernel_size": (2, 3), "stride": (2, 1), "padding": (0, 1), "dilation": (1, 2)}
    layer = LayerGeometry(kind="Conv2d", inputs=4, outputs=6, padding_mode="circular", **window)
    target = KernelTarget(layer=layer, input_shape=(4, 8, 9), output_shape=(6, 4, 7))
    node = bind(graph_of(conv("y", "x", "host")), target).nodes[1]
    assert isinstance(node, Conv2dNode)
    assert node.channels == 6
    assert {name: getattr(node, name) for name in window} == window
    assert node.padding_mode == "circular"


@pytest.mark.parametrize("name", ["noop", "low-rank", "widen"])
@pytest.mark.parametrize("target", [linear_pair().target, CONV], ids=["Linear", "Conv2d"])
def test_binding_again_changes_nothing(name: str, target: KernelTarget) -> None:
    bound = bind(builtin(name, {}).graph, target)
    assert bind(bound, target) == bound
    assert Graph.model_validate(bound.to_wire()) == bound


def test_a_layer_like_the_host_takes_its_bias_unless_told() -> None:
    layer = LayerGeometry(kind="Linear", inputs=4, outputs=4, bias=False)
    target = KernelTarget(layer=layer, input_shape=(4,), output_shape=(4,))
    like = {"op": "layer", "input": "x", "like": "host", "outputs": "out"}
    nodes = bind(
        graph_of(
            {**like, "id": "a"},
            {**like, "id": "b", "bias": True},
            {"op": "add", "id": "y", "inputs": ["a", "b"]},
        ),
        target,
    ).nodes
    assert [node.bias for node in nodes if isinstance(node, LinearNode)] == [False, True]


def test_widen_puts_the_traced_chain_in_place() -> None:
    chain = (
        ActivationOp(kind="leaky_relu", negative_slope=0.3),
        DropoutOp(p=0.25),
        ActivationOp(kind="gelu", approximate="tanh"),
    )
    target = linear_pair(ActivationOp(kind="relu")).target
    producer = target.producer.model_copy(update={"chain": chain})
    bound = bind(builtin("widen", {}).graph, target.model_copy(update={"producer": producer}))
    assert [node.op for node in bound.nodes] == [
        "input",
        "linear",
        "activation",
        "dropout",
        "activation",
        "linear",
    ]
    first, dropout, last = bound.nodes[2:5]
    assert isinstance(first, ActivationNode)
    assert first.negative_slope == 0.3
    assert isinstance(dropout, DropoutNode)
    assert (dropout.input, dropout.p) == (first.id, 0.25)
    assert isinstance(last, ActivationNode)
    assert (last.id, last.input, last.approximate) == ("act", dropout.id, "tanh")


def test_a_traced_name_that_is_taken_gets_a_number() -> None:
    graph = graph_of(
        {"op": "layer", "id": "traced1", "input": "x", "like": "producer", "outputs": 4},
        {"op": "activation", "id": "act", "input": "traced1", "kind": "traced"},
        {"op": "layer", "id": "y", "input": "act", "like": "host", "outputs": "out"},
        source="producer",
    )
    target = linear_pair(ActivationOp(kind="relu"), DropoutOp(p=0.5)).target
    names = [node.id for node in bind(graph, target).nodes]
    assert names == ["x", "traced1", "traced1_1", "act", "y"]


def test_nothing_between_the_layers_is_the_identity() -> None:
    node = bind(builtin("widen", {}).graph, linear_pair().target).nodes[2]
    assert isinstance(node, ActivationNode)
    assert node.kind == "identity"


@pytest.mark.parametrize("pool", [MaxPool2dOp(kernel_size=2), AvgPool2dOp(kernel_size=2)])
def test_widen_through_a_pool(pool: MaxPool2dOp | AvgPool2dOp) -> None:
    target = conv_pair(ActivationOp(kind="relu"), pool).target
    cost = infer(bind(builtin("widen", {"units": 4}).graph, target), target)
    assert cost.shapes["act"] == (4, 8, 8)
    assert cost.shapes["out"] == target.output_shape


@pytest.mark.parametrize(
    ("graph", "target", "field", "came"),
    [
        (graph_of(linear("y", "x", 15)), LINEAR, "spec.graph.output", "'y' of shape (15,)"),
        (graph_of(conv("y", "x", 3)), LINEAR, "spec.graph.nodes[1].op", "conv2d on a Linear host"),
        (
            graph_of(conv("y", "x", "host")),
            LINEAR,
            "spec.graph.nodes[1].op",
            "conv2d on a Linear host",
        ),
        (
            graph_of(linear("y", "x", 6)),
            CONV,
            "spec.graph.nodes[1].op",
            "linear on a Conv2d host",
        ),
        (
            graph_of({"op": "max_pool2d", "id": "y", "input": "x", "kernelSize": 2}),
            LINEAR,
            "spec.graph.nodes[1].op",
            "max_pool2d on a Linear host",
        ),
        (
            graph_of(
                linear("a", "x", 3),
                linear("b", "x", 4),
                {"op": "add", "id": "y", "inputs": ["a", "b"]},
            ),
            LINEAR,
            "spec.graph.nodes[3].inputs",
            "shapes [(3,), (4,)]",
        ),
        (
            graph_of(linear("a", "x", 3), {"op": "zeros", "id": "y", "input": "a"}),
            LINEAR,
            "spec.graph.nodes[2].input",
            "a",
        ),
        (
            graph_of(conv("a", "x", 3, groups=5), conv("y", "a", "host")),
            CONV,
            "spec.graph.nodes[1].groups",
            5,
        ),
        (
            graph_of(conv("a", "x", 17, padding=0), conv("y", "a", "host")),
            CONV,
            "spec.graph.nodes[1].kernelSize",
            "a window of 17 on 16 elements",
        ),
    ],
)
def test_what_does_not_fit_is_named(
    graph: Graph, target: KernelTarget, field: str, came: object
) -> None:
    error = refusal(graph, target)
    assert error.field == field
    assert error.came == came


def test_a_target_that_contradicts_itself() -> None:
    target = LINEAR.model_copy(update={"output_shape": (17,)})
    error = refusal(graph_of(linear("y", "x", "out")), target)
    assert error.field == "target.outputShape"


def test_widen_without_a_producer_says_why() -> None:
    error = refusal(builtin("widen", {}).graph, LINEAR)
    assert error.field == "spec.graph.nodes[0].source"
    assert "no single layer was traced" in error.allowed


def test_the_traced_chain_needs_a_producer() -> None:
    graph = graph_of(
        {"op": "activation", "id": "a", "input": "x", "kind": "traced"}, linear("y", "a", "out")
    )
    assert refusal(graph, LINEAR).field == "spec.graph.nodes[1].kind"


@pytest.mark.parametrize("grouped", ["host", "producer"])
def test_widen_refuses_groups_on_either_side(grouped: str) -> None:
    target, producer = CONV, CONV.producer
    if grouped == "host":
        layer = target.layer.model_copy(update={"groups": 2})
        target = target.model_copy(update={"layer": layer})
    else:
        layer = producer.layer.model_copy(update={"inputs": 4, "groups": 2})
        target = target.model_copy(
            update={"producer": producer.model_copy(update={"layer": layer})}
        )
    error = refusal(builtin("widen", {}).graph, target)
    assert "groups 1 in both" in error.allowed


def test_widen_refuses_two_kinds() -> None:
    producer = linear_pair().target.producer
    error = refusal(builtin("widen", {}).graph, CONV.model_copy(update={"producer": producer}))
    assert error.came == "producer Linear of host Conv2d"


def test_a_document_names_its_hosts() -> None:
    with pytest.raises(BlueprintError) as caught:
        lower(builtin("bottleneck-mlp", {}), CONV)
    assert (caught.value.field, caught.value.came) == ("spec.hosts", "Conv2d")
    document = builtin("bottleneck-mlp", {})
    assert lower(document, LINEAR) == bind(document.graph, LINEAR)


def test_a_price_counts_every_product_that_autograd_makes() -> None:
    graph = graph_of(linear("a", "x", 3), linear("b", "a", 16, bias=False))
    cost = infer(bind(graph, LINEAR), LINEAR)
    assert cost.parameters == 40 * 3 + 3 + 3 * 16
    # The input needs no gradient: two products for the first layer, three for the second.
    assert cost.flops == 2 * (2 * 40 * 3 + 3 * 3 * 16)
    assert cost.activation_elements == 40 + 3 + 16
    assert cost.shapes == {"x": (40,), "a": (3,), "b": (16,)}


def test_a_price_counts_every_position() -> None:
    layer = LayerGeometry(kind="Linear", inputs=4, outputs=5)
    target = KernelTarget(layer=layer, input_shape=(7, 3, 4), output_shape=(7, 3, 5))
    cost = infer(bind(graph_of(linear("y", "x", "out")), target), target)
    assert cost.parameters == 4 * 5 + 5
    assert cost.flops == 2 * 2 * 7 * 3 * 4 * 5


def test_groups_divide_the_price() -> None:
    layer = LayerGeometry(kind="Conv2d", inputs=4, outputs=6, kernel_size=3, padding=1)
    target = KernelTarget(layer=layer, input_shape=(4, 5, 5), output_shape=(6, 5, 5))
    one = infer(bind(graph_of(conv("y", "x", 3, bias=False)), target), target)
    two = infer(bind(graph_of(conv("y", "x", 3, bias=False, groups=2)), target), target)
    assert (one.parameters, one.flops) == (2 * two.parameters, 2 * two.flops)
    assert one.flops == 2 * 2 * 25 * 4 * 6 * 9


def test_a_symbolic_graph_has_no_price() -> None:
    for graph, target in (
        (graph_of(linear("y", "x", "out")), LINEAR),
        (graph_of(conv("y", "x", "host")), CONV),
    ):
        with pytest.raises(BlueprintError, match="allowed: a bound graph"):
            infer(graph, target)


@pytest.mark.parametrize(
    ("cap", "name"),
    [
        ("MAX_PARAMETERS", "parameters"),
        ("MAX_FLOPS", "FLOPs per sample"),
        ("MAX_ACTIVATION_ELEMENTS", "activation elements per sample"),
    ],
)
def test_caps_hold_at_their_value_and_not_above(
    cap: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bound = bind(builtin("bottleneck-mlp", {}).graph, LINEAR)
    cost = infer(bound, LINEAR)
    reached = {
        "MAX_PARAMETERS": cost.parameters,
        "MAX_FLOPS": cost.flops,
        "MAX_ACTIVATION_ELEMENTS": cost.activation_elements,
    }[cap]
    monkeypatch.setattr(lowering, cap, reached)
    infer(bound, LINEAR)
    monkeypatch.setattr(lowering, cap, reached - 1)
    with pytest.raises(BlueprintError, match=f"got {reached} {name}; allowed: at most"):
        infer(bound, LINEAR)


def test_a_graph_over_the_real_cap_is_refused_without_being_built() -> None:
    graph = graph_of(linear("a", "x", 1_000_000), linear("y", "a", "out"))
    with pytest.raises(BlueprintError, match="got 57000016 parameters; allowed: at most 50000000"):
        infer(bind(graph, LINEAR), LINEAR)


def test_a_kernel_is_named_by_what_it_is() -> None:
    digest = builtin("widen", {}).digest
    target = linear_pair(ActivationOp(kind="relu")).target
    identity = kernel_id(digest, target)
    assert len(identity) == 40
    producer = target.producer
    renamed = target.model_copy(update={"producer": producer.model_copy(update={"name": "other"})})
    assert kernel_id(digest, renamed) == identity
    changed = [
        target.model_copy(update={"dtype": "float64"}),
        target.model_copy(update={"device": "cuda"}),
        target.model_copy(update={"input_shape": (3, 24), "output_shape": (3, 10)}),
        target.model_copy(update={"producer": producer.model_copy(update={"chain": ()})}),
        target.model_copy(update={"producer": None}),
    ]
    others = {kernel_id(digest, other) for other in changed}
    others.add(kernel_id(builtin("noop", {}).digest, target))
    assert len(others | {identity}) == len(changed) + 2


def identity_of(name: str, source: str, kind: str = "identity") -> dict[str, object]:
    return {"op": "activation", "id": name, "input": source, "kind": kind}


HOST_CONV = LayerGeometry(kind="Conv2d", inputs=4, outputs=6, kernel_size=3, padding=1)


@pytest.mark.parametrize(
    ("graph", "folding"),
    [
        (graph_of({"op": "zeros", "id": "y", "input": "x"}), True),
        (graph_of(linear("a", "x", 3), linear("y", "a", "out")), True),
        (graph_of(linear("a", "x", 3), identity_of("b", "a"), linear("y", "b", "out")), True),
        (graph_of(linear("a", "x", 3), identity_of("b", "a", "relu"), linear("y", "b", 6)), False),
        (graph_of(identity_of("a", "x", "tanh"), linear("y", "a", "out")), False),
        (
            graph_of(linear("a", "x", 6), {"op": "multiply", "id": "y", "inputs": ["a", "a"]}),
            False,
        ),
        (
            graph_of(
                linear("a", "x", 6),
                {"op": "zeros", "id": "b", "input": "x"},
                {"op": "add", "id": "y", "inputs": ["a", "b"]},
            ),
            True,
        ),
        (
            graph_of(linear("a", "x", 6), {"op": "dropout", "id": "y", "input": "a", "p": 0.5}),
            True,
        ),
        (graph_of(conv("a", "x", "host"), conv("y", "a", 1)), True),
        (graph_of(conv("a", "x", 1), conv("y", "a", "host")), True),
        (graph_of(conv("a", "x", "host"), conv("y", "a", "host")), False),
        (graph_of(conv("a", "x", 5), conv("y", "a", 1)), False),
        (
            graph_of(
                {"op": "avg_pool2d", "id": "a", "input": "x", "kernelSize": 3, "stride": 1},
                conv("y", "a", 1),
            ),
            False,
        ),
    ],
)
def test_linear_chains_within_the_hosts_window_fold(graph: Graph, folding: bool) -> None:
    assert folds(graph) is folding


def test_a_window_like_the_hosts_folds_where_the_host_is_known() -> None:
    graph = graph_of(conv("y", "x", 3, padding=1))
    assert not folds(graph)
    assert folds(graph, HOST_CONV)
    assert not folds(graph, HOST_CONV.model_copy(update={"padding_mode": "reflect"}))


def test_a_bound_graph_folds_as_it_did_before() -> None:
    document = builtin("low-rank", {})
    assert folds(bind(document.graph, CONV), CONV.layer)
    assert folds(document.graph, CONV.layer)


def test_a_dense_chain_does_not_fold_into_groups() -> None:
    grouped = HOST_CONV.model_copy(update={"groups": 2})
    assert not folds(builtin("low-rank", {}).graph, grouped)
    own = graph_of(conv("y", "x", "host", groups=2))
    assert folds(own, grouped)
    assert folds(own, HOST_CONV)


def test_new_units_are_growth_also_where_all_is_linear() -> None:
    assert not folds(bind(builtin("widen", {}).graph, linear_pair().target))


def test_a_document_from_a_person_lowers_like_the_catalogues() -> None:
    graph = graph_of(
        linear("down", "x", 36),
        identity_of("act", "down", "gelu"),
        linear("up", "act", "out", init="zero"),
    )
    document = BlueprintDocument(name="mine", hosts=("LayerNorm", "Linear"), graph=graph)
    assert lower(document, LINEAR) == lower(builtin("bottleneck-mlp", {}), LINEAR)
    assert document.digest == builtin("bottleneck-mlp", {}).digest
