"""Who may talk to the API server: a signing key, static tokens, kubeconfigs.

The certificate is the API server's own, made at its first start; kubeconfigs trust that alone.
"""

from __future__ import annotations

import base64
import secrets
from collections.abc import Mapping
from pathlib import Path

import yaml

_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
"""How many points the curve P-256 has (FIPS 186-4, D.1.2.3): keys lie below it."""
_BEFORE, _AFTER = bytes.fromhex("30310201010420"), bytes.fromhex("a00a06082a8648ce3d030107")
"""SEC 1, C.4: version 1, the key in 32 bytes, the curve P-256; the public half may be left out."""

Users = Mapping[str, tuple[str, ...]]
"""The groups of each user."""


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner reads."""
    path.touch(mode=0o600)
    path.write_text(text)


def write_signing_key(path: Path) -> None:
    """Write a new private key for ECDSA over P-256, as PEM."""
    number = secrets.randbelow(_ORDER - 1) + 1
    body = base64.b64encode(_BEFORE + number.to_bytes(32, "big") + _AFTER).decode()
    kind = "EC PRIVATE KEY"
    write_private(path, f"-----BEGIN {kind}-----\n{body}\n-----END {kind}-----\n")


def write_tokens(path: Path, users: Users) -> dict[str, str]:
    """Write a file of static tokens, new ones; returns each user's."""
    tokens = {user: secrets.token_hex(32) for user in users}
    lines = [f'{tokens[user]},{user},{user},"{",".join(users[user])}"\n' for user in users]
    write_private(path, "".join(lines))
    return tokens


def read_tokens(path: Path) -> dict[str, str]:
    """The tokens of `write_tokens`, by user."""
    rows = [line.split(",", 2) for line in path.read_text().splitlines()]
    return {user: token for token, user, _ in rows}


def write_kubeconfig(
    path: Path, *, server: str, authority: Path, token: str, namespace: str = "default"
) -> Path:
    """Write what kubectl and clients read: where the API server is, and a bearer token."""
    name = "esper"
    cluster = {"server": server, "certificate-authority": str(authority)}
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": name, "cluster": cluster}],
        "users": [{"name": name, "user": {"token": token}}],
        "contexts": [
            {"name": name, "context": {"cluster": name, "user": name, "namespace": namespace}}
        ],
        "current-context": name,
    }
    write_private(path, yaml.safe_dump(config))
    return path
