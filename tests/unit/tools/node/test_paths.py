"""Paths of a container found in texts, and nothing else taken for one."""

from pathlib import Path

import pytest

from tools.cluster.node.paths import PathMap

FOLDERS = {
    "/etc/esper": Path("/v/config"),
    "/etc/esper/secret/": Path("/v/secret"),
    "/tmp": Path("/v/tmp"),
    "/data": Path("/v/data"),
}


@pytest.mark.parametrize(
    ("text", "rewritten"),
    [
        ("/etc/esper", "/v/config"),
        ("/etc/esper/session.yaml", "/v/config/session.yaml"),
        ("/etc/esper/secret/token", "/v/secret/token"),
        ("/etc/esper/secret", "/v/secret"),
        ("--file=/etc/esper/a:/data", "--file=/v/config/a:/v/data"),
        ("file:///data/runs", "file:///v/data/runs"),
        ("{path: '/data', other: /tmp/x}", "{path: '/v/data', other: /v/tmp/x}"),
        ("/etc/esper-other", "/etc/esper-other"),
        ("/etc/esper.d", "/etc/esper.d"),
        ("/var/etc/esper", "/var/etc/esper"),
        ("s3://bucket/data", "s3://bucket/data"),
        ("/database", "/database"),
        ("/tmp/tests/here", "/tmp/tests/here"),
        ("/tmp/tests-not/here", "/v/tmp/tests-not/here"),
        ("", ""),
    ],
)
def test_a_path_is_found_as_a_whole(text, rewritten):
    assert PathMap(FOLDERS, [Path("/tmp/tests")]).rewritten(text) == rewritten


def test_what_has_been_rewritten_stays_where_its_folder_is_ones_own():
    paths = PathMap({"/tmp": Path("/tmp/tests/volumes/tmp")}, [Path("/tmp/tests")])
    once = paths.rewritten("/tmp/a")
    assert once == "/tmp/tests/volumes/tmp/a"
    assert paths.rewritten(once) == once


def test_without_mounts_nothing_changes():
    assert PathMap({}).rewritten("/etc/esper /tmp") == "/etc/esper /tmp"
    assert PathMap({}).folder("/srv/dir") == Path("/srv/dir")
