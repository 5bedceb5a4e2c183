"""The sections of `EsperConfig`: each setting with its type, its bounds and its default.

A setting's description says what is allowed, for the message that refuses something else.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated, Literal, cast, get_args
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


def _header_safe(value: SecretStr | None) -> SecretStr | None:
    """Refuse what no HTTP header can carry: the library that refuses it later would print it."""
    if value is not None and not re.fullmatch(r"[\x21-\x7e]+", value.get_secret_value()):
        raise ValueError("visible ASCII characters")
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
    pool_size: Annotated[
        int, Number, Field(ge=1, le=100, description="connections at most, 1 to 100")
    ] = 5
    pool_timeout_seconds: Annotated[
        float,
        Number,
        Field(gt=0, le=600, description="seconds to wait for a free connection, up to 600"),
    ] = 30.0
    pre_ping: Annotated[
        bool, Field(description="true or false: test a pooled connection before it is used")
    ] = True
    pool_recycle_seconds: Annotated[
        float,
        Number,
        Field(gt=0, le=86_400, description="seconds that a connection is kept, up to 86400"),
    ] = 1800.0
    statement_timeout_seconds: Annotated[
        float,
        Number,
        Field(gt=0, le=3600, description="seconds for one statement on Postgres, up to 3600"),
    ] = 30.0


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
    connect_timeout_seconds: Annotated[
        float,
        Number,
        Field(gt=0, le=600, description="seconds to wait for a connection, up to 600"),
    ] = 5.0
    read_timeout_seconds: Annotated[
        float, Number, Field(gt=0, le=600, description="seconds to wait for more bytes, up to 600")
    ] = 15.0
    timeout_seconds: Annotated[
        float, Number, Field(gt=0, le=3600, description="seconds for a whole request, up to 3600")
    ] = 300.0
    attempts: Annotated[
        int, Number, Field(ge=1, le=20, description="times that a request is tried, 1 to 20")
    ] = 4
    backoff_seconds: Annotated[
        float, Number, Field(ge=0, le=60, description="seconds, up to 60")
    ] = 0.25
    max_backoff_seconds: Annotated[
        float, Number, Field(ge=0, le=600, description="seconds, up to 600")
    ] = 10.0
    breaker_failures: Annotated[
        int, Number, Field(ge=1, le=1000, description="failures in a row, 1 to 1000")
    ] = 5
    breaker_reset_seconds: Annotated[
        float, Number, Field(gt=0, le=3600, description="seconds, up to 3600")
    ] = 30.0
    max_artifact_bytes: Annotated[
        int, Number, Field(ge=2**10, description="bytes of one artifact, at least 1024")
    ] = 512 * 2**20


class UrzaConfig(Section):
    """How the hub's own process serves its REST interface."""

    host: Annotated[
        str, Field(min_length=1, max_length=253, description="an address to listen on")
    ] = "127.0.0.1"
    port: Annotated[
        int, Number, Field(ge=0, le=65535, description="a port, 0 to 65535; 0: any free one")
    ] = 8000
    signing_key: Annotated[
        SecretStr | None,
        Field(
            min_length=32,
            description="the secret that tokens are signed with, at least 32 characters; equal "
            "in all processes of one hub",
        ),
    ] = None
    max_body_bytes: Annotated[
        int, Number, Field(ge=2**10, le=2**26, description="bytes of one request, 1024 to 67108864")
    ] = 2**20
    max_artifact_bytes: Annotated[
        int, Number, Field(ge=2**10, le=2**31 - 1, description="bytes of one artifact, from 1024")
    ] = 512 * 2**20
    lease_seconds: Annotated[
        float,
        Number,
        Field(ge=1, le=86_400, description="seconds that a claim lasts unheard, 1 to 86400"),
    ] = 60.0
    credential_days: Annotated[
        int, Number, Field(ge=1, le=3650, description="days that a session's credentials last")
    ] = 90
    upkeep_seconds: Annotated[
        float,
        Number,
        Field(gt=0, le=3600, description="seconds between looks at Redis and revocations"),
    ] = 5.0
    shutdown_seconds: Annotated[
        int, Number, Field(ge=1, le=600, description="seconds for requests to end, 1 to 600")
    ] = 10


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
    pool_size: Annotated[
        int, Number, Field(ge=1, le=100, description="connections kept open, 1 to 100")
    ] = 8
    connect_timeout_seconds: Annotated[
        float,
        Number,
        Field(gt=0, le=600, description="seconds to wait for a connection, up to 600"),
    ] = 5.0
    read_timeout_seconds: Annotated[
        float, Number, Field(gt=0, le=600, description="seconds to wait for an answer, up to 600")
    ] = 5.0
    attempts: Annotated[
        int, Number, Field(ge=1, le=20, description="times that a request is tried, 1 to 20")
    ] = 4
    backoff_seconds: Annotated[
        float, Number, Field(ge=0, le=60, description="seconds, up to 60")
    ] = 0.1
    max_backoff_seconds: Annotated[
        float, Number, Field(ge=0, le=600, description="seconds, up to 600")
    ] = 5.0
    buffer_messages: Annotated[
        int,
        Number,
        Field(ge=1, le=10**6, description="messages that may wait to be sent, 1 to 1000000"),
    ] = 1000
    prefetch_messages: Annotated[
        int,
        Number,
        Field(ge=1, le=10**4, description="messages read from Redis at once, 1 to 10000"),
    ] = 100
    stream_length: Annotated[
        int,
        Number,
        Field(ge=10, le=10**7, description="messages kept of each stream, about; 10 to 10000000"),
    ] = 10_000
    claim_idle_seconds: Annotated[
        float,
        Number,
        Field(
            gt=0,
            le=86_400,
            description="seconds until the messages of a silent receiver go to another, up to "
            "86400",
        ),
    ] = 30.0
    max_deliveries: Annotated[
        int,
        Number,
        Field(ge=1, le=1000, description="deliveries before a message is set aside, 1 to 1000"),
    ] = 8
    discovery_seconds: Annotated[
        float,
        Number,
        Field(
            gt=0,
            le=600,
            description="seconds between looks for new streams and left messages, up to 600",
        ),
    ] = 1.0


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
    pool_size: Annotated[
        int, Number, Field(ge=1, le=100, description="connections kept open, 1 to 100")
    ] = 8
    connect_timeout_seconds: Annotated[
        float,
        Number,
        Field(gt=0, le=600, description="seconds to wait for a connection, up to 600"),
    ] = 5.0
    read_timeout_seconds: Annotated[
        float, Number, Field(gt=0, le=600, description="seconds to wait for more bytes, up to 600")
    ] = 15.0
    attempts: Annotated[
        int, Number, Field(ge=1, le=20, description="times that a request is tried, 1 to 20")
    ] = 4
    checksum: Annotated[
        Literal["sha256", "none"],
        Field(
            description="one of sha256 (the service checks it before it stores), none (for "
            "services that know no checksums)"
        ),
    ] = "sha256"


class TezzeretConfig(Section):
    """How the forge's workers look for work, and what a compilation may cost."""

    poll_seconds: Annotated[
        float,
        Number,
        Field(gt=0, le=3600, description="seconds between two looks for work, up to 3600"),
    ] = 2.0
    lease_seconds: Annotated[
        float,
        Number,
        Field(
            ge=1,
            le=3600,
            description="seconds after which the work of a silent worker is another's, 1 to 3600",
        ),
    ] = 30.0
    compile_seconds: Annotated[
        float, Number, Field(gt=0, le=86_400, description="seconds, up to 86400")
    ] = 300.0
    compile_memory_bytes: Annotated[
        int,
        Number,
        Field(ge=64 * 2**20, description="bytes that a compilation may allocate, from 67108864"),
    ] = 4 * 2**30


class TolariaConfig(Section):
    """How a trainer waits for services elsewhere; for how long, its session says."""

    republish_seconds: Annotated[
        float,
        Number,
        Field(gt=0, le=3600, description="seconds until a question is asked again, up to 3600"),
    ] = 10.0
    kernel_poll_seconds: Annotated[
        float,
        Number,
        Field(gt=0, le=3600, description="seconds between two looks for a kernel, up to 3600"),
    ] = 1.0


class ComponentConfig(Section):
    """What every component shares: its kernel cache, its log and its health endpoints."""

    kernel_cache_bytes: Annotated[
        int, Number, Field(ge=2**20, description="bytes, at least 1048576 (1 MiB)")
    ] = 512 * 2**20
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
    log_queue_records: Annotated[
        int,
        Number,
        Field(ge=1, le=10**7, description="log records that may wait, 1 to 10000000"),
    ] = 10_000
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
