"""`make install`: the chart in the cluster of KUBECONFIG, with the images of `make images`.

It is installed, or upgraded, and waited for; then Helm's own test of it runs. Further arguments are
Helm's: `make install ARGUMENTS="--set operator.logLevel=debug"`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

from tools import helm
from tools.cluster.programs import cluster_program
from tools.servers.process import ServerError

WAIT = "5m"
LABELS = (
    "pod-security.kubernetes.io/enforce=restricted",
    "pod-security.kubernetes.io/warn=restricted",
)


def main(arguments: Sequence[str]) -> int:
    """Install, wait and test; 1 where one of them fails, with the reason in a line."""
    try:
        _namespace()
        helm.run(
            *("upgrade", "--install", helm.RELEASE, str(helm.CHART)),
            *("--namespace", helm.NAMESPACE, "--values", str(helm.LOCAL_VALUES)),
            *("--wait", "--timeout", WAIT, *arguments),
        )
        sys.stdout.write(helm.run("test", helm.RELEASE, "--namespace", helm.NAMESPACE, "--logs"))
    except ServerError as error:
        sys.stderr.write(f"make install: {error}\n")
        return 1
    return 0


def _namespace() -> None:
    """Have it, and have the cluster refuse every pod in it that is not restricted."""
    manifest = f"apiVersion: v1\nkind: Namespace\nmetadata: {{name: {helm.NAMESPACE}}}\n"
    _kubectl("apply", "--server-side", "-f", "-", given=manifest)
    _kubectl("label", "--overwrite", "namespace", helm.NAMESPACE, *LABELS)


def _kubectl(*words: str, given: str = "") -> None:
    done = subprocess.run(
        [str(cluster_program("kubectl")), *words],
        env=os.environ,
        input=given,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise ServerError(f"kubectl {' '.join(words)}: {done.stderr.strip()}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
