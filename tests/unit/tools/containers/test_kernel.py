"""Control groups of both versions, in folders that stand for the kernel's; saved settings."""

import pytest

from tools.cluster.containers.kernel import (
    TUNED,
    hierarchies,
    make_cgroup,
    remove_cgroup,
    restore_settings,
    save_settings,
)
from tools.servers.process import ServerError


@pytest.fixture
def first_version(tmp_path):
    for name in ("cpuset", "memory"):
        (tmp_path / name).mkdir()
    (tmp_path / "cpu").symlink_to(tmp_path / "memory")
    (tmp_path / "unified").mkdir()  # of version 2, without controllers
    (tmp_path / "unified" / "cgroup.controllers").touch()
    (tmp_path / "unified" / "cgroup.subtree_control").touch()
    return tmp_path


def test_version_1_has_a_tree_for_each_controller(first_version):
    found = [path.name for path in hierarchies(first_version)]
    assert found == ["cpuset", "memory", "unified"]


def test_version_2_has_one_tree_whose_controllers_are_handed_down(tmp_path):
    (tmp_path / "cgroup.controllers").write_text("cpu memory\n")
    (tmp_path / "cgroup.subtree_control").touch()
    assert hierarchies(tmp_path) == [tmp_path]
    make_cgroup("/a/b", tmp_path)
    assert (tmp_path / "a" / "b").is_dir()
    # A file that a kernel keeps adds up what is written; this one holds the last.
    assert (tmp_path / "cgroup.subtree_control").read_text() == "+memory"


def test_groups_are_made_and_removed_in_every_tree(first_version):
    for _ in range(2):  # a second time nothing happens
        make_cgroup("/a/b", first_version)
    (first_version / "memory" / "a" / "b" / "pod" / "container").mkdir(parents=True)
    assert (first_version / "cpuset" / "a" / "b").is_dir()
    remove_cgroup("/a", first_version)
    remove_cgroup("/a", first_version)
    left = {path.name for path in first_version.rglob("*")}
    files = {"cgroup.controllers", "cgroup.subtree_control"}
    assert left == {"cpuset", "memory", "cpu", "unified", *files}


def test_a_group_with_processes_is_told(first_version, monkeypatch):
    monkeypatch.setattr("tools.cluster.containers.kernel._REMOVE_SECONDS", 0.1)
    make_cgroup("/a", first_version)
    (first_version / "memory" / "a" / "busy").touch()  # so that it can't be removed
    with pytest.raises(ServerError, match=r"memory/a: can't be removed"):
        remove_cgroup("/a", first_version)


def test_a_machine_without_control_groups_is_told(tmp_path):
    with pytest.raises(ServerError, match="got no control groups"):
        make_cgroup("/a", tmp_path)


def test_settings_are_noted_once_and_set_again_by_the_last_cluster(tmp_path):
    root, notes = tmp_path / "sys", tmp_path / "notes"

    def settings(value=None):
        for name in TUNED if value else ():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(value)
        return {(root / name).read_text().strip() for name in TUNED}

    settings("0")
    save_settings("/one", notes, root)
    settings("1")
    save_settings("/one", notes, root)  # what a kubelet has set is not what was there before
    save_settings("/two", notes, root)
    restore_settings("/one", notes, root)
    assert settings() == {"1"}
    restore_settings("/one", notes, root)
    assert settings() == {"1"}
    restore_settings("/two", notes, root)
    assert settings() == {"0"}
    assert not notes.exists()
    restore_settings("/two", notes, root)
