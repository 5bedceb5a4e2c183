"""Gives claims of the local class folders of this machine as volumes, until it is ended."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import shutil
import ssl
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import yaml

from tools.cluster.containers.provisioning import Object, Plan, plan
from tools.saying import say

_CLAIMS = "/api/v1/persistentvolumeclaims"
_VOLUMES = "/api/v1/persistentvolumes"
_CLASSES = "/apis/storage.k8s.io/v1/storageclasses"
_WATCH_SECONDS = 240
_RETRY_SECONDS = 1.0
_FOLDER_MODE = 0o777
"""Containers run as whom they like; a volume of this kind is not given to their group."""


class Provisioner:
    """Watches claims and volumes; whenever one changes it does what is to be done."""

    def __init__(self, client: httpx.AsyncClient, root: Path) -> None:
        self._client = client
        self._root = root
        self._changed = asyncio.Event()

    async def run(self) -> None:
        """Work until cancelled."""
        self._changed.set()
        watches = [asyncio.create_task(self._watch(path)) for path in (_CLAIMS, _VOLUMES)]
        try:
            while True:
                await self._changed.wait()
                self._changed.clear()
                try:
                    await self._work()
                except (httpx.HTTPError, OSError) as error:
                    say(f"tried again in {_RETRY_SECONDS:g} s: {error}")
                    await asyncio.sleep(_RETRY_SECONDS)
                    self._changed.set()
        finally:
            for watch in watches:
                watch.cancel()

    async def _watch(self, path: str) -> None:
        """Note whatever changes among the objects of a path."""
        while True:
            query = {"watch": "1", "timeoutSeconds": str(_WATCH_SECONDS)}
            with contextlib.suppress(httpx.HTTPError):
                async with self._client.stream("GET", path, params=query, timeout=None) as lines:
                    async for _ in lines.aiter_lines():
                        self._changed.set()
            await asyncio.sleep(_RETRY_SECONDS)
            self._changed.set()  # what happened meanwhile nobody has told

    async def _work(self) -> None:
        found = [await self._list(path) for path in (_CLAIMS, _VOLUMES, _CLASSES)]
        await self._carry_out(plan(*found, self._root))

    async def _carry_out(self, todo: Plan) -> None:
        for volume, folder in todo.made:
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(_FOLDER_MODE)
            answer = await self._client.post(_VOLUMES, json=volume)
            if answer.status_code != httpx.codes.CONFLICT:
                answer.raise_for_status()
            say(f"made {folder}")
        for name, folder in todo.removed:
            if folder.exists():
                shutil.rmtree(folder)
            answer = await self._client.delete(f"{_VOLUMES}/{name}")
            if answer.status_code != httpx.codes.NOT_FOUND:
                answer.raise_for_status()
            say(f"removed {folder}")
        for claim in todo.refused:
            say(f"refused {claim['metadata']['namespace']}/{claim['metadata']['name']}: Block")

    async def _list(self, path: str) -> list[Object]:
        answer = await self._client.get(path)
        answer.raise_for_status()
        found: list[Object] = answer.json()["items"]
        return found


def client(kubeconfig: Path) -> httpx.AsyncClient:
    """A client as a kubeconfig with a token describes it; close it."""
    config: dict[str, Any] = yaml.safe_load(kubeconfig.read_text())
    cluster = config["clusters"][0]["cluster"]
    return httpx.AsyncClient(
        base_url=cluster["server"],
        headers={"Authorization": f"Bearer {config['users'][0]['user']['token']}"},
        verify=ssl.create_default_context(cafile=cluster["certificate-authority"]),
        trust_env=False,
    )


async def _serve(kubeconfig: Path, root: Path) -> None:
    async with client(kubeconfig) as opened:
        await Provisioner(opened, root).run()


def main(argv: Sequence[str] | None = None) -> int:
    """Provision until it is ended."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kubeconfig", type=Path, required=True)
    parser.add_argument("--root", type=Path, required=True, help="where the volumes lie")
    arguments = parser.parse_args(argv)
    asyncio.run(_serve(arguments.kubeconfig, arguments.root))
    return 0


if __name__ == "__main__":
    sys.exit(main())
