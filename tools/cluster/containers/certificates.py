"""The cluster's certificate authority, and what it signs, by openssl."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from pathlib import Path

from tools.cluster.containers.machines import run

DAYS = 365
_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")


def make_authority(folder: Path) -> None:
    """Write `ca.key` and `ca.crt`, which clients trust."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    run(
        [
            *("openssl", "req", "-x509", *_NEW_KEY, "-days", str(DAYS)),
            *("-keyout", str(folder / "ca.key"), "-out", str(folder / "ca.crt")),
            *("-subj", "/CN=esper-local", "-addext", "keyUsage=critical,keyCertSign,cRLSign"),
        ]
    )


def issue(folder: Path, name: str, subject: str, alternatives: Sequence[str]) -> None:
    """Write `<name>.key` and `<name>.crt`, for servers and clients; the latter once it is whole.

    Several may be issued at once: their numbers are by chance, none is counted.

    Args:
        folder: the authority's.
        name: of the files.
        subject: who it is, such as ``/O=group/CN=user``.
        alternatives: what the holder is called, such as ``IP:127.0.0.1`` and ``DNS:localhost``.
    """
    request, extensions = folder / f"{name}.csr", folder / f"{name}.ext"
    made = folder / f"{name}.crt.partial"
    extensions.write_text(
        f"subjectAltName={','.join(alternatives)}\nextendedKeyUsage=serverAuth,clientAuth\n"
    )
    run(
        [
            *("openssl", "req", *_NEW_KEY, "-keyout", str(folder / f"{name}.key")),
            *("-out", str(request), "-subj", subject),
        ]
    )
    run(
        [
            *("openssl", "x509", "-req", "-in", str(request), "-days", str(DAYS)),
            *("-CA", str(folder / "ca.crt"), "-CAkey", str(folder / "ca.key")),
            *("-set_serial", f"0x{secrets.token_hex(16)}"),
            *("-out", str(made), "-extfile", str(extensions)),
        ]
    )
    made.rename(folder / f"{name}.crt")
    request.unlink()
    extensions.unlink()
