"""A Tamiyo of one session: it decides for that one and leaves all others to theirs."""

import asyncio
import subprocess
import sys
import time
import urllib.request
import uuid

from esper.contracts.enums import ComponentType
from esper.contracts.messages import OonaMessage, TopicNames
from tests.unit.esper.services.oona.messages import client_of, is_idle


def ready(url):
    try:
        with urllib.request.urlopen(url + "/readyz", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def wait_until_ready(url):
    deadline = time.monotonic() + 60
    while not ready(url):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_it_answers_the_packets_of_its_session_alone(build, redis_server, tmp_path):
    namespace = f"scoped-{uuid.uuid4().hex[:8]}"
    settings = tmp_path / "esper.yaml"
    settings.write_text(f"redis: {{url: '{redis_server.url}', namespace: {namespace}}}\n")
    command = ["serve", "tamiyo", "--session", "uid-1", "--config", str(settings)]

    def asked(scope, epoch):
        packet = build.packet(session=scope, epoch=epoch)
        return OonaMessage.carrying(TopicNames.PACKETS, packet, ComponentType.TOLARIA, scope=scope)

    async def life(url):
        async with client_of(redis_server, namespace, scope=None) as bus:
            await bus.publish(asked("uid-2", 1))
            await asyncio.to_thread(wait_until_ready, url)
            await bus.publish(asked("uid-2", 2), asked("uid-1", 3), asked("uid-2", 4))
            answers = await bus.subscribe({TopicNames.DECISIONS}, "test")
            async with asyncio.timeout(60):
                answer = await answers.receive()
            decision = answer.open()
            assert (answer.scope, decision.session, decision.epoch) == ("uid-1", "uid-1", 3)
            await answers.acknowledge(answer)
            assert await is_idle(answers, 1.0)
            await answers.close()

    with subprocess.Popen(
        [sys.executable, "-m", "esper", *command], stderr=subprocess.PIPE, text=True
    ) as service:
        try:
            asyncio.run(life(service.stderr.readline().split()[1]))
        finally:
            service.terminate()
        assert service.wait(timeout=30) == 0
