"""The chart's Redis as its files start it: who comes in, and who still does after a kill."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import redis

from esper.contracts.messages import TopicNames
from esper.services.urza.redis_users import RedisUser, RedisUsers
from tests.unit.charts.objects import named
from tools import helm
from tools.servers.process import HOST, ServerProcess
from tools.servers.redis_server import redis_binary

PASSWORD = "the password of the hub"
USER = RedisUser(
    name="esper-session:team:uid",
    password="the password of a session",
    streams="esper:team:uid",
    publishes=(TopicNames.PACKETS,),
)


class ChartRedis(ServerProcess):
    """Started by the chart's own script, with its places moved into a folder."""

    name = "redis"
    password = PASSWORD

    def _prepare(self) -> None:
        files = named(helm.render(), "ConfigMap", "esper-redis")["data"]
        for folder in ("data", "credentials", "bin"):
            (self.folder / folder).mkdir(exist_ok=True)
        (self.folder / "credentials" / "password").write_text(self.password)
        program = self.folder / "bin" / "redis-server"
        if not program.exists():
            program.symlink_to(_runnable(self.folder))
        for name, text in files.items():
            moved = text.replace("/etc/redis-credentials", f"{self.folder}/credentials")
            moved = moved.replace("/etc/redis/", f"{self.folder}/")
            moved = re.sub(r"(?<!\w)/data", f"{self.folder}/data", moved)
            moved = moved.replace("port 6379", f"port {self.port}")
            moved = moved.replace("bind * -::*", f"bind {HOST}")
            (self.folder / name).write_text(moved)

    def _command(self) -> Sequence[str]:
        return ["sh", "-c", f"cd '{self.folder}/data' && exec sh '{self.folder}/start.sh'"]

    def _environment(self) -> Mapping[str, str]:
        return {"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}"}

    def _answers(self) -> bool:
        try:
            return bool(self.client("esper-probe", "none").ping())
        except redis.RedisError:
            return False

    def client(self, user: str, password: str) -> redis.Redis:
        return redis.Redis(host=HOST, port=self.port, username=user, password=password)

    @property
    def url(self) -> str:
        return f"redis://esper-hub:{PASSWORD.replace(' ', '%20')}@{HOST}:{self.port}/0"


def _runnable(folder: Path) -> Path:
    """The server of release 8; its package may lack the bit, and may not be ours to change."""
    copy = folder / "bin" / "server"
    copy.write_bytes(redis_binary(8).read_bytes())
    copy.chmod(0o700)
    return copy


def test_users_and_messages_outlive_a_kill_of_redis(tmp_path: Path) -> None:
    async def made(server: ChartRedis) -> None:
        users = RedisUsers(server.url)
        try:
            await users.check()
            await users.apply([USER])
            assert await users.save()
        finally:
            await users.close()

    with ChartRedis(tmp_path) as server:
        asyncio.run(made(server))
        stream = f"esper:team:uid:{TopicNames.PACKETS}"
        key = server.client(USER.name, USER.password).xadd(stream, {"a": "b"})

        server.kill()
        server.start()
        session = server.client(USER.name, USER.password)
        assert session.xadd(stream, {"c": "d"}) > key
        assert session.xlen(stream) == 2

        # The installation's own users are as the chart says, whatever was saved of them.
        with pytest.raises(redis.AuthenticationError):
            redis.Redis(host=HOST, port=server.port).ping()
        probe = server.client("esper-probe", "none")
        assert probe.ping()
        hub = server.client("esper-hub", PASSWORD)
        for refused in (lambda: probe.xlen(stream), lambda: hub.get(stream), lambda: hub.keys()):
            with pytest.raises(redis.exceptions.NoPermissionError):
                refused()
        saved = (tmp_path / "data" / "users.acl").read_text()
        assert [line.split()[1] for line in saved.splitlines()].count("esper-hub") == 1
        with pytest.raises(redis.ResponseError, match="invalid bulk length"):
            session.xadd(stream, {"e": b"x" * (2**20 + 1)})


def test_a_password_that_was_changed_holds_after_the_next_start(tmp_path: Path) -> None:
    with ChartRedis(tmp_path) as server:
        assert server.client("esper-hub", PASSWORD).acl_whoami() == "esper-hub"
        server.password = "another"
        server.kill()
        server.start()
        assert server.client("esper-hub", "another").acl_whoami() == "esper-hub"
        with pytest.raises(redis.AuthenticationError):
            server.client("esper-hub", PASSWORD).acl_whoami()


def test_a_redis_without_a_file_for_users_is_told_apart(private_redis) -> None:  # type: ignore[no-untyped-def]
    async def life() -> None:
        users = RedisUsers(private_redis.url)
        try:
            assert await users.save()  # nothing has changed
            await users.apply([USER])
            assert not await users.save()
        finally:
            await users.close()

    asyncio.run(life())
