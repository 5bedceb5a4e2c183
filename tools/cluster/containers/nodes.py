"""One node of a cluster from source: a machine with containerd, a kubelet and a kube-proxy."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from tools.cluster.containers import commands, configs
from tools.cluster.containers.archives import (
    Blob,
    Image,
    Layer,
    program_image,
    reachable,
    write_archive,
    write_index,
)
from tools.cluster.containers.certificates import issue
from tools.cluster.containers.kernel import make_cgroup
from tools.cluster.containers.layout import DNS_IMAGE, PAUSE_IMAGE, Layout, Node
from tools.cluster.containers.machines import Machine, run
from tools.servers.process import ServerError

KUBELET, PROXY, CONTAINERD = "kubelet", "kube-proxy", "containerd"
_TAKES = 3


class ClusterNode:
    """A node over its folder; what it is, `node` says."""

    def __init__(self, cluster: Layout, node: Node, programs: commands.Programs) -> None:
        self.node = node
        self._cluster = cluster
        self._programs = programs
        self.machine = Machine(node.name, node.folder, programs("pause"))

    @property
    def made(self) -> bool:
        """Whether it was ever started and is to be there."""
        return (self.node.folder / "kubelet.yaml").exists()

    @property
    def running(self) -> bool:
        """Whether all of it runs."""
        daemons = (self.machine.daemon(name) for name in (CONTAINERD, KUBELET, PROXY))
        return self.machine.running and all(daemon.running for daemon in daemons)

    def prepare(self) -> None:
        """Write what its programs read."""
        self._certify()
        folder = self.node.folder
        for name in ("cni", "kubelet"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / "cni" / "10-esper.conflist").write_text(configs.cni(self.node))
        (folder / "containerd.toml").write_text(configs.containerd(self.node))
        (folder / "resolv.conf").write_text(configs.resolver())
        (folder / "kube-proxy.yaml").write_text(configs.proxy(self._cluster, self.node))
        (folder / "kubelet.yaml").write_text(configs.kubelet(self._cluster, self.node))

    def start(self) -> None:
        """Start what does not run of it, on its machine.

        Raises:
            ServerError: something ended at once, or does not answer.
        """
        self.machine.start_daemon(CONTAINERD, commands.containerd(self.node)).await_(self._serves)
        self._import_own()
        make_cgroup(self._cluster.cgroup_of(self.node))
        words = commands.kubelet(self._cluster, self.node, self._programs)
        self.machine.start_daemon(KUBELET, words)
        self.machine.start_daemon(PROXY, commands.proxy(self.node, self._programs))

    def import_image(self, name: str, image: Image) -> list[Layer]:
        """Import an image under a name; returns the layers that it did not have.

        Raises:
            ServerError: it was refused.
        """
        there = self.contents()
        with self._importing() as to:
            return write_archive(name, image, to, there=there)

    def import_archive(self, archive: IO[bytes]) -> None:
        """Import the images of an OCI archive.

        Raises:
            ServerError: it was refused.
        """
        with self._importing() as to:
            shutil.copyfileobj(archive, to, 1 << 20)

    @contextmanager
    def _importing(self) -> Iterator[IO[bytes]]:
        """What is written here is imported."""
        with tempfile.TemporaryFile() as said:
            importing = subprocess.Popen(
                commands.import_images(self.node), stdin=subprocess.PIPE, stdout=said, stderr=said
            )
            assert importing.stdin is not None
            try:
                # One that refuses closes its end, and has said why.
                with suppress(BrokenPipeError), importing.stdin:
                    yield importing.stdin
            except BaseException:
                importing.kill()
                importing.wait()
                raise
            if importing.wait():
                said.seek(0)
                raise ServerError(f"{self.node.name}: {said.read().decode().strip()[-500:]}")

    def copy_images(self, other: ClusterNode, wanted: Collection[str] | None = None) -> None:
        """Give it images of another node, all where none are named.

        Both stores lie in the cluster's folder, so the content is linked and not read.

        Raises:
            ServerError: one can't be had.
        """
        theirs, own = other.images(), self.images()
        named = [name for name in theirs if not name.startswith("sha256:")]
        for name in sorted(named if wanted is None else wanted):
            if own.get(name) != theirs.get(name, ""):
                self._take(other, name)

    def image(self, name: str) -> Blob:
        """The manifest or index of one of its images.

        Raises:
            ServerError: it has none of that name.
        """
        described = self.images().get(name)
        if described is None:
            raise ServerError(f"{self.node.name}: it has no image {name}")
        kind, digest = described.split()
        try:
            return Blob(kind, digest, self.blob(digest).stat().st_size)
        except OSError as error:
            raise ServerError(f"{self.node.name}: {name}: {error}") from error

    def blob(self, digest: str) -> Path:
        """The file of what its store holds."""
        content = self.node.folder / "containerd" / "io.containerd.content.v1.content"
        return content / "blobs" / digest.replace(":", "/")

    def _take(self, other: ClusterNode, name: str) -> None:
        """Take an image of another node, by links to what it consists of.

        Until the image is there nothing refers to its content, and the store's collector may
        remove it: so each part is kept by a label, and had anew where it was gone before.
        """
        root = other.image(name)
        try:
            parts = list(reachable(root, other.blob))
        except OSError as error:
            raise ServerError(f"{other.node.name}: {name}: {error}") from error
        try:
            for part in parts:
                self._link(other, part)
            with self._importing() as to:
                write_index(name, root, to)
        finally:
            for part in parts:
                with suppress(ServerError):  # it is not there where this failed before
                    run(commands.keep(self.node, part.digest, kept=False))

    def _link(self, other: ClusterNode, part: Blob) -> None:
        """Take content of another node's store into its own, and keep it there.

        A store that finds the file of what it is given has it, and reads nothing of what comes. A
        file of that size without content is passed over at once.
        """
        own = self.blob(part.digest)
        for left in reversed(range(_TAKES)):
            try:
                if part.digest not in self.contents():
                    own.parent.mkdir(parents=True, exist_ok=True)
                    with suppress(FileExistsError):
                        os.link(other.blob(part.digest), own)
                    with tempfile.TemporaryFile() as empty:
                        empty.truncate(part.size)
                        run(commands.ingest(self.node, part.digest, part.size), given=empty)
                run(commands.keep(self.node, part.digest))
                return
            except (ServerError, OSError) as error:
                if not left:
                    raise ServerError(f"{self.node.name}: {part.digest}: {error}") from error

    def contents(self) -> set[str]:
        """The digests of all that its store holds."""
        return set(run(commands.contents(self.node)).split())

    def images(self) -> dict[str, str]:
        """Its images by name: media type and digest of each."""
        lines = map(str.split, run(commands.list_images(self.node)).splitlines()[1:])
        return {name: f"{kind} {digest}" for name, kind, digest, *_ in lines}

    def kill_container(self, container: str) -> bool:
        """Kill the main process of a container (SIGKILL); False where it has none any more.

        Nobody is told: the kubelet hears of it from containerd, as of any process that ends.

        Args:
            container: its id, without the ``containerd://`` of a pod's status.
        """
        return self._signal(container, "KILL")

    @contextmanager
    def held_container(self, container: str) -> Iterator[bool]:
        """Hold the main process of a container (SIGSTOP) while this lasts.

        Other processes in it run on, and new ones can be started: it does not end meanwhile.
        Gives False where it has no main process any more.
        """
        held = self._signal(container, "STOP")
        try:
            yield held
        finally:
            if held:
                self._signal(container, "CONT")

    def _signal(self, container: str, name: str) -> bool:
        """Whether a container's main process was there to get a signal."""
        tasks = run(commands.list_tasks(self.node)).splitlines()[1:]
        running = {name: pid for name, pid, state in map(str.split, tasks) if state == "RUNNING"}
        if container not in running:
            return False
        try:
            self.machine.run(["sh", "-c", f"kill -{name} {int(running[container])}"])
        except ServerError:  # it has ended meanwhile
            return False
        return True

    def _serves(self) -> bool:
        try:
            run(commands.list_images(self.node))
        except ServerError:
            return False
        return True

    def _import_own(self) -> None:
        """Import the images that are only one program."""
        there = self.images()
        for image, program in ((PAUSE_IMAGE, "pause"), (DNS_IMAGE, "coredns")):
            if image not in there:
                self.import_image(image, program_image(self._programs(program)))

    def _certify(self) -> None:
        if not (self._cluster.pki / f"{self.node.name}.crt").exists():
            issue(
                self._cluster.pki,
                self.node.name,
                f"/O=system:nodes/CN={self.node.account}",
                [f"DNS:{self.node.name}", f"IP:{self.node.address}"],
            )
