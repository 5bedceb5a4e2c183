"""A cluster on this machine in which sessions really train.

A control plane with Esper's kinds, the hub with its database, object store and bus, the operator
under its own account, and a node that runs pods as processes. Nothing of it is kept.
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from esper.contracts.blueprints import CATALOGUE
from tools.cluster.control_plane import ControlPlane, wait_for
from tools.cluster.kubelet import ProcessKubelet
from tools.operator_process import OperatorProcess
from tools.operator_world import OWN_NAMESPACE, install
from tools.servers.process import ServerError, ServerProcess
from tools.stack import Settings, Stack

NAMESPACE = "default"
TOKEN_SECONDS = 30 * 86_400
LEADS_SECONDS = 60.0
_MARK = ".local-cluster"


class LocalCluster:
    """All of it over one folder; a context manager. Each start begins with nothing.

    Args:
        folder: where everything lies while it runs; what an earlier one has left there goes.
        settings: laid over those of the hub and of the operator, by section.
    """

    def __init__(self, folder: Path, *, settings: Settings | None = None) -> None:
        self.folder = folder.resolve()
        self.plane = ControlPlane(self.folder / "control-plane")
        self.stack = Stack(self.folder / "services", workers=0, tamiyo=False, settings=settings)
        self.kubelet = ProcessKubelet(self.folder / "node", self.plane, own=[self.folder])
        self.operator = OperatorProcess(self.folder / "operator", {})
        self._stack = ExitStack()

    @property
    def parts(self) -> dict[str, ServerProcess]:
        """Every process by its name."""
        everything = (*self.plane.parts, *self.stack.parts.values(), self.operator, self.kubelet)
        return {part.name: part for part in everything}

    @property
    def kubeconfig(self) -> Path:
        """Of one who may do everything."""
        return self.plane.admin

    @property
    def namespace(self) -> None:
        """The one that kubectl takes by itself."""
        return None

    @property
    def catalogue(self) -> None:
        """The same."""
        return None

    def forget(self, kernels: Sequence[str]) -> list[str]:
        """All of them: each start begins with nothing."""
        return list(kernels)

    def kubectl(self, *words: str, given: str | None = None) -> str:
        """What kubectl prints; see `DemoCluster.kubectl`."""
        return self.plane.kubectl(*words, given=given)

    def processes(self, pod: str) -> list[str]:
        """The command lines of all that runs in a pod; see `DemoCluster.processes`."""
        try:
            first = psutil.Process(self.kubelet.pid_of(NAMESPACE, pod))
            every = (first, *first.children(recursive=True))
        except psutil.Error as error:
            raise ServerError(f"{pod}: {error}") from error
        found = []
        for process in every:
            with suppress(psutil.Error):
                found.append(" ".join(process.cmdline()))
        return found

    def start(self) -> Self:
        """Start everything; returns once the operator leads and has made the catalogue.

        Raises:
            ServerError: something can't be had; what was started is stopped.
        """
        with ExitStack() as stack:
            self._claim(stack)
            stack.enter_context(self.plane)
            install(self.plane)
            stack.enter_context(self.stack)
            self.operator.settings = self._for_operator()
            stack.enter_context(self.operator)
            # Stopped before the operator is: as a node that fails, it takes its pods with it.
            stack.enter_context(self.kubelet)
            wait_for(
                lambda: self.operator.leads, "the operator does not lead", seconds=LEADS_SECONDS
            )
            wait_for(self._has_catalogue, "the catalogue is not made", seconds=LEADS_SECONDS)
            self._stack = stack.pop_all()
        return self

    def stop(self) -> None:
        """Stop everything, the last first."""
        self._stack.close()

    def mend(self) -> bool:
        """Start the operator anew if it has ended, as a Deployment would; whether it had.

        It ends where it can't renew its lease in time, as on a machine that is very busy.
        """
        if self.operator.running:
            return False
        self.operator.start()
        return True

    def _has_catalogue(self) -> bool:
        found = self.plane.get("blueprints", "--namespace", NAMESPACE)
        return len(found["items"]) >= len(CATALOGUE)

    def _for_operator(self) -> Settings:
        account = self.plane.kubeconfig("esper-operator", OWN_NAMESPACE, seconds=TOKEN_SECONDS)
        given = dict(self.stack.for_operator())
        section: dict[str, Any] = dict(given.get("operator", {}))
        given["operator"] = {
            "kubeconfig": str(account),
            "lease_namespace": OWN_NAMESPACE,
            "catalogue": NAMESPACE,
            **section,
        }
        return given

    def _claim(self, stack: ExitStack) -> None:
        """Take the folder and empty it, if it is of an earlier one that runs no more."""
        mark = self.folder / _MARK
        if self.folder.is_dir() and any(self.folder.iterdir()) and not mark.is_file():
            raise ServerError(f"{self.folder}: got a folder with other files; allowed: an own one")
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = stack.enter_context(mark.open("w"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ServerError(f"{self.folder}: another cluster runs there") from error
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path != mark:
                path.unlink()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
