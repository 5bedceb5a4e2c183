"""Debian's packages that a cluster from source and images without Docker need."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping

from tools.cluster.containers.configs import CNI_PLUGINS
from tools.cluster.containers.machines import run
from tools.servers.process import ServerError

NODE = {
    "containerd": "containerd",
    "runc": "runc",
    f"{CNI_PLUGINS}/ptp": "containernetworking-plugins",
    "ip": "iproute2",
    "nft": "nftables",
    "iptables": "iptables",  # for the plugin portmap
    "openssl": "openssl",
    "sysctl": "procps",
    "hostname": "hostname",
    "mount": "mount",
    "nsenter": "util-linux",
}
"""The package of each program of a node that is not built here."""
IMAGES = {
    "buildah": "buildah",
    "containers-storage": "containers-storage",
    "mmdebstrap": "mmdebstrap",
}
"""Those of images."""


def missing(
    wanted: Mapping[str, str], found: Callable[[str], str | None] = shutil.which
) -> list[str]:
    """The packages of programs that are not there; `found` looks one up."""
    return sorted({package for program, package in wanted.items() if found(program) is None})


def install(wanted: Mapping[str, str], say: Callable[[str], None]) -> None:
    """Install what is missing.

    Raises:
        ServerError: something is missing and can't be installed; the message says what to do.
    """
    packages = missing(wanted)
    if not packages:
        return
    command = f"apt-get install --no-install-recommends {' '.join(packages)}"
    if os.geteuid() or shutil.which("apt-get") is None:
        raise ServerError(f"missing: {', '.join(packages)}; as root on Debian: {command}")
    say(f"installing {', '.join(packages)}")
    quiet = ["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "--quiet", "--yes"]
    # A list of packages that is out of date names releases that are no longer there.
    run([*quiet, "update"])
    run([*quiet, "install", "--no-install-recommends", *packages])
    if still := missing(wanted):
        raise ServerError(f"missing after {command}: the programs of {', '.join(still)}")


def require_root() -> None:
    """Refuse to go on as anyone else.

    Raises:
        ServerError: this is not root.
    """
    if os.geteuid():
        raise ServerError(f"a cluster from source needs root; got user id {os.geteuid()}")
