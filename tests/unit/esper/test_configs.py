from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from esper.config_sections import UrzaConfig
from esper.configs import (
    MAXIMUM_FILE_BYTES,
    NAMES,
    EsperConfig,
    launch_environment,
    parse_assignments,
    parse_levels,
    rank_of_process,
    torchrun_variables,
)
from esper.errors import ConfigError, OutputError
from esper.services.urza.store_sessions import MAX_CREDENTIAL_SECONDS

DEFAULTS = {
    "database.url": "sqlite+aiosqlite:///{run}/hub/urza.sqlite",
    "database.pool_size": 5,
    "database.pool_timeout_seconds": 30.0,
    "database.pre_ping": True,
    "database.pool_recycle_seconds": 1800.0,
    "database.statement_timeout_seconds": 30.0,
    "hub.url": None,
    "hub.token": None,
    "hub.token_file": None,
    "hub.connect_timeout_seconds": 5.0,
    "hub.read_timeout_seconds": 15.0,
    "hub.timeout_seconds": 300.0,
    "hub.attempts": 4,
    "hub.backoff_seconds": 0.25,
    "hub.max_backoff_seconds": 10.0,
    "hub.breaker_failures": 5,
    "hub.breaker_reset_seconds": 30.0,
    "hub.max_artifact_bytes": 512 * 2**20,
    "urza.host": "127.0.0.1",
    "urza.port": 8000,
    "urza.signing_key": None,
    "urza.admin_token": None,
    "urza.max_body_bytes": 2**20,
    "urza.max_artifact_bytes": 512 * 2**20,
    "urza.max_object_bytes": 8 * 2**30,
    "urza.max_session_bytes": 64 * 2**30,
    "urza.lease_seconds": 60.0,
    "urza.credential_days": 90,
    "urza.upkeep_seconds": 5.0,
    "urza.shutdown_seconds": 10,
    "redis.url": None,
    "redis.namespace": "default",
    "redis.pool_size": 8,
    "redis.connect_timeout_seconds": 5.0,
    "redis.read_timeout_seconds": 5.0,
    "redis.attempts": 4,
    "redis.backoff_seconds": 0.1,
    "redis.max_backoff_seconds": 5.0,
    "redis.buffer_messages": 1000,
    "redis.prefetch_messages": 100,
    "redis.stream_length": 10_000,
    "redis.claim_idle_seconds": 30.0,
    "redis.max_deliveries": 8,
    "redis.discovery_seconds": 1.0,
    "storage.folder": "{run}/hub/artifacts",
    "storage.bucket": None,
    "storage.prefix": "",
    "storage.endpoint_url": None,
    "storage.region": "us-east-1",
    "storage.access_key_id": None,
    "storage.secret_access_key": None,
    "storage.pool_size": 8,
    "storage.connect_timeout_seconds": 5.0,
    "storage.read_timeout_seconds": 15.0,
    "storage.attempts": 4,
    "storage.checksum": "sha256",
    "tezzeret.poll_seconds": 2.0,
    "tezzeret.lease_seconds": 30.0,
    "tezzeret.compile_seconds": 300.0,
    "tezzeret.compile_memory_bytes": 4 * 2**30,
    "tolaria.republish_seconds": 10.0,
    "tolaria.kernel_poll_seconds": 1.0,
    "tolaria.collective_timeout_seconds": 300.0,
    "tolaria.attempt": 0,
    "tolaria.storage": None,
    "tolaria.stop_seconds": 25.0,
    "operator.namespaces": "",
    "operator.excluded_namespaces": "",
    "operator.kubeconfig": None,
    "operator.lease_namespace": "esper-system",
    "operator.lease_name": "esper-operator",
    "operator.lease_seconds": 8,
    "operator.renew_seconds": 5.0,
    "operator.retry_seconds": 1.0,
    "operator.lease_request_seconds": 2.0,
    "operator.write_seconds": 4.0,
    "operator.workers": 16,
    "operator.seed_writes_per_second": 20.0,
    "operator.resync_seconds": 300.0,
    "operator.sweep_seconds": 300.0,
    "operator.image": "esper:latest",
    "operator.image_pull_policy": "IfNotPresent",
    "operator.image_pull_secrets": "",
    "operator.reserved_secrets": "",
    "operator.reserved_claims": "",
    "operator.stop_seconds": 60,
    "operator.worker_egress": None,
    "operator.catalogue": "",
    "operator.kernels_per_session": 64,
    "operator.compile_seconds": 900,
    "operator.compile_attempts": 5,
    "operator.compile_ttl_seconds": 600,
    "operator.compile_requests": "cpu=500m,memory=512Mi",
    "operator.compile_limits": "memory=5Gi",
    "operator.tamiyo_requests": "cpu=50m,memory=256Mi",
    "operator.tamiyo_limits": "memory=1Gi",
    "operator.shared_memory": "1Gi",
    "operator.blueprints_per_session": 64,
    "operator.pod_labels": "",
    "component.kernel_cache_bytes": 512 * 2**20,
    "component.log_level": "warning",
    "component.log_levels": "",
    "component.log_file": None,
    "component.log_queue_records": 10_000,
    "component.health_host": "127.0.0.1",
    "component.health_port": None,
}


@pytest.fixture(autouse=True)
def empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(command_line=None, environment=None, **keywords):
    return EsperConfig.load(command_line, environment=environment or {}, **keywords)


def origins(config):
    return {setting.name: setting.origin for setting in config.settings()}


def test_defaults_and_names_are_frozen():
    config = load()
    assert {setting.name: setting.value for setting in config.settings()} == DEFAULTS
    assert tuple(DEFAULTS) == NAMES
    assert set(origins(config).values()) == {"default"}


def test_the_stronger_place_wins_and_its_origin_is_kept(empty_directory):
    (empty_directory / "esper.yaml").write_text(
        "database: {pool_size: 2, pre_ping: false}\ncomponent:\n  log_level: error\n"
    )
    config = load(
        {"database.pool_size": "4"},
        {"ESPER_DATABASE__POOL_SIZE": "3", "ESPER_COMPONENT__LOG_LEVEL": "info"},
    )
    assert config.database.pool_size == 4
    assert config.component.log_level == "info"
    assert config.database.pre_ping is False
    assert origins(config) | {
        "database.pool_size": "command line --set database.pool_size",
        "component.log_level": "environment ESPER_COMPONENT__LOG_LEVEL",
        "database.pre_ping": "file esper.yaml",
        "redis.url": "default",
    } == origins(config)


@given(st.integers(1, 100), st.integers(1, 100), st.integers(1, 100), st.integers(0, 7))
def test_precedence_holds_for_every_mix_of_places(tmp_path_factory, line, variable, file, given_by):
    path = tmp_path_factory.mktemp("settings") / "s.yaml"
    path.write_text(f"database: {{pool_size: {file}}}" if given_by & 1 else "")
    environment = {"ESPER_DATABASE__POOL_SIZE": str(variable)} if given_by & 2 else {}
    command_line = {"database.pool_size": str(line)} if given_by & 4 else {}
    expected = line if given_by & 4 else variable if given_by & 2 else file if given_by & 1 else 5
    assert load(command_line, environment, file=path).database.pool_size == expected


@pytest.mark.parametrize("text", ["", "null"])
def test_null_can_be_typed(text):
    assert load({"redis.url": text}, {"ESPER_REDIS__URL": "redis://h"}).redis.url is None


@pytest.mark.parametrize(
    ("command_line", "environment", "file", "parts"),
    [
        ({"database.size": "1"}, {}, "", ["--set database.size", "database.pool_size"]),
        ({"pool_size": "1"}, {}, "", ["got pool_size"]),
        ({"database.pool_size": "many"}, {}, "", ["database.pool_size", "many", "1 to 100"]),
        ({"database.pool_size": "101"}, {}, "", ["101", "1 to 100"]),
        ({}, {"ESPER_DATABASE__POOL_SIZE": "0"}, "", ["environment ESPER_DATABASE__POOL_SIZE"]),
        ({}, {"ESPER_LOG_LEVEL": "info"}, "", ["environment ESPER_LOG_LEVEL", "log_level"]),
        ({}, {"ESPER_COMPONENT__LOG_LEVEL": "loud"}, "", ["loud", "debug, info, warning, error"]),
        ({}, {"ESPER_DATABASE__URL": "postgresql://h"}, "", ["sqlite+aiosqlite:///"]),
        ({}, {"ESPER_DATABASE__URL": ""}, "", ["database.url", "None", "sqlite+aiosqlite:///"]),
        ({}, {"ESPER_DATABASE__PRE_PING": "maybe"}, "", ["maybe", "true or false"]),
        ({}, {"ESPER_REDIS__URL": "http://h"}, "", ["redis.url", "redis://"]),
        ({}, {"ESPER_HUB__URL": "hub.example"}, "", ["hub.url", "http:// or https://"]),
        ({}, {"ESPER_HUB__URL": "ftp://hub.example"}, "", ["hub.url", "http:// or https://"]),
        ({}, {"ESPER_HUB__URL": "http://"}, "", ["hub.url", "http:// or https://"]),
        ({}, {"ESPER_HUB__URL": "http://hub:99999"}, "", ["hub.url", "a port from 1 to 65535"]),
        ({}, {"ESPER_HUB__URL": "http://hub:0"}, "", ["hub.url", "a port from 1 to 65535"]),
        ({}, {"ESPER_HUB__URL": "http://hub:x"}, "", ["hub.url", "a port from 1 to 65535"]),
        ({}, {"ESPER_HUB__URL": "http://[::1"}, "", ["hub.url", "a host"]),
        ({}, {"ESPER_HUB__URL": "http://[zz]:1"}, "", ["hub.url", "a host"]),
        ({}, {"ESPER_HUB__URL": "http://999.1.1.1"}, "", ["hub.url", "a host"]),
        ({}, {"ESPER_HUB__URL": "http://a..b"}, "", ["hub.url", "a host"]),
        ({}, {"ESPER_HUB__URL": "http://:80"}, "", ["hub.url", "a host"]),
        ({}, {"ESPER_HUB__URL": "http://hub?a=b"}, "", ["hub.url", "without user or query"]),
        ({}, {"ESPER_HUB__URL": "http://me@hub"}, "", ["hub.url", "without user or query"]),
        ({}, {}, "hub: {attempts: 0}", ["hub.attempts", "1 to 20"]),
        ({}, {}, "urza: {port: 65536}", ["urza.port", "0 to 65535"]),
        ({}, {}, "urza: {lease_seconds: 0}", ["urza.lease_seconds", "1 to 86400"]),
        ({}, {}, "urza: {signing_key: short}", ["urza.signing_key", "not shown", "32"]),
        ({}, {}, "hub: {timeout_seconds: 0}", ["hub.timeout_seconds", "up to 3600"]),
        ({}, {}, "hub: {breaker_failures: true}", ["hub.breaker_failures", "True"]),
        ({}, {}, "databases: {}", ["file esper.yaml", "databases"]),
        ({}, {}, "database: {size: 1}", ["file esper.yaml", "database.size"]),
        ({}, {}, "database: 3", ["database (file esper.yaml)", "a number", "mapping"]),
        ({}, {}, "database: {pool_size: true}", ["database.pool_size", "True"]),
        ({}, {}, "database: {pool_size: [1]}", ["database.pool_size", "[1]"]),
        ({}, {}, "database: {pool_timeout_seconds: .nan}", ["pool_timeout_seconds", "nan"]),
        ({}, {}, "component: {kernel_cache_bytes: 1}", ["kernel_cache_bytes", "1048576"]),
        ({"storage.bucket": "No"}, {}, "", ["storage.bucket", "No", "3 to 63 lower-case"]),
        ({"storage.prefix": "/a"}, {}, "", ["storage.prefix", "/a", "a relative path"]),
        ({"storage.prefix": "a/../b"}, {}, "", ["storage.prefix", "a relative path"]),
        ({"storage.endpoint_url": "s3://b"}, {}, "", ["storage.endpoint_url", "http:// or"]),
        ({"storage.endpoint_url": "http://u:p@h"}, {}, "", ["storage.endpoint_url", "user"]),
        ({"storage.region": "Here!"}, {}, "", ["storage.region", "us-east-1"]),
        ({"storage.attempts": "0"}, {}, "", ["storage.attempts", "1 to 20"]),
        ({"storage.checksum": "md5"}, {}, "", ["storage.checksum", "md5", "sha256", "none"]),
        ({"component.log_levels": "nobody=info"}, {}, "", ["log_levels", "nobody", "tamiyo"]),
        ({"component.log_levels": "urza=loud"}, {}, "", ["log_levels", "urza=loud", "warning"]),
        ({"component.log_levels": "urza"}, {}, "", ["component.log_levels", "NAME=LEVEL"]),
        ({}, {}, "- a list", ["esper.yaml", "mapping of sections"]),
        ({}, {}, "database: {", ["esper.yaml", "well-formed YAML"]),
        ({}, {}, "database: !!python/name:os.system {}", ["esper.yaml", "well-formed YAML"]),
        ({}, {}, "#" * (MAXIMUM_FILE_BYTES + 1), ["esper.yaml", "bytes"]),
    ],
)
def test_bad_settings_name_the_setting_its_origin_and_what_is_allowed(
    empty_directory, command_line, environment, file, parts
):
    (empty_directory / "esper.yaml").write_text(file)
    with pytest.raises(ConfigError) as caught:
        load(command_line, environment)
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_code == 2
    for part in parts:
        assert part in message


def test_levels_are_read_by_name():
    assert parse_levels(" tamiyo = debug, urza=info ,,tamiyo=error") == {
        "tamiyo": "error",
        "urza": "info",
    }
    assert parse_levels("") == {}
    config = load({}, {"ESPER_COMPONENT__LOG_LEVELS": "oona=debug"})
    assert parse_levels(config.component.log_levels) == {"oona": "debug"}


def test_broken_bytes_are_no_yaml(empty_directory):
    (empty_directory / "esper.yaml").write_bytes(b"a: \xff\xfe")
    with pytest.raises(ConfigError, match="well-formed YAML"):
        load()


def test_a_named_file_must_exist_and_be_a_file(empty_directory):
    with pytest.raises(ConfigError, match=r"--config: got nowhere\.yaml"):
        load(file=Path("nowhere.yaml"))
    (empty_directory / "esper.yaml").mkdir()
    with pytest.raises(ConfigError, match="can be read"):
        load()


def test_of_a_folder_each_file_is_the_setting_that_it_is_called_as(empty_directory):
    # As Kubernetes mounts a Secret: what is meant are links into a folder that begins with dots.
    mounted = empty_directory / "settings"
    content = mounted / "..2026_11_30"
    content.mkdir(parents=True)
    (content / "esper.yaml").write_text("hub: {url: http://hub:8000, token: from-yaml}\n")
    (content / "hub.token").write_text("a: b # not YAML\n".replace(" ", ""))
    (content / "storage.secret_access_key").write_text("")
    (mounted / "..data").symlink_to(content.name)
    for name in ("esper.yaml", "hub.token", "storage.secret_access_key"):
        (mounted / name).symlink_to(f"..data/{name}")

    config = load(file=mounted)
    assert config.hub.url == "http://hub:8000"
    assert config.hub.token.get_secret_value() == "a:b#notYAML"
    assert config.storage.secret_access_key is None
    origins = {setting.name: setting.origin for setting in config.settings()}
    assert origins["hub.token"] == f"file {mounted}/hub.token"
    assert origins["hub.url"] == f"file {mounted}/esper.yaml"
    assert load({"hub.token": "typed"}, file=mounted).hub.token.get_secret_value() == "typed"


def test_an_empty_file_or_section_gives_the_defaults(empty_directory):
    (empty_directory / "esper.yaml").write_text("database:\n")
    assert load() == EsperConfig()
    (empty_directory / "esper.yaml").write_text("")
    assert load() == EsperConfig()


def test_variables_of_a_kubernetes_service_are_no_settings():
    environment = {
        "ESPER_PORT": "tcp://10.0.0.1:80",
        "ESPER_HUB_SERVICE_HOST": "10.0.0.1",
        "ESPER_HUB_SERVICE_PORT_HTTP": "80",
        "ESPER_HUB_PORT_80_TCP_ADDR": "10.0.0.1",
        "UNRELATED": "1",
    }
    assert load({}, environment) == EsperConfig()


def test_the_variable_of_make_cluster_is_no_setting():
    assert load({}, {"ESPER_CLUSTER_STATE": "/var/tmp/mine"}) == EsperConfig()


def test_a_setting_that_ends_like_such_a_variable_is_read():
    assert load({}, {"ESPER_URZA__PORT": "9000"}).urza.port == 9000


def test_the_process_environment_is_read_by_default(monkeypatch):
    monkeypatch.setenv("ESPER_DATABASE__POOL_SIZE", "9")
    assert EsperConfig.load().database.pool_size == 9


def test_settings_are_frozen_and_closed():
    config = load()
    with pytest.raises(ValidationError):
        config.database = None
    with pytest.raises(ValidationError):
        EsperConfig(unknown=1)


def test_inside_a_run_places_are_absolute_and_origins_stay(empty_directory):
    config = load({"database.pool_size": "2"}).inside(Path("runs/a"))
    place = empty_directory.resolve() / "runs/a"
    assert config.database.url == f"sqlite+aiosqlite:///{place}/hub/urza.sqlite"
    assert config.storage.folder == f"{place}/hub/artifacts"
    assert origins(config)["database.pool_size"] == "command line --set database.pool_size"


def test_places_of_their_own_are_left_alone():
    config = load({"database.url": "sqlite+aiosqlite:///a.db", "storage.folder": "kept"})
    assert config.inside(Path("what?")) == config


def test_a_directory_that_no_url_can_name_is_refused():
    with pytest.raises(OutputError, match="question mark"):
        load().inside(Path("what?"))


def test_assignments_are_split_at_the_first_sign_and_the_last_wins():
    assert parse_assignments(["a=1", "b=x=y", "a=2"]) == {"a": "2", "b": "x=y"}
    for wrong in ("a", "=1", " =1"):
        with pytest.raises(ConfigError, match="NAME=VALUE"):
            parse_assignments([wrong])


def test_credentials_last_no_longer_than_the_hub_gives_any() -> None:
    days = MAX_CREDENTIAL_SECONDS / 86_400
    assert UrzaConfig(credential_days=int(days)).credential_days == days
    with pytest.raises(ValueError, match="credential_days"):
        UrzaConfig(credential_days=int(days) + 1)


def test_a_cluster_places_a_node_by_torchruns_own_variables():
    variables = {"PET_NNODES": "4", "JOB_COMPLETION_INDEX": "3", "PET_RDZV_ENDPOINT": " ", "X": "1"}
    assert torchrun_variables(variables) == {
        "nodes": ("4", "environment PET_NNODES"),
        "node_rank": ("3", "environment JOB_COMPLETION_INDEX"),
    }
    # The Job's index is only what nobody has said better.
    both = torchrun_variables(variables | {"PET_NODE_RANK": "2"})
    assert both["node_rank"] == ("2", "environment PET_NODE_RANK")


def test_torchrun_gets_nothing_from_the_environment_that_it_gets_as_an_option():
    kept = launch_environment(1, {"PET_NNODES": "4", "PATH": "p", "ESPER_HUB__URL": "u"})
    assert kept == {"PATH": "p", "ESPER_HUB__URL": "u", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    assert launch_environment(2, {})["OMP_NUM_THREADS"] == "1"
    assert launch_environment(2, {"OMP_NUM_THREADS": "8"})["OMP_NUM_THREADS"] == "8"


def test_a_rank_is_told_its_number_by_torchrun():
    assert rank_of_process({"RANK": "3"}) == 3
    for text in ("", "x", "-1"):
        with pytest.raises(ConfigError, match="environment RANK"):
            rank_of_process({"RANK": text})
