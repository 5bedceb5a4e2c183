"""What the end-to-end test of isolation tries, on a Redis as the chart starts it and on a hub.

So it is known without a cluster that each attempt is refused for the reason that is asked for.
"""

import asyncio
import json
import runpy
from pathlib import Path
from urllib.parse import quote

import pytest

from esper.contracts.messages import TopicNames
from esper.services.urza.auth import Role
from esper.services.urza.redis_users import RedisUsers
from tests.e2e.verdicts import opened, refused
from tests.integration.test_chart_redis import USER, ChartRedis
from tests.unit.esper.services.urza.hubs import Place
from tests.unit.esper.services.urza.serving import listening, settings, token
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
def intruder(tmp_path, monkeypatch):
    """The program, in a pod with these settings and this token of the hub."""

    def started(settings, *, token="a token", redis=""):
        (tmp_path / "esper.yaml").write_text(json.dumps(settings))
        (tmp_path / "hub-token").write_text(token)
        told = {
            "settings": str(tmp_path),
            "redis": redis,
            "kernel": "0" * 64,
            "kernel_is_foreign": True,
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


def test_a_pod_without_a_user_is_refused_everything(server, intruder):
    program = intruder({}, redis=f"redis://{HOST}:{server.port}/0")
    attempts = {f"bus {name}": came for name, came in program["bus"]()}
    assert {name: came for name, came in attempts.items() if not refused(name, came)} == {}
    assert {came["code"] for came in attempts.values()} == {"NOAUTH", "WRONGPASS", "NOPERM"}


def test_a_redis_that_does_not_answer_has_refused_nothing(intruder):
    program = intruder({})
    nobody = program["connected"](f"redis://{HOST}:1/0")
    came = program["commanded"](nobody, "XLEN", "esper:team:other:packets")
    assert came["error"] == "ConnectionError"
    assert not refused("bus XLEN esper:team:other:packets", came)
    assert not opened(came)


def test_a_worker_is_refused_what_the_hub_has_of_others(intruder, tmp_path):
    place = Place(f"sqlite+aiosqlite:///{tmp_path}/urza.sqlite", tmp_path)

    def tried(url):
        program = intruder(
            {"hub": {"url": url}}, token=token(Role.SESSION, "uid", namespace="team")
        )
        asked = program["asked"]
        for uid in ("uid", "other"):
            given = {"name": uid, "uid": uid, "namespace": "team", "epochs": 1}
            body = given | {"numLayers": 1, "numSlots": 1}
            made = asked(f"{url}/api/v1/sessions/", "POST", body, token=token())
            assert opened(made), made
        assert opened(asked(f"{url}/api/v1/sessions/uid"))
        return {f"hub {name}": came for name, came in program["hub"]()}

    async def served():
        async with listening(settings(place)) as url:
            return await asyncio.to_thread(tried, url)

    attempts = asyncio.run(served())
    assert len(attempts) > 30
    assert {name: came for name, came in attempts.items() if not refused(name, came)} == {}
