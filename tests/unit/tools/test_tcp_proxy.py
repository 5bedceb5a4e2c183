"""The way that can be cut: what goes through, what is refused, what hangs."""

import socket
import socketserver
import threading

import pytest

from tools.servers.process import HOST
from tools.servers.tcp_proxy import TcpProxy


class Echo(socketserver.BaseRequestHandler):
    def handle(self):
        while chunk := self.request.recv(65536):
            self.request.sendall(chunk)
        self.request.sendall(b" bye")


@pytest.fixture
def echo():
    with socketserver.ThreadingTCPServer((HOST, 0), Echo) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


@pytest.fixture
def proxy(echo):
    with TcpProxy(echo) as running:
        yield running


@pytest.fixture
def connected(proxy):
    with socket.create_connection((HOST, proxy.port), timeout=10) as client:
        client.sendall(b"hello")
        assert client.recv(100) == b"hello"
        yield client


def test_bytes_go_both_ways_and_an_end_is_passed_on(proxy, connected):
    sent = bytes(range(256)) * 4096
    received = bytearray()
    sending = threading.Thread(target=connected.sendall, args=(sent,))
    sending.start()
    while len(received) < len(sent):
        received += connected.recv(65536)
    sending.join()
    connected.shutdown(socket.SHUT_WR)
    assert connected.recv(100) == b" bye"
    assert connected.recv(100) == b""
    assert bytes(received) == sent


def test_refused_ends_connections_and_refuses_new_ones_until_it_heals(proxy, connected):
    assert proxy.connections == 1
    proxy.refuse()
    assert proxy.connections == 0
    with pytest.raises(ConnectionResetError):
        connected.recv(100)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((HOST, proxy.port), timeout=10)
    proxy.heal()
    with socket.create_connection((HOST, proxy.port), timeout=10) as client:
        client.sendall(b"again")
        assert client.recv(100) == b"again"


def test_hung_lets_no_byte_through_and_loses_none(proxy, connected):
    proxy.hang()
    connected.sendall(b"later")
    connected.settimeout(0.2)
    with pytest.raises(TimeoutError):
        connected.recv(100)
    with socket.create_connection((HOST, proxy.port), timeout=0.2) as late:
        late.sendall(b"new")
        with pytest.raises(TimeoutError):
            late.recv(100)
        proxy.heal()
        connected.settimeout(10)
        late.settimeout(10)
        assert connected.recv(100) == b"later"
        assert late.recv(100) == b"new"


def test_what_hangs_can_be_refused(proxy, connected):
    proxy.hang()
    connected.sendall(b"lost")
    proxy.refuse()
    with pytest.raises(ConnectionResetError):
        connected.recv(100)


def test_a_target_that_is_away_ends_the_connection(echo):
    with TcpProxy(1) as proxy, socket.create_connection((HOST, proxy.port), timeout=10) as client:
        assert client.recv(100) == b""
