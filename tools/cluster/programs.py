"""The programs of a control plane: those of KUBEBUILDER_ASSETS, else built once from Go modules.

`python -m tools.cluster.programs` builds what is missing, some minutes of work on two cores.
"""

from __future__ import annotations

import os
import sys
from functools import cache
from pathlib import Path

from tools.servers.go_programs import built_once, run_go

MODULES = Path(__file__).parent / "modules"
"""A Go module that pins the programs and all that they are made of by hash."""
KUBERNETES = "1.36.3"
ETCD = "3.6.8"
ASSETS = "KUBEBUILDER_ASSETS"
PACKAGES = {
    "etcd": "go.etcd.io/etcd/server/v3",
    "kube-apiserver": "k8s.io/kubernetes/cmd/kube-apiserver",
    "kube-controller-manager": "k8s.io/kubernetes/cmd/kube-controller-manager",
    "kubectl": "k8s.io/kubernetes/cmd/kubectl",
}
_BASE = "k8s.io/component-base/version"
_MAJOR, _MINOR, _ = KUBERNETES.split(".")
# Unset, the programs call themselves v0.0.0-master and misbehave.
_VERSION = (
    f"-X {_BASE}.gitVersion=v{KUBERNETES} -X {_BASE}.gitMajor={_MAJOR} "
    f"-X {_BASE}.gitMinor={_MINOR} -X k8s.io/client-go/pkg/version.gitVersion=v{KUBERNETES}"
)


@cache
def cluster_program(name: str) -> Path:
    """One of `PACKAGES`; the first call on a machine without it builds them all.

    Raises:
        ServerError: there is no Go, or the build failed.
    """
    assets = os.environ.get(ASSETS)
    if assets and (found := Path(assets) / name).is_file():
        return found
    return built_once(f"control-plane-{KUBERNETES}-{ETCD}", _build) / name


def _build(folder: Path) -> None:
    folder.mkdir()
    for name, package in PACKAGES.items():
        flags = "-s -w" if name == "etcd" else f"-s -w {_VERSION}"
        words = ["build", "-p", "2", "-trimpath", "-buildvcs=false", "-ldflags", flags]
        run_go([*words, "-o", str(folder / name), package], MODULES)


if __name__ == "__main__":
    for each in PACKAGES:
        sys.stdout.write(f"{cluster_program(each)}\n")
