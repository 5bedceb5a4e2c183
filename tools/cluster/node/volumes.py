"""A pod's volumes as folders: made when it begins, removed when it is gone."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tools.cluster.node.api import Api, RefusedError
from tools.cluster.node.environment import Lookup, UnresolvedError, contents, expanded, field

Object = Mapping[str, Any]


class Volumes:
    """The volumes of one pod under `folder`.

    Secrets, ConfigMaps and what the downward API tells are read once, when the pod begins. A claim
    is a folder that outlives the pod. Nothing is read-only, and no size is a limit.

    Args:
        pod: the pod.
        folder: where its volumes lie.
        links: a folder with a short path: by a link in it an empty volume is named, since a socket
            in it, as of Python's own processes, must have a path of at most 107 characters.
        claims: where the claims of its namespace lie.
        lookup: finds Secrets and ConfigMaps.
        api: issues tokens of service accounts.
    """

    def __init__(
        self, pod: Object, folder: Path, links: Path, claims: Path, *, lookup: Lookup, api: Api
    ) -> None:
        self._pod = pod
        self._folder = folder
        self._links = links
        self._linked: list[Path] = []
        self._claims = claims
        self._lookup = lookup
        self._api = api
        self._places: dict[str, Path] = {}

    async def make(self) -> None:
        """Make every volume.

        Raises:
            UnresolvedError: what one is made of is not there, or is of a kind that this node lacks.
        """
        for volume in self._pod["spec"].get("volumes", ()):
            self._places[volume["name"]] = await self._made(volume)

    def mounts(self, container: Object, environment: Mapping[str, str]) -> dict[str, Path]:
        """What stands for each mount path of a container."""
        found = {}
        for mount in container.get("volumeMounts", ()):
            place = self._places[mount["name"]]
            below = expanded(mount.get("subPathExpr", ""), environment) or mount.get("subPath", "")
            if below:
                place = place / below
                if not place.exists():
                    place.mkdir(parents=True)
            found[mount["mountPath"]] = place
        return found

    def files(self) -> Iterator[Path]:
        """The files that the cluster wrote, not those of the pod's own work."""
        for volume in self._pod["spec"].get("volumes", ()):
            if {"secret", "configMap", "projected", "downwardAPI"} & volume.keys():
                yield from (p for p in self._places[volume["name"]].rglob("*") if p.is_file())

    def remove(self) -> None:
        """Remove what ends with the pod."""
        for link in self._linked:
            link.unlink(missing_ok=True)
        shutil.rmtree(self._folder, ignore_errors=True)

    async def _made(self, volume: Object) -> Path:
        if "hostPath" in volume:
            return _host_path(volume["hostPath"])
        if "persistentVolumeClaim" in volume:
            claim = self._claims / str(volume["persistentVolumeClaim"]["claimName"])
            claim.mkdir(parents=True, exist_ok=True)
            return claim
        place = self._folder / str(volume["name"])
        place.mkdir(parents=True, exist_ok=True)
        if "emptyDir" in volume:
            link = self._links / secrets.token_hex(4)
            link.symlink_to(place, target_is_directory=True)
            self._linked.append(link)
            return link
        if "secret" in volume:
            secret = volume["secret"]
            await self._project({"secret": {**secret, "name": secret["secretName"]}}, place)
        elif "projected" in volume:
            for source in volume["projected"].get("sources", ()):
                await self._project(source, place)
        elif volume.keys() & {"configMap", "downwardAPI"}:
            await self._project(volume, place)
        else:
            (kind,) = volume.keys() - {"name"}
            raise UnresolvedError(f"a node of processes has no volumes of kind {kind}")
        return place

    async def _project(self, source: Object, place: Path) -> None:
        if "serviceAccountToken" in source:
            wanted = source["serviceAccountToken"]
            _write(place / wanted["path"], (await self._token(wanted)).encode(), 0o600)
        elif "downwardAPI" in source:
            for item in source["downwardAPI"].get("items", ()):
                if "fieldRef" not in item:
                    raise UnresolvedError(
                        "resourceFieldRef in a volume: not on a node of processes"
                    )
                text = field(self._pod, item["fieldRef"]["fieldPath"])
                _write(place / item["path"], text.encode(), item.get("mode", 0o644))
        else:
            await self._entries(source, place)

    async def _entries(self, source: Object, place: Path) -> None:
        kind, singular = (
            ("secrets", "secret") if "secret" in source else ("configmaps", "configmap")
        )
        wanted = source["secret" if "secret" in source else "configMap"]
        found = await self._lookup(kind, wanted["name"])
        if found is None:
            if wanted.get("optional"):
                return
            raise UnresolvedError(f'{singular} "{wanted["name"]}" not found')
        entries = contents(found)
        mode = wanted.get("defaultMode", 0o644)
        items = wanted.get("items") or [{"key": key, "path": key} for key in entries]
        for item in items:
            if item["key"] in entries:
                _write(place / item["path"], entries[item["key"]], item.get("mode", mode))
            elif not wanted.get("optional"):
                raise UnresolvedError(f"references non-existent {singular} key: {item['key']}")

    async def _token(self, wanted: Object) -> str:
        meta = self._pod["metadata"]
        account = self._pod["spec"].get("serviceAccountName", "default")
        path = f"/api/v1/namespaces/{meta['namespace']}/serviceaccounts/{account}/token"
        bound = {"kind": "Pod", "apiVersion": "v1", "name": meta["name"], "uid": meta["uid"]}
        spec: dict[str, Any] = {
            "expirationSeconds": wanted.get("expirationSeconds", 3600),
            "boundObjectRef": bound,
        }
        if wanted.get("audience"):
            spec["audiences"] = [wanted["audience"]]
        try:
            issued = await self._api.ask("POST", path, {"spec": spec})
        except RefusedError as refusal:
            raise UnresolvedError(f"failed to fetch token: {refusal}") from refusal
        return str(issued["status"]["token"])


def _host_path(wanted: Object) -> Path:
    place = Path(wanted["path"])
    kind = wanted.get("type", "")
    if kind == "DirectoryOrCreate":
        place.mkdir(parents=True, exist_ok=True)
    right = {"Directory": place.is_dir, "File": place.is_file}.get(kind, lambda: True)
    if not right():
        raise UnresolvedError(f"hostPath type check failed: {place} is not a {kind.lower()}")
    return place


def _write(path: Path, content: bytes, mode: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)
    path.write_bytes(content)
    path.chmod(mode | 0o400)
