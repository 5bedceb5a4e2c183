"""The three servers of a control plane: etcd, the API server, the controller manager."""

from __future__ import annotations

import ssl
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tools.cluster.credentials import (
    read_tokens,
    write_kubeconfig,
    write_signing_key,
    write_tokens,
)
from tools.cluster.programs import cluster_program
from tools.servers.process import HOST, PROBE_SECONDS, ServerProcess

ADMIN = "admin"
MANAGER = "system:kube-controller-manager"
NODE = "process-kubelet"
USERS = {
    ADMIN: ("system:masters",),
    MANAGER: ("system:authenticated",),
    NODE: ("system:masters",),
}
"""Static users; RBAC has a role for the controller manager by its name."""
SERVICES = "10.96.0.0/16"
ISSUER = "https://kubernetes.default.svc"
CONTROLLERS = (
    *("clusterrole-aggregation-controller", "deployment-controller", "disruption-controller"),
    *("garbage-collector-controller", "job-controller", "namespace-controller"),
    *("node-lifecycle-controller", "pod-garbage-collector-controller", "replicaset-controller"),
    *("resourcequota-controller", "root-ca-certificate-publisher-controller"),
    *("serviceaccount-controller", "taint-eviction-controller", "ttl-after-finished-controller"),
)
"""Without those of endpoints: they refuse addresses of the loopback, which pods have here."""


class EtcdServer(ServerProcess):
    """An etcd over `folder`. It waits for no disk: its data end with the machine, not with it.

    It asks nobody who they are; on the machine of a test everyone may read it.
    """

    name = "etcd"

    @property
    def url(self) -> str:
        """For `--etcd-servers`."""
        return f"http://{HOST}:{self.port}"

    def _command(self) -> Sequence[str]:
        return [
            str(cluster_program("etcd")),
            f"--data-dir={self.folder / 'data'}",
            "--unsafe-no-fsync",
            f"--listen-client-urls={self.url}",
            f"--advertise-client-urls={self.url}",
            f"--listen-peer-urls=http://{HOST}:0",
            "--quota-backend-bytes=2147483648",
            "--log-level=warn",
        ]

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(self.url + "/readyz", timeout=PROBE_SECONDS) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


class ApiServer(ServerProcess):
    """A kube-apiserver with RBAC, over `etcd`; certificate and tokens are kept in `folder`.

    Args:
        folder: its own.
        etcd: where it keeps everything.
        audit: whether every request leaves a line in `audit_log`.
        arguments: further ones of its command line.
    """

    name = "apiserver"

    def __init__(
        self, folder: Path, etcd: EtcdServer, *, audit: bool = False, arguments: Sequence[str] = ()
    ) -> None:
        super().__init__(folder)
        self._etcd = etcd
        self._audit = audit
        self._arguments = tuple(arguments)
        self._tokens: dict[str, str] = {}

    @property
    def url(self) -> str:
        """Where it answers, with the certificate at `certificate`."""
        return f"https://{HOST}:{self.port}"

    @property
    def certificate(self) -> Path:
        """Its certificate and the authority that signed it."""
        return self.folder / "pki" / "apiserver.crt"

    @property
    def signing_key(self) -> Path:
        """The key of service accounts' tokens."""
        return self.folder / "service-accounts.key"

    @property
    def audit_log(self) -> Path:
        """One JSON object a request: who, verb, object, answer; not its body."""
        return self.folder / "audit.jsonl"

    def token(self, user: str) -> str:
        """The token of one of `USERS`."""
        return self._tokens[user]

    def context(self) -> ssl.SSLContext:
        """For clients: trusts this server alone."""
        return ssl.create_default_context(cafile=str(self.certificate))

    def _prepare(self) -> None:
        tokens = self.folder / "tokens.csv"
        if not tokens.exists():
            write_tokens(tokens, USERS)
            write_signing_key(self.signing_key)
        self._tokens = read_tokens(tokens)
        if self._audit:
            policy: dict[str, Any] = {
                "apiVersion": "audit.k8s.io/v1",
                "kind": "Policy",
                "omitStages": ["RequestReceived"],
                "rules": [{"level": "Metadata"}],
            }
            (self.folder / "audit-policy.yaml").write_text(yaml.safe_dump(policy))

    def _command(self) -> Sequence[str]:
        audit = [
            f"--audit-policy-file={self.folder / 'audit-policy.yaml'}",
            f"--audit-log-path={self.audit_log}",
        ]
        return [
            str(cluster_program("kube-apiserver")),
            f"--etcd-servers={self._etcd.url}",
            f"--bind-address={HOST}",
            f"--secure-port={self.port}",
            f"--advertise-address={HOST}",
            "--endpoint-reconciler-type=none",  # the address of a loopback is no endpoint
            "--kubelet-preferred-address-types=InternalIP",  # names of nodes are looked up nowhere
            f"--cert-dir={self.folder / 'pki'}",
            f"--token-auth-file={self.folder / 'tokens.csv'}",
            "--anonymous-auth=false",
            "--authorization-mode=RBAC",
            "--allow-privileged",
            f"--service-account-issuer={ISSUER}",
            f"--service-account-key-file={self.signing_key}",
            f"--service-account-signing-key-file={self.signing_key}",
            f"--service-cluster-ip-range={SERVICES}",
            "--profiling=false",
            *(audit if self._audit else ()),
            *self._arguments,
        ]

    def _environment(self) -> Mapping[str, str]:
        # A sixth of its time goes to Go's garbage collector; 150 MiB more spare it that.
        return {"GOGC": "400"}

    def _answers(self) -> bool:
        request = urllib.request.Request(
            self.url + "/readyz", headers={"Authorization": f"Bearer {self.token(ADMIN)}"}
        )
        try:
            with urllib.request.urlopen(
                request, timeout=PROBE_SECONDS, context=self.context()
            ) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


class ControllerManager(ServerProcess):
    """A kube-controller-manager with the controllers of `CONTROLLERS`.

    Args:
        folder: its own.
        api: the API server.
        node_grace_seconds: after which a node that is not heard of is no longer ready.
        arguments: further ones of its command line.
    """

    name = "controller-manager"

    def __init__(
        self,
        folder: Path,
        api: ApiServer,
        *,
        node_grace_seconds: int = 10,
        arguments: Sequence[str] = (),
    ) -> None:
        super().__init__(folder)
        self._api = api
        self._grace = node_grace_seconds
        self._arguments = tuple(arguments)

    def _prepare(self) -> None:
        write_kubeconfig(
            self.folder / "kubeconfig",
            server=self._api.url,
            authority=self._api.certificate,
            token=self._api.token(MANAGER),
        )

    def _command(self) -> Sequence[str]:
        config = self.folder / "kubeconfig"
        return [
            str(cluster_program("kube-controller-manager")),
            f"--kubeconfig={config}",
            f"--authentication-kubeconfig={config}",
            f"--authorization-kubeconfig={config}",
            f"--bind-address={HOST}",
            f"--secure-port={self.port}",
            f"--cert-dir={self.folder / 'pki'}",
            f"--service-account-private-key-file={self._api.signing_key}",
            f"--root-ca-file={self._api.certificate}",
            "--use-service-account-credentials",
            "--leader-elect=false",
            f"--controllers={','.join(CONTROLLERS)}",
            "--node-monitor-period=1s",
            f"--node-monitor-grace-period={self._grace}s",
            "--profiling=false",
            *self._arguments,
        ]

    def _answers(self) -> bool:
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # health tells nothing
        try:
            with urllib.request.urlopen(
                f"https://{HOST}:{self.port}/healthz", timeout=PROBE_SECONDS, context=context
            ) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False
