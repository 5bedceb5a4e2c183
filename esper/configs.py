"""Esper's own settings, and where each of them came from. The one file that reads the environment.

A setting has one name in all four places that can give it, the strongest first:

1. the command line: ``--set database.pool_size=8`` (some also have an option of their own),
2. the environment: ``ESPER_DATABASE__POOL_SIZE=8``,
3. the file: ``esper.yaml`` in the working directory, or the one that ``--config`` names,
4. the defaults below.

What a *session* does (model, data, training, growth) stands in its manifest, never here.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal, get_args
from urllib.parse import urlsplit

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    SecretStr,
    ValidationError,
)
from pydantic.fields import FieldInfo

from esper.errors import ConfigError, OutputError

ENVIRONMENT_PREFIX = "ESPER_"
DEFAULT_FILE = Path("esper.yaml")
MAXIMUM_FILE_BYTES = 64 * 2**10
RUN_DIRECTORY = "{run}"
"""Stands for the run's output directory in the settings that name a place."""

LogLevel = Literal["debug", "info", "warning", "error"]

# Kubernetes gives every pod variables for the Services of its namespace; one of a Service called
# "esper-…" begins like a setting without being one.
_SERVICE_LINK = re.compile(r"_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP)(_\w+)?)?)$")


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


SECRETS = frozenset({"hub.token"})
"""The settings whose values are never shown."""

HIDDEN = "(not shown)"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class DatabaseConfig(_Section):
    """Where Urza keeps its rows."""

    url: Annotated[
        str,
        Field(
            pattern=r"^sqlite\+aiosqlite:///.+",
            description="a URL that begins with sqlite+aiosqlite:///; {run} is the run's directory",
        ),
    ] = f"sqlite+aiosqlite:///{RUN_DIRECTORY}/hub/urza.sqlite"
    pool_size: Annotated[
        int, Number, Field(ge=1, le=100, description="connections kept open, 1 to 100")
    ] = 5
    pool_timeout_seconds: Annotated[
        float,
        Number,
        Field(gt=0, le=600, description="seconds to wait for a free connection, up to 600"),
    ] = 30.0
    pre_ping: Annotated[
        bool, Field(description="true or false: test a pooled connection before it is used")
    ] = True


class HubConfig(_Section):
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


class RedisConfig(_Section):
    """Where Oona's streams are, for processes that do not share one bus in memory."""

    url: Annotated[
        str | None,
        Field(
            pattern=r"^rediss?://.+",
            description="a URL that begins with redis:// or rediss://, or null: in-process bus",
        ),
    ] = None


class StorageConfig(_Section):
    """Where kernel artifacts lie."""

    folder: Annotated[
        str, Field(min_length=1, description="a folder; {run} is the run's directory")
    ] = f"{RUN_DIRECTORY}/hub/artifacts"


class ComponentConfig(_Section):
    """What every component shares: its kernel cache and its log."""

    kernel_cache_bytes: Annotated[
        int, Number, Field(ge=2**20, description="bytes, at least 1048576 (1 MiB)")
    ] = 512 * 2**20
    log_level: Annotated[LogLevel, Field(description="one of " + ", ".join(get_args(LogLevel)))] = (
        "warning"
    )
    log_file: Annotated[
        str | None, Field(min_length=1, description="a file, or null: standard error")
    ] = None
    log_queue_records: Annotated[
        int,
        Number,
        Field(ge=1, le=10**7, description="log records that may wait, 1 to 10000000"),
    ] = 10_000


@dataclass(frozen=True)
class Setting:
    """One setting as `esper doctor` shows it."""

    name: str
    value: object
    origin: str


class EsperConfig(_Section):
    """Every setting, frozen. `load` reads them; the bare constructor gives the defaults."""

    database: DatabaseConfig = DatabaseConfig()
    hub: HubConfig = HubConfig()
    redis: RedisConfig = RedisConfig()
    storage: StorageConfig = StorageConfig()
    component: ComponentConfig = ComponentConfig()
    _origins: Mapping[str, str] = PrivateAttr(default_factory=dict)

    @classmethod
    def load(
        cls,
        command_line: Mapping[str, str] | None = None,
        *,
        file: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> EsperConfig:
        """The settings of this process.

        Args:
            command_line: dotted names to values, as typed.
            file: the settings file; None means `esper.yaml` where there is one.
            environment: variables to read; None means those of the process.

        Raises:
            ConfigError: an unknown setting, a wrong value, or a file that can't be read; the
                message names the setting, its origin, what came and what is allowed.
        """
        given: dict[str, tuple[object, str]] = {}
        variables = os.environ if environment is None else environment
        given.update(_from_file(file))
        given.update(_from_environment(variables))
        for name, text in (command_line or {}).items():
            given[name] = (_typed(text), f"command line --set {name}")

        nested: dict[str, dict[str, object]] = {}
        for name, (value, origin) in given.items():
            _refuse_unknown(name, origin)
            section, _, key = name.partition(".")
            nested.setdefault(section, {})[key] = value
        try:
            config = cls.model_validate(nested)
        except ValidationError as error:
            name = ".".join(str(part) for part in error.errors()[0]["loc"][:2])
            value, origin = given[name]
            shown = HIDDEN if name in SECRETS else value
            raise ConfigError(
                f"{name} ({origin})", shown, _FIELDS[name].description or ""
            ) from error
        config._origins = MappingProxyType({name: origin for name, (_, origin) in given.items()})
        return config

    def settings(self) -> Iterator[Setting]:
        """Each setting with its value and its origin, in the order of this file.

        A secret that is set shows as `HIDDEN`.
        """
        for name in NAMES:
            section, _, key = name.partition(".")
            value = getattr(getattr(self, section), key)
            if name in SECRETS and value is not None:
                value = HIDDEN
            yield Setting(name, value, self._origins.get(name, "default"))

    def inside(self, run_directory: Path) -> EsperConfig:
        """These settings with `{run}` replaced by `run_directory`, made absolute.

        Raises:
            OutputError: the directory's path can't stand in a database URL.
        """
        place = str(run_directory.resolve())
        if RUN_DIRECTORY in self.database.url and "?" in place:
            raise OutputError("output directory", place, "a path without a question mark")
        database = {"url": self.database.url.replace(RUN_DIRECTORY, place)}
        storage = {"folder": self.storage.folder.replace(RUN_DIRECTORY, place)}
        return self.model_copy(
            update={
                "database": self.database.model_copy(update=database),
                "storage": self.storage.model_copy(update=storage),
            }
        )


_FIELDS: dict[str, FieldInfo] = {
    f"{section}.{key}": field
    for section, of in EsperConfig.model_fields.items()
    if isinstance(of.annotation, type) and issubclass(of.annotation, _Section)
    for key, field in of.annotation.model_fields.items()
}

NAMES: tuple[str, ...] = tuple(_FIELDS)
"""Every setting's dotted name."""


def parse_assignments(assignments: Iterable[str]) -> dict[str, str]:
    """``["a.b=1", …]`` as typed after ``--set``, as a mapping; the last of a name wins.

    Raises:
        ConfigError: an item is not NAME=VALUE.
    """
    parsed = {}
    for assignment in assignments:
        name, sign, value = assignment.partition("=")
        if not sign or not name.strip():
            raise ConfigError("command line --set", assignment, "NAME=VALUE")
        parsed[name.strip()] = value
    return parsed


def _from_environment(variables: Mapping[str, str]) -> dict[str, tuple[object, str]]:
    given: dict[str, tuple[object, str]] = {}
    for variable in sorted(variables):
        if not variable.startswith(ENVIRONMENT_PREFIX) or _SERVICE_LINK.search(variable):
            continue
        name = variable.removeprefix(ENVIRONMENT_PREFIX).lower().replace("__", ".")
        given[name] = (_typed(variables[variable]), f"environment {variable}")
    return given


def _from_file(file: Path | None) -> dict[str, tuple[object, str]]:
    path = file if file is not None else DEFAULT_FILE
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        if file is None:
            return {}
        raise ConfigError("--config", str(path), "a file that exists") from None
    except OSError as error:
        raise ConfigError("--config", str(path), f"a file that can be read ({error})") from error
    if len(text) > MAXIMUM_FILE_BYTES:
        raise ConfigError(
            str(path), f"{len(text)} bytes", f"at most {MAXIMUM_FILE_BYTES} bytes of settings"
        )
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), str(error), "well-formed YAML") from error
    return _flattened({} if content is None else content, path)


def _flattened(content: object, path: Path) -> dict[str, tuple[object, str]]:
    if not isinstance(content, dict):
        raise ConfigError(str(path), content, "a mapping of sections to settings")
    given: dict[str, tuple[object, str]] = {}
    for section, values in content.items():
        if values is None:
            values = {}
        if section not in EsperConfig.model_fields:
            _refuse_unknown(str(section), f"file {path}")
        if not isinstance(values, dict):
            raise ConfigError(f"{section} (file {path})", values, "a mapping of settings")
        for key, value in values.items():
            given[f"{section}.{key}"] = (value, f"file {path}")
    return given


def _typed(text: str) -> object:
    """What a person typed: nothing and `null` mean None; pydantic reads numbers out of text."""
    return None if text.strip() in {"", "null"} else text


def _refuse_unknown(name: str, origin: str) -> None:
    if name not in NAMES:
        raise ConfigError(origin, name, "one of " + ", ".join(NAMES))
