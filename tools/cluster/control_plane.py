"""A Kubernetes control plane of real parts on the loopback, up in seconds.

Its API server, its controllers and its rights are Kubernetes' own. It has no node: pods stay
pending until a `ProcessKubelet` runs them.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from tools.cluster.credentials import write_kubeconfig
from tools.cluster.programs import cluster_program
from tools.cluster.servers import ADMIN, NODE, ApiServer, ControllerManager, EtcdServer
from tools.servers.process import HOST, ServerError, ServerProcess
from tools.servers.tcp_proxy import TcpProxy

WAIT_SECONDS = 30.0
KUBECTL_SECONDS = 120.0
POLL_SECONDS, POLL_SHARE, LONGEST_POLL_SECONDS = 0.02, 0.05, 0.25
"""Between two looks: at least, as a share of the time that was waited, and at most."""

Document = Mapping[str, Any]


class ControlPlane:
    """etcd, an API server and the controllers over one folder; a context manager.

    Each part can be killed, frozen and started again (`etcd`, `api`, `manager`): a restart finds
    the same addresses, data and credentials.

    Args:
        folder: where everything is kept.
        audit: whether the API server writes down every request, for `requests`.
        node_grace_seconds: after which a node that is not heard of is no longer ready.
        api_arguments: further ones of the API server's command line.
        manager_arguments: further ones of the controller manager's command line.
    """

    def __init__(
        self,
        folder: Path,
        *,
        audit: bool = False,
        node_grace_seconds: int = 10,
        api_arguments: Sequence[str] = (),
        manager_arguments: Sequence[str] = (),
    ) -> None:
        self.folder = Path(folder).resolve()
        self.etcd = EtcdServer(self.folder / "etcd")
        self.api = ApiServer(
            self.folder / "apiserver", self.etcd, audit=audit, arguments=api_arguments
        )
        self.manager = ControllerManager(
            self.folder / "controller-manager",
            self.api,
            node_grace_seconds=node_grace_seconds,
            arguments=manager_arguments,
        )

    @property
    def parts(self) -> tuple[ServerProcess, ...]:
        """The servers, in the order in which they start."""
        return (self.etcd, self.api, self.manager)

    @property
    def _kubectl_cache(self) -> Path:
        return self.folder / "kubectl"

    @property
    def admin(self) -> Path:
        """The kubeconfig of one who may do everything."""
        return self.folder / "admin.kubeconfig"

    @property
    def node(self) -> Path:
        """The kubeconfig of the process kubelet, told apart from `admin` in what is audited."""
        return self.folder / "node.kubeconfig"

    def start(self) -> Self:
        """Start what does not run; returns when all of it answers.

        Raises:
            ServerError: a part can't be had; what was started is stopped.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            for part in self.parts:
                part.start()
        except BaseException:
            self.stop()
            raise
        for path, user in ((self.admin, ADMIN), (self.node, NODE)):
            self._write(path, self.api.token(user))
        return self

    def stop(self) -> None:
        """Stop everything, the last first."""
        for part in reversed(self.parts):
            part.stop()

    def client(self) -> httpx.Client:
        """A client of one who may do everything; close it."""
        return httpx.Client(
            base_url=self.api.url,
            headers={"Authorization": f"Bearer {self.api.token(ADMIN)}"},
            verify=self.api.context(),
            timeout=WAIT_SECONDS,
            trust_env=False,
        )

    def kubectl(self, *words: str, given: str | None = None, config: Path | None = None) -> str:
        """What kubectl prints; `given` is its standard input, `config` another kubeconfig.

        Raises:
            ServerError: it ended with an error, which the message tells.
        """
        done = self.try_kubectl(*words, given=given, config=config)
        if done.returncode:
            raise ServerError(f"kubectl {' '.join(words)}: {done.stderr.strip()}")
        return done.stdout

    def try_kubectl(
        self, *words: str, given: str | None = None, config: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """As `kubectl`; how it ended is for the caller to judge."""
        cache = f"--cache-dir={self._kubectl_cache}"
        return subprocess.run(
            [
                str(cluster_program("kubectl")),
                f"--kubeconfig={config or self.admin}",
                cache,
                *words,
            ],
            input=given,
            stdin=None if given is not None else subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=KUBECTL_SECONDS,
        )

    def get(self, *words: str) -> Any:
        """What `kubectl get WORDS` finds, as an object."""
        return json.loads(self.kubectl("get", *words, "-o", "json"))

    def install(self, definitions: Path) -> None:
        """Apply CustomResourceDefinitions; returns once their resources can be used."""
        self.kubectl("apply", "--server-side", "--force-conflicts", "-f", str(definitions))
        self.kubectl(
            *("wait", "-f", str(definitions), "--for=condition=Established", "--timeout=30s")
        )
        crds = self.get("-f", str(definitions))
        specs = [crd["spec"] for crd in crds.get("items", [crds])]
        with self.client() as client:
            wait_for(
                lambda: all(map(partial(_lists, client), specs)),
                "the API server does not list all that it has accepted",
            )
        shutil.rmtree(self._kubectl_cache, ignore_errors=True)  # what it knows is out of date

    def create_namespace(self, name: str, labels: Mapping[str, str] | None = None) -> str:
        """Make a namespace; returns its name once pods can be made in it."""
        with self.client() as client:
            body = {"metadata": {"name": name, "labels": dict(labels or {})}}
            client.post("/api/v1/namespaces", json=body).raise_for_status()
            inside = f"/api/v1/namespaces/{name}"
            made = [f"{inside}/serviceaccounts/default", f"{inside}/configmaps/kube-root-ca.crt"]
            wait_for(
                lambda: all(client.get(path).is_success for path in made),
                f"one of {', '.join(made)} is not made",
            )
        return name

    def delete_namespace(self, name: str, *, wait: bool = False) -> None:
        """Ask for a namespace's end; with `wait`, see it."""
        path = f"/api/v1/namespaces/{name}"
        with self.client() as client:
            client.delete(path)
            if wait:
                wait_for(lambda: client.get(path).status_code == 404, f"{path} is still there")

    def token(self, account: str, namespace: str, *, seconds: int = 3600) -> str:
        """A token of a service account, as the API server issues it."""
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token"
        with self.client() as client:
            answer = client.post(path, json={"spec": {"expirationSeconds": seconds}})
            answer.raise_for_status()
            return str(answer.json()["status"]["token"])

    def kubeconfig(
        self,
        account: str,
        namespace: str,
        *,
        through: TcpProxy | None = None,
        seconds: int = 3600,
    ) -> Path:
        """A kubeconfig of a service account, on the way through a proxy if one is given."""
        way = f"-through-{through.port}" if through else ""
        path = self.folder / f"{namespace}-{account}{way}.kubeconfig"
        port = through.port if through else None
        return self._write(
            path, self.token(account, namespace, seconds=seconds), namespace=namespace, port=port
        )

    @contextmanager
    def proxy(self) -> Iterator[TcpProxy]:
        """A way to the API server that can be cut; see `kubeconfig`."""
        with TcpProxy(self.api.port) as proxy:
            yield proxy

    def requests(self, user: str | None = None) -> list[dict[str, Any]]:
        """What the API server was asked, one audit event a request, the oldest first.

        `user` is whole, such as ``system:serviceaccount:NAMESPACE:NAME``; None means everyone.
        """
        lines = self.api.audit_log.read_text().splitlines()
        if user is not None:
            lines = [line for line in lines if user in line]  # to be parsed, which takes its time
        # The last may be half written; what asks for no object names none.
        events = [{"objectRef": {}, **json.loads(line)} for line in lines if line.endswith("}")]
        return [e for e in events if user is None or e["user"].get("username") == user]

    def _write(
        self, path: Path, token: str, *, namespace: str = "default", port: int | None = None
    ) -> Path:
        server = self.api.url if port is None else f"https://{HOST}:{port}"
        return write_kubeconfig(
            path, server=server, authority=self.api.certificate, token=token, namespace=namespace
        )

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


def _lists(client: httpx.Client, spec: Document) -> bool:
    """Whether discovery knows the first version of a CustomResourceDefinition."""
    found = client.get(f"/apis/{spec['group']}/{spec['versions'][0]['name']}")
    resources = found.json()["resources"] if found.is_success else []
    return spec["names"]["plural"] in {each["name"] for each in resources}


def wait_for(holds: Callable[[], Any], otherwise: str, *, seconds: float = WAIT_SECONDS) -> Any:
    """The first true answer of `holds`, which is asked again and again.

    What takes long is asked for less often: to ask takes the time of those who are to get there.

    Raises:
        ServerError: there was none in time; the message is `otherwise`.
    """
    began = time.monotonic()
    while not (answer := holds()):
        waited = time.monotonic() - began
        if waited > seconds:
            raise ServerError(f"{otherwise} after {seconds:g} s")
        time.sleep(min(max(POLL_SECONDS, POLL_SHARE * waited), LONGEST_POLL_SECONDS))
    return answer
