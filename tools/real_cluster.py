"""A cluster with the chart in it, as its administrator sees it: kubectl, the hub, the bus.

All is reached by way of the API server, whichever way the cluster was made: kubectl forwards a port
of the loopback to the release's Services, whose tokens stand in the release's Secret.
"""

from __future__ import annotations

import base64
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from esper.configs import HubConfig, RedisConfig
from esper.contracts.messages import OonaMessage, TopicNames
from esper.services.oona_client import OonaClient
from esper.services.urza.http_client import HttpUrza
from tools import helm, kubectl
from tools.cluster.programs import cluster_program
from tools.servers.process import HOST, ServerError, dismiss, keeper_of

HUB, REDIS = f"{helm.RELEASE}-urza", f"{helm.RELEASE}-redis"
HUB_PORT, REDIS_PORT = 8000, 6379
CREDENTIALS = f"{helm.RELEASE}-credentials"
FORWARD_SECONDS = 30.0
_FORWARDED = re.compile(rf"^Forwarding from {re.escape(HOST)}:(\d+) -> ", re.MULTILINE)


class RealCluster:
    """A cluster that runs, with the release that `make install` makes.

    Args:
        kubeconfig: of one who may do everything in it.
    """

    def __init__(self, kubeconfig: Path) -> None:
        self.kubeconfig = kubeconfig

    def kubectl(self, *words: str, given: str | None = None) -> str:
        """What kubectl prints; `given` is its standard input.

        Raises:
            ServerError: it ended with an error, which the message tells, or not at all.
        """
        return kubectl.run(*words, kubeconfig=self.kubeconfig, given=given)

    def get(self, *words: str) -> Any:
        """What `kubectl get WORDS` finds, as an object."""
        return kubectl.get(*words, kubeconfig=self.kubeconfig)

    @contextmanager
    def forwarded(self, service: str, port: int) -> Iterator[int]:
        """A port of the loopback that leads to a Service of the release.

        It leads to one pod, and ends with that.

        Raises:
            ServerError: the Service has no pod that is ready, or there is no such one.
        """
        words = ("port-forward", f"--address={HOST}", f"service/{service}", f":{port}")
        config = (f"--kubeconfig={self.kubeconfig}", f"--namespace={helm.NAMESPACE}")
        command = [str(cluster_program("kubectl")), *config, *words]
        with tempfile.TemporaryFile() as said:
            process = subprocess.Popen(command, stdout=said, stderr=said)
            keeper = keeper_of(process)
            try:
                yield _forwarded_port(process, Path(f"/proc/self/fd/{said.fileno()}"))
            finally:
                process.kill()
                process.wait()
                dismiss(keeper)

    @contextmanager
    def hub(self) -> Iterator[HubConfig]:
        """What reaches the hub, with an admin's token.

        Raises:
            ServerError: it can't be reached.
        """
        secret = self.get("-n", helm.NAMESPACE, "secret", CREDENTIALS)["data"]["admin-token"]
        token = SecretStr(base64.b64decode(secret).decode())
        with self.forwarded(HUB, HUB_PORT) as port:
            yield HubConfig(url=f"http://{HOST}:{port}", token=token)

    async def transitions(self, namespace: str, uid: str) -> list[OonaMessage]:
        """Every transition of a session that the bus keeps, in its order, also those sent again."""
        with self.hub() as config:
            async with HttpUrza(config) as hub:
                user = await hub.operator_credentials()
        who = f"{user.redis_username}:{user.redis_password}"
        with self.forwarded(REDIS, REDIS_PORT) as port:
            url = f"redis://{who}@{HOST}:{port}/0"
            bus = OonaClient(RedisConfig(url=url, namespace=namespace), scope=uid)
            try:
                return [message async for message in bus.history({TopicNames.TRANSITIONS}, uid)]
            finally:
                await bus.close()


def _forwarded_port(process: subprocess.Popen[bytes], said: Path) -> int:
    deadline = time.monotonic() + FORWARD_SECONDS
    while time.monotonic() < deadline:
        told = said.read_text(errors="replace")
        if found := _FORWARDED.search(told):
            return int(found[1])
        if process.poll() is not None:
            raise ServerError(f"kubectl port-forward: {told.strip()}")
        time.sleep(0.02)
    raise ServerError(f"kubectl port-forward: nothing after {FORWARD_SECONDS:g} s")
