"""What the end-to-end test of isolation tries on Redis, on one as the chart starts it.

So it is known without a cluster that each attempt is refused for the reason that is asked for.
"""

import asyncio
import json
import runpy
from pathlib import Path
from urllib.parse import quote

import pytest

from esper.contracts.messages import TopicNames
from esper.services.urza.redis_users import RedisUsers
from tests.e2e.verdicts import opened, refused
from tests.integration.test_chart_redis import USER, ChartRedis
from tools.servers.process import HOST

INTRUDER = Path(__file__).parents[1] / "e2e" / "intruder.py"
OTHER = {"namespace": "team", "uid": "other", "name": "other", "pod": "other-0", "object": "o"}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    async def made(url):
        users = RedisUsers(url)
        await users.check()
        await users.apply([USER])
        await users.close()

    with ChartRedis(tmp_path_factory.mktemp("redis")) as server:
        asyncio.run(made(server.url))
        yield server


@pytest.fixture
def intruder(server, tmp_path, monkeypatch):
    """The program in a pod with a user of Redis, or in one without."""

    def started(settings):
        (tmp_path / "esper.yaml").write_text(json.dumps(settings))
        (tmp_path / "hub-token").write_text("a token")
        told = {
            "settings": str(tmp_path),
            "redis": f"redis://{HOST}:{server.port}/0",
            "namespace": "team",
            "serves_namespace": False,
            "own": OTHER | {"uid": "uid"},
            "victims": [OTHER],
            "never_published": [TopicNames.DECISIONS, TopicNames.KERNEL_READY],
        }
        monkeypatch.setattr("sys.argv", ["-", json.dumps(told)])
        return runpy.run_path(str(INTRUDER))

    return started


def test_a_worker_is_refused_all_but_its_own_streams(server, intruder):
    user = f"{quote(USER.name, safe='')}:{quote(USER.password, safe='')}"
    program = intruder({"redis": {"url": f"redis://{user}@{HOST}:{server.port}/0"}})
    attempts = {f"bus {name}": came for name, came in program["bus"]()}
    assert len(attempts) > 500
    assert {name: came for name, came in attempts.items() if not refused(name, came)} == {}
    own = f"{USER.streams}:{TopicNames.PACKETS}"
    assert opened(program["commanded"](program["connected"](), "XADD", own, "*", "data", "{}"))


def test_a_pod_without_a_user_is_refused_everything(intruder):
    program = intruder({})
    attempts = {f"bus {name}": came for name, came in program["bus"]()}
    assert {name: came for name, came in attempts.items() if not refused(name, came)} == {}
    assert {came["code"] for came in attempts.values()} == {"NOAUTH", "WRONGPASS", "NOPERM"}


def test_a_redis_that_does_not_answer_has_refused_nothing(server, intruder):
    program = intruder({})
    nobody = program["connected"](f"redis://{HOST}:1/0")
    came = program["commanded"](nobody, "XLEN", "esper:team:other:packets")
    assert came["error"] == "ConnectionError"
    assert not refused("bus XLEN esper:team:other:packets", came)
    assert not opened(came)
