"""What is missing of Debian's packages, and what is said about it."""

import pytest

from tools.cluster.containers import packages
from tools.cluster.containers.packages import IMAGES, NODE, install, missing
from tools.servers.process import ServerError


def test_only_what_is_not_there_is_missing():
    there = {"ip", "mount"}
    assert missing({"ip": "iproute2", "nft": "nftables"}, lambda p: p in there or None) == [
        "nftables"
    ]
    assert missing(NODE | IMAGES, lambda program: program) == []


def test_who_can_not_install_is_told_how(monkeypatch):
    monkeypatch.setattr(packages.os, "geteuid", lambda: 1000)
    with pytest.raises(ServerError) as told:
        install({"no-such-program": "one", "none-such-either": "two"}, print)
    assert str(told.value) == (
        "missing: one, two; as root on Debian: apt-get install --no-install-recommends one two"
    )


def test_nothing_is_said_where_nothing_is_missing():
    said = []
    install({"sh": "dash"}, said.append)
    assert said == []
