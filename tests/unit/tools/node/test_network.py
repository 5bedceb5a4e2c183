"""Addresses and names of pods, and the library that makes processes use them."""

import os
import subprocess
import sys

import pytest

from tools.cluster.node import network
from tools.cluster.node.network import Addresses, Names, network_environment, ports_of
from tools.servers.process import ServerError, free_port


def pod(name, address, *, ready=True, labels=None, **spec):
    condition = {"type": "Ready", "status": str(ready)}
    return {
        "metadata": {"name": name, "namespace": "lab", "labels": labels or {"app": "x"}},
        "spec": {"containers": [{"name": "main"}], **spec},
        "status": {"podIP": address, "conditions": [condition]},
    }


def service(name="svc", *, namespace="lab", **spec):
    metadata = {"name": name, "namespace": namespace}
    return {"metadata": metadata, "spec": {"selector": {"app": "x"}, **spec}}


def test_addresses_are_of_the_loopback_and_given_once():
    addresses = Addresses()
    found = [addresses.new() for _ in range(1000)]
    assert len(set(found)) == 1000
    assert all(address.startswith("127.") for address in found)
    assert not [a for a in found if a.rsplit(".", 1)[1] in ("0", "255")]
    assert not [a for a in found if a.startswith("127.0.")]


def test_names_are_those_of_ready_pods_that_a_service_selects(tmp_path):
    pods = [
        pod("a", "127.1.1.1"),
        pod("b", "127.1.1.2", ready=False),
        pod("c", "127.1.1.3", labels={"app": "y"}),
        pod("d", "127.1.1.4", hostname="d-0", subdomain="svc"),
        {**pod("e", "127.1.1.5"), "status": {}},
    ]
    names = Names(tmp_path / "names")
    names.write([service(), service("other", namespace="elsewhere")], pods)
    assert names.path.read_text().splitlines() == [
        "127.1.1.1 svc.lab.svc.cluster.local",
        "127.1.1.4 d-0.svc.lab.svc.cluster.local",
        "127.1.1.4 svc.lab.svc.cluster.local",
    ]
    names.write([service(publishNotReadyAddresses=True)], pods)
    assert "127.1.1.2 svc.lab.svc.cluster.local" in names.path.read_text()
    names.write([service(selector=None)], pods)
    assert names.path.read_text() == ""


def test_ports_are_those_declared_and_those_after_the_own_name():
    container = {
        "ports": [{"containerPort": 8080}],
        "args": ["--at=one-0.svc:29400", "--peer=one-1.svc:29401", "one-0.svc.lab.svc:29402"],
        "env": [{"name": "A", "value": "one-0.svc:29403"}],
    }
    found = ports_of(pod("a", "x", hostname="one-0", subdomain="svc", containers=[container]))
    assert found == {8080, 29400, 29402, 29403}


def inside(code, tmp_path, *, ports=(), names=""):
    """Run Python as a process of a pod at 127.77.1.1 in namespace lab."""
    (tmp_path / "names").write_text(names)
    containers = [{"ports": [{"containerPort": port} for port in ports]}]
    wanted = pod("a", "127.77.1.1", containers=containers)
    environment = network_environment(wanted, "127.77.1.1", tmp_path / "names")
    done = subprocess.run(
        [sys.executable, "-c", f"import socket\n{code}"],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout.split()


def test_listeners_on_every_address_take_the_pods_on_its_ports_alone(tmp_path):
    mine, other = free_port(), free_port()
    code = f"""
for family, everywhere, port in [
    (socket.AF_INET, "0.0.0.0", {mine}), (socket.AF_INET, "0.0.0.0", {other}),
    (socket.AF_INET, "127.0.0.1", {mine}), (socket.AF_INET, "0.0.0.0", 0),
]:
    with socket.socket(family) as listening:
        listening.bind((everywhere, port))
        print(listening.getsockname()[0])
"""
    assert inside(code, tmp_path, ports=[mine]) == ["127.77.1.1", "0.0.0.0", "127.0.0.1", "0.0.0.0"]


def test_listeners_of_both_families_take_the_pods_too(tmp_path):
    port = free_port()
    code = f"""
with socket.create_server(("", {port}), family=socket.AF_INET6, dualstack_ipv6=True) as listening:
    print(listening.getsockname()[0])
    with socket.create_connection(("127.77.1.1", {port})) as client:
        print(client.getpeername()[0])
"""
    assert inside(code, tmp_path, ports=[port]) == ["::ffff:127.77.1.1", "127.77.1.1"]


NAMES = """127.77.1.1 one-0.svc.lab.svc.cluster.local
127.77.1.2 svc.other.svc.cluster.local
"""


@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("one-0.svc", "127.77.1.1"),
        ("one-0.svc.lab", "127.77.1.1"),
        ("one-0.svc.lab.svc", "127.77.1.1"),
        ("ONE-0.svc.lab.svc.cluster.local.", "127.77.1.1"),
        ("svc.other", "127.77.1.2"),
        ("localhost", "127.0.0.1"),
        ("127.0.0.1", "127.0.0.1"),
        ("svc", "none"),
        ("example.org", "none"),
    ],
)
def test_names_are_those_of_the_cluster_and_no_others(tmp_path, name, address):
    code = f"""
try:
    print(socket.getaddrinfo({name!r}, 80, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])
except socket.gaierror:
    print("none")
"""
    assert inside(code, tmp_path, names=NAMES) == [address]


def test_without_a_compiler_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    network.network_library.cache_clear()
    with pytest.raises(ServerError, match="install a C compiler"):
        network.network_library()
