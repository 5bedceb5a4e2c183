"""Where a cluster lies and what its nodes are called."""

from pathlib import Path

import pytest

from tools.cluster.containers.layout import (
    DEFAULT_STATE,
    KIND,
    PODS,
    STATE,
    BadState,
    layout,
)

AT = Path("/var/tmp/one")


def test_the_folder_is_that_of_the_environment_else_the_default(monkeypatch):
    monkeypatch.setenv(STATE, str(AT))
    assert layout().state == AT
    assert layout(Path("/var/tmp/two")).state == Path("/var/tmp/two")
    monkeypatch.setenv(STATE, "")
    assert layout().state == DEFAULT_STATE


@pytest.mark.parametrize("path", ["/", "/run/x", "/var/lib/x", "/var/log", "/proc/x", "/dev/shm/x"])
def test_a_folder_that_nodes_hide_is_refused(path):
    with pytest.raises(BadState, match=rf"{STATE}: got {path}; allowed: a folder not below"):
        layout(Path(path))


def test_a_folder_whose_sockets_the_kernel_would_refuse_is_refused():
    longest = "/var/tmp/" + "x" * 68
    cluster = layout(Path(longest))
    assert len(str(cluster.first.socket) + ".ttrpc") == 107
    with pytest.raises(BadState, match="allowed: at most 77 characters"):
        layout(Path(longest + "x"))


def test_nodes_share_no_name_address_folder_or_pods():
    nodes = layout(AT).nodes
    for of in ("name", "address", "folder", "pods", "socket", "account"):
        assert len({getattr(node, of) for node in nodes}) == len(nodes)
    assert (nodes[0].name, nodes[0].address, nodes[0].pods) == (
        *("esper-1", "198.18.0.2", "10.244.0.0/24"),
    )
    assert nodes[1].pods == "10.244.1.0/24"
    assert str(PODS) == "10.244.0.0/16"


def test_control_groups_of_clusters_and_nodes_are_apart():
    one, two = layout(AT), layout(Path("/var/tmp/two"))
    groups = {one.cgroup_of(node) for node in one.nodes} | {two.cgroup_of(n) for n in two.nodes}
    assert len(groups) == 2 * len(one.nodes)
    assert all(group.startswith("/esper-") for group in groups)


def test_the_way_is_told_by_the_mark(tmp_path):
    cluster = layout(tmp_path)
    assert cluster.way is None
    cluster.mark.write_text(KIND)
    assert cluster.way == KIND
    cluster.mark.write_text("")
    assert cluster.way is None
