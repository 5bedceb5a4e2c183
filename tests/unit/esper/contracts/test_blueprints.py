"""What a graph may say, and how it is told what it may not."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from esper.contracts import ir
from esper.contracts.base import canonical_json
from esper.contracts.blueprints import (
    MAX_BYTES,
    MAX_NODES,
    BlueprintDocument,
    Graph,
    KernelTarget,
    LayerGeometry,
    ProducerDescription,
    reads_producer,
)
from esper.contracts.ir import ActivationOp, AddNode, inputs_of

X = {"op": "input", "id": "x"}


def graph_of(*nodes: dict[str, object], output: str | None = None) -> Graph:
    """A graph as a person's YAML would give it."""
    return Graph.model_validate({"nodes": [X, *nodes], "output": output or nodes[-1]["id"]})


def refusal(*nodes: dict[str, object], output: str | None = None) -> str:
    with pytest.raises(ValidationError) as caught:
        graph_of(*nodes, output=output)
    return "\n".join(
        f"{'.'.join(map(str, error['loc']))}: {error['msg']}" for error in caught.value.errors()
    )


def linear(name: str = "y", source: str = "x", **fields: object) -> dict[str, object]:
    return {"op": "linear", "id": name, "input": source, "features": "out", **fields}


def test_a_graph_survives_the_wire() -> None:
    graph = graph_of(
        {"op": "conv2d", "id": "a", "input": "x", "channels": "in", "kernelSize": "host"},
        {"op": "activation", "id": "b", "input": "a", "kind": "leaky_relu", "negativeSlope": 0.2},
        {"op": "dropout", "id": "c", "input": "b", "p": 0.5},
        {"op": "max_pool2d", "id": "d", "input": "c", "kernelSize": 3, "stride": [1, 1]},
        {"op": "avg_pool2d", "id": "e", "input": "c", "kernelSize": [3, 3], "padding": 1},
        {"op": "layer", "id": "f", "input": "d", "like": "host", "outputs": "out"},
        {"op": "zeros", "id": "g", "input": "x"},
        {"op": "multiply", "id": "h", "inputs": ["f", "e"]},
        {"op": "add", "id": "i", "inputs": ["g", "h"]},
    )
    assert Graph.model_validate(graph.to_wire()) == graph
    assert Graph.model_validate_json(canonical_json(graph.to_wire())) == graph


def test_numbers_stand_for_pairs_of_them() -> None:
    by_number = graph_of(
        {"op": "conv2d", "id": "y", "input": "x", "channels": 4, "kernelSize": 3, "padding": 1}
    )
    by_pair = graph_of(
        {
            "op": "conv2d",
            "id": "y",
            "input": "x",
            "channels": 4,
            "kernelSize": [3, 3],
            "padding": [1, 1],
        }
    )
    assert by_number == by_pair


def test_an_unknown_op_is_told_the_ops_there_are() -> None:
    message = refusal({"op": "lambda", "id": "y", "input": "x"})
    assert message.startswith("nodes.1: ")
    assert "'lambda'" in message
    for op in (
        "input",
        "linear",
        "conv2d",
        "layer",
        "activation",
        "dropout",
        "max_pool2d",
        "avg_pool2d",
        "add",
        "multiply",
        "zeros",
    ):
        assert f"'{op}'" in message


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([linear(source="y")], "nodes[1].input: got 'y', which closes a cycle or comes later"),
        (
            [linear("y", "z"), linear("z", "y")],
            "nodes[1].input: got 'z', which closes a cycle or comes later; "
            "allowed: an earlier id (x)",
        ),
        ([linear(source="w")], "nodes[1].input: got 'w'; allowed: an earlier id (x)"),
        ([linear(), linear()], "nodes[2].id: got 'y', which nodes[1] has"),
        ([linear("x")], "nodes[1].id: got 'x', which nodes[0] has"),
        (
            [linear("a"), linear("y")],
            "nodes[1].id: got 'a', which the output does not depend on",
        ),
        (
            [{"op": "input", "id": "p", "source": "producer"}, linear()],
            "nodes[1].id: got 'p', which the output does not depend on",
        ),
        (
            [
                {"op": "input", "id": "p", "source": "producer"},
                {"op": "add", "id": "y", "inputs": ["x", "p"]},
            ],
            "nodes: got inputs from both host and producer; allowed: one source for a graph",
        ),
    ],
)
def test_a_graph_that_is_not_well_formed(nodes: list[dict[str, object]], message: str) -> None:
    assert message in refusal(*nodes)


def test_the_output_must_be_a_node() -> None:
    assert "output: got 'z'; allowed: an earlier id (x, y)" in refusal(linear(), output="z")


def test_a_graph_that_does_not_start_with_its_input() -> None:
    with pytest.raises(ValidationError, match="none here; start with op input"):
        Graph.model_validate({"nodes": [linear()], "output": "y"})


@pytest.mark.parametrize(
    ("node", "path"),
    [
        (linear(features=0), "nodes.1.linear.features"),
        (linear(features=True), "nodes.1.linear.features"),
        (linear(features=3.0), "nodes.1.linear.features"),
        (linear(features="wide"), "nodes.1.linear.features"),
        (linear(features=1_000_001), "nodes.1.linear.features"),
        (linear(bias=1), "nodes.1.linear.bias"),
        (linear(init="ones"), "nodes.1.linear.init"),
        (linear(extra=1), "nodes.1.linear.extra"),
        (linear("Y"), "nodes.1.linear.id"),
        (linear("y" * 33), "nodes.1.linear.id"),
        (linear("__class__"), "nodes.1.linear.id"),
        ({"op": "dropout", "id": "y", "input": "x", "p": 1.0}, "nodes.1.dropout.p"),
        ({"op": "dropout", "id": "y", "input": "x", "p": float("nan")}, "nodes.1.dropout.p"),
        ({"op": "add", "id": "y", "inputs": ["x"]}, "nodes.1.add.inputs"),
        ({"op": "add", "id": "y", "inputs": ["x"] * 17}, "nodes.1.add.inputs"),
        (
            {"op": "activation", "id": "y", "input": "x", "kind": "eval"},
            "nodes.1.activation.kind",
        ),
        (
            {
                "op": "activation",
                "id": "y",
                "input": "x",
                "kind": "leaky_relu",
                "negativeSlope": float("inf"),
            },
            "nodes.1.activation.negativeSlope",
        ),
        (
            {"op": "conv2d", "id": "y", "input": "x", "channels": 2, "kernelSize": [3, 3, 3]},
            "nodes.1.conv2d.kernelSize",
        ),
    ],
)
def test_a_wrong_field_is_named_by_its_path(node: dict[str, object], path: str) -> None:
    assert path in refusal(node)


@pytest.mark.parametrize(
    ("argument", "owner"),
    [("negativeSlope", "leaky_relu"), ("alpha", "elu"), ("approximate", "gelu")],
)
def test_an_activation_takes_its_own_arguments_only(argument: str, owner: str) -> None:
    value = "tanh" if argument == "approximate" else 0.5
    node = {"op": "activation", "id": "y", "input": "x", argument: value}
    assert graph_of({**node, "kind": owner}).nodes[1].to_wire()[argument] == value
    assert f"allowed: kind '{owner}'" in refusal({**node, "kind": "tanh"})


def test_the_hosts_window_is_taken_whole() -> None:
    node = {"op": "conv2d", "id": "y", "input": "x", "channels": 2, "kernelSize": "host"}
    assert "takes them all from the host" in refusal({**node, "stride": 2})


def test_same_padding_has_no_stride() -> None:
    node = {"op": "conv2d", "id": "y", "input": "x", "channels": 2, "kernelSize": 3, "stride": 2}
    assert "padding: got 'same' with stride (2, 2); allowed: stride 1" in refusal(node)


@pytest.mark.parametrize("op", ["max_pool2d", "avg_pool2d"])
def test_a_pool_is_padded_by_half_a_window_at_most(op: str) -> None:
    node = {"op": op, "id": "y", "input": "x", "kernelSize": 3, "padding": 2}
    assert "allowed: at most half of kernelSize (3, 3)" in refusal(node)


def test_too_many_nodes_are_refused() -> None:
    chain = [linear(f"n{i}", f"n{i - 1}" if i else "x") for i in range(MAX_NODES)]
    assert f"at most {MAX_NODES} items" in refusal(*chain)
    assert len(graph_of(*chain[:-1]).nodes) == MAX_NODES


def test_too_many_bytes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # Names and counts are bounded, so no graph reaches the real cap; a lower one shows the check.
    monkeypatch.setattr(ir, "MAX_BYTES", 100)
    assert "allowed: at most 100" in refusal(linear())


def test_the_largest_graph_is_within_the_bytes() -> None:
    names = [f"{'n' * 29}{i:03d}" for i in range(MAX_NODES - 1)]
    nodes = [{"op": "add", "id": names[0], "inputs": ["x"] * 16}]
    nodes += [{"op": "add", "id": b, "inputs": [a] * 16} for a, b in pairwise(names)]
    assert len(canonical_json(graph_of(*nodes).to_wire())) < MAX_BYTES


def test_inputs_in_the_order_they_are_read() -> None:
    assert inputs_of(AddNode(id="y", inputs=("b", "a"))) == ("b", "a")
    assert [inputs_of(node) for node in graph_of(linear()).nodes] == [(), ("x",)]


def test_which_graphs_read_the_producer() -> None:
    fed = Graph.model_validate(
        {"nodes": [{**X, "source": "producer"}, linear()], "output": "y"},
    )
    assert reads_producer(fed)
    assert not reads_producer(graph_of(linear()))


def test_valid_padding_is_no_padding() -> None:
    fields = {"kind": "Conv2d", "inputs": 1, "outputs": 1, "kernelSize": 3}
    by_word = LayerGeometry.model_validate({**fields, "padding": "valid"})
    assert by_word == LayerGeometry.model_validate({**fields, "padding": 0})


@pytest.mark.parametrize(
    "fields", [{"kind": "Conv2d"}, {"kind": "Linear", "kernelSize": 3}, {"kind": "LSTM"}]
)
def test_a_geometry_that_no_layer_has(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        LayerGeometry.model_validate({"inputs": 1, "outputs": 1, **fields})


@pytest.mark.parametrize(
    "fields",
    [{"dtype": "torch.float32"}, {"dtype": "int8"}, {"device": "cuda:x"}, {"inputShape": []}],
)
def test_a_target_that_no_kernel_has(fields: dict[str, object]) -> None:
    layer = {"kind": "Linear", "inputs": 2, "outputs": 3}
    target = {"layer": layer, "inputShape": [2], "outputShape": [3]}
    assert KernelTarget.model_validate(target).dtype == "float32"
    with pytest.raises(ValidationError):
        KernelTarget.model_validate({**target, **fields})


def test_a_traced_chain_holds_the_operations_themselves() -> None:
    layer = LayerGeometry(kind="Linear", inputs=2, outputs=3)
    with pytest.raises(ValidationError, match="allowed: the operations themselves"):
        ProducerDescription(
            layer=layer, name="a", input_shape=(2,), chain=(ActivationOp(kind="traced"),)
        )


def test_a_digest_is_of_what_a_blueprint_does() -> None:
    graph = graph_of(linear())
    document = BlueprintDocument(name="one", hosts=("Linear", "Conv2d"), graph=graph)
    renamed = BlueprintDocument(
        name="other", description="Said otherwise.", hosts=("Conv2d", "Linear"), graph=graph
    )
    narrowed = BlueprintDocument(name="one", hosts=("Linear",), graph=graph)
    wider = BlueprintDocument(
        name="one", hosts=("Linear", "Conv2d"), graph=graph_of(linear(bias=False))
    )
    assert document.digest == renamed.digest
    assert len({document.digest, narrowed.digest, wider.digest}) == 3


def test_digests_stay_as_they_are() -> None:
    # Kernels in a store are found by them: a change here leaves every stored kernel behind.
    document = BlueprintDocument(name="one", hosts=("Linear",), graph=graph_of(linear()))
    assert document.digest == "f69192522201c773988d1e9b8f5f79ecb4e86156d271b4359e8576126c074f5d"


@pytest.mark.parametrize("name", ["", "Upper", "-a", "a/b", "a" * 254])
def test_a_name_that_no_resource_has(name: str) -> None:
    with pytest.raises(ValidationError, match="name"):
        BlueprintDocument(name=name, hosts=("Linear",), graph=graph_of(linear()))


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)


@given(junk, junk)
def test_whatever_comes_is_read_or_refused_and_nothing_else(nodes: object, output: object) -> None:
    try:
        graph = Graph.model_validate({"nodes": nodes, "output": output})
    except ValidationError:
        return
    json.dumps(graph.to_wire())


def test_contracts_need_no_torch() -> None:
    code = "import sys, esper.contracts.blueprints; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
