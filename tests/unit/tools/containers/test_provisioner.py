"""The provisioner over a hub of HTTP that stands for an API server: what it asks, in what order."""

import asyncio
import json

import httpx
import pytest

from tools.cluster.containers.provisioner import Provisioner, client
from tools.cluster.containers.provisioning import PROVISIONER
from tools.cluster.credentials import write_kubeconfig

CLAIM = {
    "metadata": {"name": "c", "namespace": "lab", "uid": "1"},
    "spec": {
        "storageClassName": "local",
        "accessModes": ["ReadWriteOnce"],
        "resources": {"requests": {"storage": "1Gi"}},
    },
}
LOCAL = {"metadata": {"name": "local"}, "provisioner": PROVISIONER}


class Server:
    """Keeps claims and volumes; a watch lasts until something has changed."""

    def __init__(self):
        self.objects = {
            "persistentvolumeclaims": {"c": CLAIM},
            "persistentvolumes": {},
            "storageclasses": {
                "local": {"metadata": {"name": "local"}, "provisioner": PROVISIONER}
            },
        }
        self.fails = 0
        self.changed = asyncio.Event()

    async def answer(self, request):
        kind, _, name = request.url.path.split("/v1/", 1)[1].partition("/")
        if "watch" in request.url.params:
            await self.changed.wait()
            self.changed.clear()
            return httpx.Response(200, text='{"type": "MODIFIED"}\n')
        if self.fails:
            self.fails -= 1
            return httpx.Response(500)
        if request.method == "POST":
            made = json.loads(request.content)
            self.objects[kind][made["metadata"]["name"]] = made
            return httpx.Response(201, json=made)
        if request.method == "DELETE":
            found = self.objects[kind].pop(name, None)
            return httpx.Response(200 if found else 404, json={})
        return httpx.Response(200, json={"items": list(self.objects[kind].values())})


async def until(holds):
    for _ in range(500):
        if holds():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not happen")


@pytest.mark.parametrize("fails", [0, 1])
def test_a_folder_comes_with_a_claim_and_goes_with_it(tmp_path, monkeypatch, fails):
    monkeypatch.setattr("tools.cluster.containers.provisioner._RETRY_SECONDS", 0.01)

    async def check():
        server = Server()
        server.fails = fails
        transport = httpx.MockTransport(server.answer)
        async with httpx.AsyncClient(transport=transport, base_url="http://api") as opened:
            working = asyncio.create_task(Provisioner(opened, tmp_path).run())
            volumes = server.objects["persistentvolumes"]
            await until(lambda: volumes)
            folder = tmp_path / "pvc-1"
            assert folder.stat().st_mode & 0o777 == 0o777
            (folder / "file").touch()
            volumes["pvc-1"] = {**volumes["pvc-1"], "status": {"phase": "Released"}}
            server.objects["persistentvolumeclaims"].clear()
            server.changed.set()
            await until(lambda: not volumes)
            assert not folder.exists()
            working.cancel()

    asyncio.run(asyncio.wait_for(check(), 30))


def test_a_kubeconfig_says_where_and_who(tmp_path):
    authority = tmp_path / "ca.crt"
    authority.touch()
    path = write_kubeconfig(
        tmp_path / "config", server="https://127.0.0.1:6443", authority=authority, token="secret"
    )
    # An authority that holds no certificate is refused before anything is asked.
    with pytest.raises(OSError, match=r"NO_CERTIFICATE|no certificate|certificate"):
        client(path)
