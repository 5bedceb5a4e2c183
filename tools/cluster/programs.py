"""The programs of a cluster: those of KUBEBUILDER_ASSETS, else built once from Go modules.

`python -m tools.cluster.programs` builds what is missing of a control plane, some minutes of work
on two cores; with names of `SETS` it builds those.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tools.servers.go_programs import built_once, run_go

MODULES = Path(__file__).parent / "modules"
"""Go modules that pin the programs and all that they are made of by hash."""
KUBERNETES = "1.36.3"
ETCD = "3.6.8"
COREDNS = "1.15.0"
KIND = "0.33.0"
HELM = "4.3.1"
PAUSE = "1"
"""Our own, `modules/pause`."""
ASSETS = "KUBEBUILDER_ASSETS"
_BASE = "k8s.io/component-base/version"
_MAJOR, _MINOR, _ = KUBERNETES.split(".")
# Unset, the programs call themselves v0.0.0-master and misbehave.
_VERSION = (
    f"-X {_BASE}.gitVersion=v{KUBERNETES} -X {_BASE}.gitMajor={_MAJOR} "
    f"-X {_BASE}.gitMinor={_MINOR} -X k8s.io/client-go/pkg/version.gitVersion=v{KUBERNETES}"
)


@dataclass(frozen=True, kw_only=True)
class ProgramSet:
    """Programs that are built together, from one module.

    Attributes:
        folder: where they lie in the cache; it names their releases.
        module: the folder of the Go module that pins them.
        packages: the package of each program.
    """

    folder: str
    module: Path
    packages: Mapping[str, str]


SETS = {
    "control-plane": ProgramSet(
        folder=f"control-plane-{KUBERNETES}-{ETCD}",
        module=MODULES,
        packages={
            "etcd": "go.etcd.io/etcd/server/v3",
            "kube-apiserver": "k8s.io/kubernetes/cmd/kube-apiserver",
            "kube-controller-manager": "k8s.io/kubernetes/cmd/kube-controller-manager",
            "kubectl": "k8s.io/kubernetes/cmd/kubectl",
        },
    ),
    "node": ProgramSet(
        folder=f"node-{KUBERNETES}",
        module=MODULES,
        packages={
            "kube-proxy": "k8s.io/kubernetes/cmd/kube-proxy",
            "kube-scheduler": "k8s.io/kubernetes/cmd/kube-scheduler",
            "kubelet": "k8s.io/kubernetes/cmd/kubelet",
        },
    ),
    "dns": ProgramSet(
        folder=f"coredns-{COREDNS}",
        module=MODULES / "coredns",
        packages={"coredns": "github.com/coredns/coredns"},
    ),
    "pause": ProgramSet(folder=f"pause-{PAUSE}", module=MODULES / "pause", packages={"pause": "."}),
    "kind": ProgramSet(
        folder=f"kind-{KIND}", module=MODULES / "kind", packages={"kind": "sigs.k8s.io/kind"}
    ),
    "helm": ProgramSet(
        folder=f"helm-{HELM}",
        module=MODULES / "helm",
        packages={"helm": "helm.sh/helm/v4/cmd/helm"},
    ),
}
_SET_OF = {name: each for each in SETS.values() for name in each.packages}


@cache
def cluster_program(name: str) -> Path:
    """One of the programs of `SETS`; the first call on a machine without it builds its set.

    Raises:
        ServerError: there is no Go, or the build failed.
    """
    assets = os.environ.get(ASSETS)
    if assets and (found := Path(assets) / name).is_file():
        return found
    programs = _SET_OF[name]
    return built_once(programs.folder, lambda folder: _build(programs, folder)) / name


def _build(programs: ProgramSet, folder: Path) -> None:
    folder.mkdir()
    for name, package in programs.packages.items():
        flags = f"-s -w {_VERSION}" if package.startswith("k8s.io/kubernetes/") else "-s -w"
        words = ["build", "-p", "2", "-trimpath", "-buildvcs=false", "-ldflags", flags]
        run_go([*words, "-o", str(folder / name), package], programs.module)


def main(argv: Sequence[str]) -> int:
    """Build the named sets, that of a control plane where none is named, and tell where."""
    for chosen in argv or ["control-plane"]:
        for name in SETS[chosen].packages:
            sys.stdout.write(f"{cluster_program(name)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
