"""A cluster of kind, where Docker answers."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from tools.cluster.containers.layout import Layout
from tools.cluster.containers.machines import run
from tools.cluster.programs import cluster_program
from tools.servers.process import ServerError

_DOCKER_SECONDS = 20.0
_READY = "3m"


def docker_answers() -> bool:
    """Whether there is a Docker that answers."""
    if shutil.which("docker") is None:
        return False
    try:
        asked = subprocess.run(
            ["docker", "version", "--format", "{{.Server.Version}}"],
            capture_output=True,
            timeout=_DOCKER_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return False
    return asked.returncode == 0


class KindCluster:
    """A cluster of kind's, called after its folder, where its kubeconfig lies."""

    def __init__(self, cluster: Layout, say: Callable[[str], None] = lambda _: None) -> None:
        self.layout = cluster
        self._say = say

    @property
    def name(self) -> str:
        """What kind calls it."""
        return self.layout.cgroup.removeprefix("/")

    @property
    def running(self) -> bool:
        """Whether kind knows it."""
        return self.name in self._kind("get", "clusters").split()

    def up(self) -> bool:
        """Make it; False where it was there.

        Raises:
            ServerError: kind failed, or Docker no longer answers.
        """
        made = not self.running
        if made:
            self._say("kind create cluster")
            self._kind("create", "cluster", f"--name={self.name}", f"--wait={_READY}", self._config)
        else:
            self._kind("export", "kubeconfig", f"--name={self.name}", self._config)
        return made

    def down(self) -> None:
        """Delete it, and its folder."""
        self._kind("delete", "cluster", f"--name={self.name}", self._config)
        shutil.rmtree(self.layout.state)

    def load(self, archive: Path) -> None:
        """Import an archive of images."""
        self._kind("load", "image-archive", f"--name={self.name}", str(archive))

    def load_image(self, image: str) -> None:
        """Import an image that Docker has."""
        self._kind("load", "docker-image", f"--name={self.name}", image)

    @property
    def _config(self) -> str:
        return f"--kubeconfig={self.layout.admin}"

    def _kind(self, *words: str) -> str:
        if not docker_answers():
            raise ServerError(f"{self.layout.state}: a cluster of kind, and Docker does not answer")
        return run([str(cluster_program("kind")), *words])
