"""The sections of `EsperConfig`: each setting with its type, its bounds and its default.

A setting's description says what is allowed, for the message that refuses something else.
"""

from __future__ import annotations

import ipaddress
import json
import re
from typing import Annotated, Any, Literal, cast, get_args
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SecretStr

RUN_DIRECTORY = "{run}"
"""Stands for the run's output directory in the settings that name a place."""

LogLevel = Literal["debug", "info", "warning", "error"]
LOG_NAMES = (
    *("kasmina", "tolaria", "tamiyo", "urza", "tezzeret", "oona", "operator"),
    *("uvicorn", "sqlalchemy", "alembic", "botocore", "redis", "kopf"),
)
"""Whose level can be set apart from the rest: the parts of Esper and the libraries that log."""


def _no_truth_value(value: object) -> object:
    """Refuse true and false where a number is asked: pydantic would read them as 1 and 0."""
    if isinstance(value, bool):
        raise ValueError("a number")
    return value


Number = BeforeValidator(_no_truth_value)
Real = Annotated[float, Number]
Whole = Annotated[int, Number]


def _seconds(default: float, what: str, *, most: int, least: int | None = None) -> Any:
    """A setting of so many seconds; without `least` of more than none."""
    bounds = f"up to {most}" if least is None else f"{least} to {most}"
    described = f"seconds {what}, {bounds}"
    if least is None:
        return Field(default, gt=0, le=most, description=described)
    return Field(default, ge=least, le=most, description=described)


def _whole(default: int, what: str, *, least: int, most: int | None = None) -> Any:
    """A setting of a whole number."""
    bounds = f"at least {least}" if most is None else f"{least} to {most}"
    return Field(default, ge=least, le=most, description=f"{what}: {bounds}")


def _header_safe(value: SecretStr | None) -> SecretStr | None:
    """Refuse what no HTTP header can carry: the library that refuses it later would print it."""
    if value is not None and not re.fullmatch(r"[\x21-\x7e]+", value.get_secret_value()):
        raise ValueError("visible ASCII characters")
    return value


def _rules(value: str | None) -> str | None:
    """Refuse what is no list of JSON objects."""
    rules = [] if value is None else json.loads(value)
    if not isinstance(rules, list) or not all(isinstance(rule, dict) for rule in rules):
        raise ValueError("a list of objects")
    return value


def parse_levels(text: str) -> dict[str, LogLevel]:
    """``"tamiyo=debug,urza=info"`` as a mapping; the last of a name wins.

    Raises:
        ValueError: an unknown name or level.
    """
    levels: dict[str, LogLevel] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, level = (part.strip() for part in item.partition("="))
        if name not in LOG_NAMES or level not in get_args(LogLevel):
            raise ValueError(f"unknown: {item}")
        levels[name] = cast("LogLevel", level)
    return levels


def _levels(text: str) -> str:
    parse_levels(text)
    return text


_QUANTITY = r"[0-9]+(\.[0-9]+)?([numkMGTPE]|[KMGTPE]i)?"
_RESOURCE = rf"[a-z0-9]([-a-z0-9./]*[a-z0-9])?={_QUANTITY}"
_WORD = r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
_POD_LABEL = rf"([a-z0-9]([-a-z0-9.]{{0,251}}[a-z0-9])?/)?{_WORD}=({_WORD})?"
Quantities = Annotated[str, Field(pattern=rf"^({_RESOURCE}(,{_RESOURCE})*)?$")]


def _quantities(default: str, what: str) -> Any:
    """A setting of amounts of resources."""
    return Field(default, description=f"{what}: as in {default}; empty: nothing is said")


_DNS_LABEL = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
_NAMES = rf"^({_DNS_LABEL}(,{_DNS_LABEL})*)?$"
_SUBDOMAIN = rf"{_DNS_LABEL}(\.{_DNS_LABEL})*"
_SUBDOMAINS = rf"^({_SUBDOMAIN}(,{_SUBDOMAIN})*)?$"


def _names(what: str, *, pattern: str = _NAMES) -> Any:
    """A setting of names, separated by commas."""
    return Field("", pattern=pattern, description=what)


_LABEL = r"[A-Za-z0-9]([A-Za-z0-9_-]{0,61}[A-Za-z0-9])?"
_HOST_NAME = re.compile(rf"{_LABEL}(\.{_LABEL})*\.?")


def _address(value: str | None) -> str | None:
    """Refuse an address whose host or port can't be one; who connects to it would fail oddly."""
    if value is None:
        return None
    parts = urlsplit(value)  # refuses brackets that hold no IPv6 address
    host = parts.hostname or ""
    if parts.port == 0:  # reading the port refuses what is no number up to 65535
        raise ValueError("a port from 1 to 65535")
    if ":" in host or re.fullmatch(r"[0-9.]+", host):
        ipaddress.ip_address(host.partition("%")[0])
    elif not _HOST_NAME.fullmatch(host):
        raise ValueError("a host name")
    return value


class Section(BaseModel):
    """One section: closed and frozen; what it refuses is not repeated in the error."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class DatabaseConfig(Section):
    """Where Urza keeps its rows."""

    url: Annotated[
        str,
        Field(
            pattern=r"^(sqlite\+aiosqlite:///|postgresql\+asyncpg://).+",
            description="a URL that begins with sqlite+aiosqlite:/// or postgresql+asyncpg://; "
            "{run} is the run's directory",
        ),
    ] = f"sqlite+aiosqlite:///{RUN_DIRECTORY}/hub/urza.sqlite"
    pool_size: Whole = _whole(5, "connections at most", least=1, most=100)
    pool_timeout_seconds: Real = _seconds(30.0, "to wait for a free connection", most=600)
    pre_ping: Annotated[
        bool, Field(description="true or false: test a pooled connection before it is used")
    ] = True
    pool_recycle_seconds: Real = _seconds(1800.0, "that a connection is kept", most=86_400)
    statement_timeout_seconds: Real = _seconds(30.0, "for one statement on Postgres", most=3600)


class HubConfig(Section):
    """Where Urza answers over HTTP, for processes that do not hold the hub themselves.

    A request is tried `attempts` times, with a random pause of up to `backoff_seconds` after the
    first failure, twice that after the second, and so on up to `max_backoff_seconds`. After
    `breaker_failures` in a row the hub is left alone for `breaker_reset_seconds`.
    """

    url: Annotated[
        str | None,
        Field(
            pattern=r"^https?://[^\s/?#@]+(/[^\s?#@]*)?$",
            description="http:// or https://, a host, a port from 1 to 65535 if any and a path, "
            "without user or query; or null: the hub is in this process",
        ),
        AfterValidator(_address),
    ] = None
    token: Annotated[
        SecretStr | None,
        AfterValidator(_header_safe),
        Field(description="the bearer token, visible ASCII characters, or null: none is sent"),
    ] = None
    token_file: Annotated[
        str | None,
        Field(
            min_length=1,
            description="a file that holds the bearer token, read for each request and taken "
            "before hub.token; or null",
        ),
    ] = None
    connect_timeout_seconds: Real = _seconds(5.0, "to wait for a connection", most=600)
    read_timeout_seconds: Real = _seconds(15.0, "to wait for more bytes", most=600)
    timeout_seconds: Real = _seconds(300.0, "for a whole request", most=3600)
    attempts: Whole = _whole(4, "times that a request is tried", least=1, most=20)
    backoff_seconds: Real = _seconds(0.25, "before a second try", least=0, most=60)
    max_backoff_seconds: Real = _seconds(10.0, "between two tries", least=0, most=600)
    breaker_failures: Whole = _whole(5, "failures in a row", least=1, most=1000)
    breaker_reset_seconds: Real = _seconds(30.0, "that a failing hub is left alone", most=3600)
    max_artifact_bytes: Whole = _whole(512 * 2**20, "bytes of one artifact", least=2**10)


class UrzaConfig(Section):
    """How the hub's own process serves its REST interface."""

    host: Annotated[
        str, Field(min_length=1, max_length=253, description="an address to listen on")
    ] = "127.0.0.1"
    port: Whole = _whole(8000, "a port (0: any free one)", least=0, most=65535)
    signing_key: Annotated[
        SecretStr | None,
        Field(
            min_length=32,
            description="the secret that tokens are signed with, at least 32 characters; equal "
            "in all processes of one hub",
        ),
    ] = None
    admin_token: Annotated[
        SecretStr | None,
        AfterValidator(_header_safe),
        Field(
            min_length=32,
            description="a bearer token of the role admin that does not expire, at least 32 "
            "visible ASCII characters, or null: none but the signed ones",
        ),
    ] = None
    max_body_bytes: Whole = _whole(2**20, "bytes of one request", least=2**10, most=2**26)
    max_artifact_bytes: Whole = _whole(
        512 * 2**20, "bytes of one artifact", least=2**10, most=2**31 - 1
    )
    max_object_bytes: Whole = _whole(
        8 * 2**30, "bytes of one object of a session", least=2**10, most=2**50
    )
    max_session_bytes: Whole = _whole(
        64 * 2**30, "bytes of all objects of a session", least=2**10, most=2**53
    )
    lease_seconds: Real = _seconds(60.0, "that a claim lasts unheard", least=1, most=86_400)
    credential_days: Whole = _whole(90, "days that a session's credentials last", least=1, most=366)
    upkeep_seconds: Real = _seconds(5.0, "between looks at Redis and revocations", most=3600)
    shutdown_seconds: Whole = _whole(10, "seconds for requests to end", least=1, most=600)


class RedisConfig(Section):
    """Where Oona's streams are, for processes that do not share one bus in memory.

    What can't be sent waits up to `backoff_seconds` after the first failure, twice that after the
    second, and so on up to `max_backoff_seconds`, each time a random part of it. After `attempts`
    failures in a row messages wait in this process, `buffer_messages` of them.
    """

    url: Annotated[
        str | None,
        Field(
            pattern=r"^rediss?://.+",
            description="a URL that begins with redis:// or rediss://, or null: in-process bus",
        ),
    ] = None
    namespace: Annotated[
        str,
        Field(
            pattern=r"^[A-Za-z0-9][A-Za-z0-9-]{0,62}$",
            description="letters, digits and dashes, at most 63: streams of one are apart from "
            "another's",
        ),
    ] = "default"
    pool_size: Whole = _whole(8, "connections kept open", least=1, most=100)
    connect_timeout_seconds: Real = _seconds(5.0, "to wait for a connection", most=600)
    read_timeout_seconds: Real = _seconds(5.0, "to wait for an answer", most=600)
    attempts: Whole = _whole(4, "times that a request is tried", least=1, most=20)
    backoff_seconds: Real = _seconds(0.1, "before a second try", least=0, most=60)
    max_backoff_seconds: Real = _seconds(5.0, "between two tries", least=0, most=600)
    buffer_messages: Whole = _whole(1000, "messages that may wait to be sent", least=1, most=10**6)
    prefetch_messages: Whole = _whole(100, "messages read from Redis at once", least=1, most=10**4)
    stream_length: Whole = _whole(
        10_000,
        "messages kept of each stream, about; ten times that for a group that lags",
        least=10,
        most=10**7,
    )
    claim_idle_seconds: Real = _seconds(
        30.0, "until the messages of a silent receiver go to another", most=86_400
    )
    max_deliveries: Whole = _whole(
        8, "deliveries before a message is set aside", least=1, most=1000
    )
    discovery_seconds: Real = _seconds(
        1.0, "between looks for new streams and left messages", most=600
    )


class StorageConfig(Section):
    """Where kernel artifacts lie: in a bucket where one is named, else in a folder.

    A request is tried `attempts` times, with growing random pauses, fewer while the service asks
    for less.
    """

    folder: Annotated[
        str, Field(min_length=1, description="a folder; {run} is the run's directory")
    ] = f"{RUN_DIRECTORY}/hub/artifacts"
    bucket: Annotated[
        str | None,
        Field(
            pattern=r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$",
            description="a bucket that exists (3 to 63 lower-case letters, digits, dots and "
            "dashes), or null: artifacts lie in storage.folder",
        ),
    ] = None
    prefix: Annotated[
        str,
        Field(
            pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*)?$",
            max_length=256,
            description="what keys in the bucket begin with: a relative path of letters, digits, "
            "dots, dashes and underscores, or an empty text",
        ),
    ] = ""
    endpoint_url: Annotated[
        str | None,
        Field(
            pattern=r"^https?://[^\s/?#@]+(/[^\s?#@]*)?$",
            description="an address that begins with http:// or https://, without user or query, "
            "or null: Amazon's for the region",
        ),
    ] = None
    region: Annotated[
        str, Field(pattern=r"^[a-z0-9-]{1,40}$", description="a region, as in us-east-1")
    ] = "us-east-1"
    access_key_id: Annotated[
        str | None,
        Field(
            pattern=r"^[\x21-\x7e]+$",
            description="visible ASCII characters, or null: the credentials of the machine or pod",
        ),
    ] = None
    secret_access_key: Annotated[
        SecretStr | None,
        AfterValidator(_header_safe),
        Field(description="visible ASCII characters, given with storage.access_key_id, or null"),
    ] = None
    pool_size: Whole = _whole(8, "connections kept open", least=1, most=100)
    connect_timeout_seconds: Real = _seconds(5.0, "to wait for a connection", most=600)
    read_timeout_seconds: Real = _seconds(15.0, "to wait for more bytes", most=600)
    attempts: Whole = _whole(4, "times that a request is tried", least=1, most=20)
    checksum: Annotated[
        Literal["sha256", "none"],
        Field(
            description="one of sha256 (the service checks it before it stores), none (for "
            "services that know no checksums)"
        ),
    ] = "sha256"


class TezzeretConfig(Section):
    """How the forge's workers look for work, and what a compilation may cost."""

    poll_seconds: Real = _seconds(2.0, "between two looks for work", most=3600)
    lease_seconds: Real = _seconds(
        30.0, "after which the work of a silent worker is another's", least=1, most=3600
    )
    compile_seconds: Real = _seconds(300.0, "for one compilation", most=86_400)
    compile_memory_bytes: Whole = _whole(
        4 * 2**30, "bytes that a compilation may allocate", least=64 * 2**20
    )


class TolariaConfig(Section):
    """How a trainer waits: for services elsewhere, as long as its session says, and for ranks."""

    republish_seconds: Real = _seconds(10.0, "until a question is asked again", most=3600)
    kernel_poll_seconds: Real = _seconds(1.0, "between two looks for a kernel", most=3600)
    collective_timeout_seconds: Real = _seconds(
        300.0, "that ranks wait for one that does not take part", most=86_400
    )
    attempt: Whole = _whole(
        0, "which of the operator's attempts this is, 0 for none", least=0, most=999_999_999
    )
    storage: Annotated[
        str | None,
        Field(
            pattern=r"^(hub|file:///.+)$",
            description="where checkpoints and results lie if spec.storage.uri does not say: hub "
            "(its object store), file:///PATH, or null: the run's directory",
        ),
    ] = None
    stop_seconds: Real = _seconds(
        25.0, "for the ranks to write a checkpoint and end, once asked to stop", most=3600
    )


class OperatorConfig(Section):
    """How the operator runs in a cluster, and what the pods that it makes are made of.

    Of two operators with the same lease one works and the other waits. Whoever has not renewed the
    lease for `renew_seconds` ends; after `lease_seconds` without a renewal the other takes it.
    """

    namespaces: str = _names("names of namespaces, separated by commas; empty: the whole cluster")
    excluded_namespaces: str = _names("namespaces left to others, by commas; not with namespaces")
    kubeconfig: Annotated[
        str | None,
        Field(
            min_length=1,
            description="a kubeconfig file, or null: the pod's service account, else kubectl's",
        ),
    ] = None
    lease_namespace: Annotated[
        str, Field(pattern=f"^{_DNS_LABEL}$", description="the namespace of the operator's lease")
    ] = "esper-system"
    lease_name: Annotated[
        str, Field(pattern=f"^{_DNS_LABEL}$", description="the name of its lease")
    ] = "esper-operator"
    lease_seconds: Whole = _whole(8, "seconds that a lease lasts", least=2, most=600)
    renew_seconds: Real = _seconds(5.0, "without a renewal, after which it ends", most=600)
    retry_seconds: Real = _seconds(1.0, "between two renewals, or looks at the lease", most=60)
    lease_request_seconds: Real = _seconds(2.0, "for one request about the lease", most=60)
    write_seconds: Real = _seconds(4.0, "for one write to the API server", most=60)
    workers: Whole = _whole(16, "objects that are looked at at once", least=1, most=256)
    seed_writes_per_second: Annotated[
        float, Number, Field(gt=0, le=1000, description="writes of seeds a second, up to 1000")
    ] = 20.0
    resync_seconds: Real = _seconds(300.0, "between comparisons with the API server", most=3600)
    sweep_seconds: Real = _seconds(300.0, "between sweeps of what no session owns", most=86_400)
    image: Annotated[
        str,
        Field(min_length=1, max_length=1024, description="the image of pods that name no other"),
    ] = "esper:latest"
    image_pull_policy: Annotated[
        Literal["Always", "IfNotPresent", "Never"],
        Field(description="one of Always, IfNotPresent, Never"),
    ] = "IfNotPresent"
    image_pull_secrets: str = _names("Secrets with which images are pulled, by commas")
    reserved_secrets: str = _names(
        "Secrets of the lease's namespace that no session may name, by commas", pattern=_SUBDOMAINS
    )
    reserved_claims: str = _names(
        "claims of the lease's namespace that no session may name, by commas", pattern=_SUBDOMAINS
    )
    stop_seconds: Whole = _whole(60, "seconds to write a checkpoint", least=1, most=3600)
    worker_egress: Annotated[
        str | None,
        AfterValidator(_rules),
        Field(
            max_length=32_768,
            description="a JSON list of a NetworkPolicy's egress rules, where workers may connect "
            "to besides each other, or null: they have no NetworkPolicy",
        ),
    ] = None
    catalogue: str = _names("namespaces with the catalogue, by commas")
    kernels_per_session: Whole = _whole(64, "kernels of one session", least=0, most=1000)
    compile_seconds: Whole = _whole(900, "seconds for a compile Job", least=1, most=86_400)
    compile_attempts: Whole = _whole(5, "compile Jobs of one kernel", least=1, most=100)
    compile_ttl_seconds: Whole = _whole(
        600, "seconds that a compile Job stays for its log", least=0, most=86_400
    )
    compile_requests: Quantities = _quantities("cpu=500m,memory=512Mi", "a compile Job asks for")
    compile_limits: Quantities = _quantities("memory=5Gi", "what a compile Job may use")
    tamiyo_requests: Quantities = _quantities("cpu=50m,memory=256Mi", "what a controller asks for")
    tamiyo_limits: Quantities = _quantities("memory=1Gi", "what a controller may use")
    shared_memory: Annotated[
        str,
        Field(pattern=f"^{_QUANTITY}$", description="the size of /dev/shm, a quantity as in 1Gi"),
    ] = "1Gi"
    blueprints_per_session: Whole = _whole(64, "Blueprints of one session", least=0, most=1000)
    pod_labels: Annotated[
        str,
        Field(
            pattern=rf"^({_POD_LABEL}(,{_POD_LABEL})*)?$",
            description="labels of every pod, as in network=esper,team=a; empty: none",
        ),
    ] = ""


class ComponentConfig(Section):
    """What every component shares: its kernel cache, its log and its health endpoints."""

    kernel_cache_bytes: Whole = _whole(512 * 2**20, "bytes", least=2**20)
    log_level: Annotated[LogLevel, Field(description="one of " + ", ".join(get_args(LogLevel)))] = (
        "warning"
    )
    log_levels: Annotated[
        str,
        AfterValidator(_levels),
        Field(
            description="NAME=LEVEL, separated by commas, as in tamiyo=debug,sqlalchemy=info; "
            f"names: {', '.join(LOG_NAMES)}; levels: {', '.join(get_args(LogLevel))}"
        ),
    ] = ""
    log_file: Annotated[
        str | None, Field(min_length=1, description="a file, or null: standard error")
    ] = None
    log_queue_records: Whole = _whole(10_000, "log records that may wait", least=1, most=10**7)
    health_host: Annotated[
        str, Field(min_length=1, description="an address of this machine to listen on")
    ] = "127.0.0.1"
    health_port: Annotated[
        int | None,
        Number,
        Field(
            ge=0,
            le=65_535,
            description="a port that `esper serve` shows its health on, or null: a free one",
        ),
    ] = None
