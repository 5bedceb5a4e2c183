"""What a cluster's authority signs."""

import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

from tools.cluster.containers.certificates import issue, make_authority
from tools.servers.process import ServerError


def verified(folder, name):
    words = ("openssl", "verify", "-CAfile", str(folder / "ca.crt"), str(folder / f"{name}.crt"))
    return subprocess.run(words, capture_output=True).returncode == 0


def test_certificates_that_are_issued_at_once_are_all_whole(tmp_path):
    make_authority(tmp_path)
    names = [f"node-{number}" for number in range(8)]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda name: issue(tmp_path, name, f"/CN={name}", [f"DNS:{name}"]), names))
    assert all(verified(tmp_path, name) for name in names)
    found = {path.name for path in tmp_path.iterdir()}
    assert found == {f"{name}.{kind}" for name in ("ca", *names) for kind in ("key", "crt")}


def test_one_that_can_not_be_signed_leaves_none(tmp_path):
    make_authority(tmp_path)
    with pytest.raises(ServerError):
        issue(tmp_path, "node", "/CN=node", ["nothing"])
    assert not (tmp_path / "node.crt").exists()
