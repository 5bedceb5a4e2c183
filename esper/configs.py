"""Esper's own settings, and where each of them came from. The one file that reads the environment.

A setting has one name in all four places that can give it, the strongest first:

1. the command line: ``--set database.pool_size=8`` (some also have an option of their own),
2. the environment: ``ESPER_DATABASE__POOL_SIZE=8``,
3. the file: ``esper.yaml`` in the working directory, or the one that ``--config`` names. Of a
   folder that is its ``esper.yaml`` and, stronger, each file that is called as a setting is:
   ``database.url`` holds that one alone, as Kubernetes mounts the keys of a Secret,
4. the defaults below.

What a *session* does (model, data, training, growth) stands in its manifest, never here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from pydantic import PrivateAttr, ValidationError
from pydantic.fields import FieldInfo

from esper.config_sections import (
    LOG_NAMES,
    RUN_DIRECTORY,
    ComponentConfig,
    DatabaseConfig,
    HubConfig,
    LogLevel,
    OperatorConfig,
    RedisConfig,
    Section,
    StorageConfig,
    TezzeretConfig,
    TolariaConfig,
    UrzaConfig,
    parse_levels,
)
from esper.errors import ConfigError, ManifestError, OutputError
from esper.utils.documents import read_documents

__all__ = [
    "DEFAULT_FILE",
    "ENVIRONMENT_PREFIX",
    "HIDDEN",
    "LOG_NAMES",
    "MAXIMUM_FILE_BYTES",
    "NAMES",
    "RUN_DIRECTORY",
    "SECRETS",
    "TORCHRUN",
    "ComponentConfig",
    "DatabaseConfig",
    "EsperConfig",
    "HubConfig",
    "LogLevel",
    "OperatorConfig",
    "RedisConfig",
    "Setting",
    "StorageConfig",
    "TezzeretConfig",
    "TolariaConfig",
    "UrzaConfig",
    "launch_environment",
    "parse_assignments",
    "parse_levels",
    "rank_of_process",
    "torchrun_variables",
    "without_password",
]

ENVIRONMENT_PREFIX = "ESPER_"
IGNORED_VARIABLES = frozenset({"ESPER_CLUSTER_STATE"})
"""Of that prefix, and no settings: for `make cluster`, whose shell may call `esper`, too."""
DEFAULT_FILE = Path("esper.yaml")

TORCHRUN = MappingProxyType(
    {
        "processes": ("PET_NPROC_PER_NODE",),
        "nodes": ("PET_NNODES",),
        "node_rank": ("PET_NODE_RANK", "JOB_COMPLETION_INDEX"),
        "rendezvous": ("PET_RDZV_ENDPOINT",),
        "rendezvous_id": ("PET_RDZV_ID",),
        "local_address": ("PET_LOCAL_ADDR",),
        "restarts": ("PET_MAX_RESTARTS",),
    }
)
"""What places a node among others, with the variables that give it, the strongest first: torchrun's
own, which other operators set too, and the Indexed Job's. Options of `esper worker` beat them. They
differ from pod to pod and come from a cluster, not from a person, so they are no settings."""

MAXIMUM_FILE_BYTES = 64 * 2**10

# Kubernetes gives every pod variables for the Services of its namespace; one of a Service called
# "esper-…" begins like a setting without being one.
_SERVICE_LINK = re.compile(r"_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP)(_\w+)?)?)$")


SECRETS = frozenset(
    {"hub.token", "urza.signing_key", "urza.admin_token", "storage.secret_access_key"}
)
"""The settings whose values are never shown."""

HIDDEN = "(not shown)"
_YAML = "well-formed YAML"

# A user and its password, which may hold anything, in what follows a scheme.
_USER = re.compile(r"(?P<user>[^:/?#@]*):(?P<password>.*)@", re.DOTALL)
_OPTION = re.compile(r"\?[^@]*=")


def without_password(url: str) -> str:
    """`url` as people may see it: "***" for a password after the user, and for the whole query.

    Drivers take a password in the query too, under names that may be escaped. Who writes a
    password may have escaped nothing in it; where its end can't be told, nothing after it shows.
    """
    scheme, sign, rest = url.partition("://")
    if not sign:
        return url
    given = _USER.match(rest)
    if given and _OPTION.search(given["password"]):
        return f"{scheme}://{given['user']}:***"
    user = "" if given is None else f"{given['user']}:***@"
    place = rest if given is None else rest[given.end() :]
    shown = re.split(r"[?#]", place, maxsplit=1)[0]
    return f"{scheme}://{user}{shown}{'' if shown == place else '?***'}"


def _shown(name: str, value: object) -> object:
    """The value of that setting as people may see it."""
    if name in SECRETS and value is not None:
        return HIDDEN
    if isinstance(value, list | dict):
        value = repr(value)
    return without_password(value) if isinstance(value, str) else value


@dataclass(frozen=True)
class Setting:
    """One setting as `esper doctor` shows it."""

    name: str
    value: object
    origin: str


class EsperConfig(Section):
    """Every setting, frozen. `load` reads them; the bare constructor gives the defaults."""

    database: DatabaseConfig = DatabaseConfig()
    hub: HubConfig = HubConfig()
    urza: UrzaConfig = UrzaConfig()
    redis: RedisConfig = RedisConfig()
    storage: StorageConfig = StorageConfig()
    tezzeret: TezzeretConfig = TezzeretConfig()
    tolaria: TolariaConfig = TolariaConfig()
    operator: OperatorConfig = OperatorConfig()
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
            file: the settings file, or a folder of them; None means `esper.yaml` where there is
                one.
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
            raise ConfigError(
                f"{name} ({origin})", _shown(name, value), _FIELDS[name].description or ""
            ) from error
        config._origins = MappingProxyType({name: origin for name, (_, origin) in given.items()})
        return config

    def settings(self) -> Iterator[Setting]:
        """Each setting with its value and its origin, in the order of this file.

        A secret that is set shows as `HIDDEN`, a URL without its password.
        """
        for name in NAMES:
            section, _, key = name.partition(".")
            value = getattr(getattr(self, section), key)
            yield Setting(name, _shown(name, value), self._origins.get(name, "default"))

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
    if isinstance(of.annotation, type) and issubclass(of.annotation, Section)
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
            named = re.match(r"[\w.]{1,64}", assignment)  # what follows may be a secret
            came = f"{named[0]} without a value" if named else "no name"
            raise ConfigError("command line --set", came, "NAME=VALUE")
        parsed[name.strip()] = value
    return parsed


def torchrun_variables(
    environment: Mapping[str, str] | None = None,
) -> dict[str, tuple[str, str]]:
    """What a cluster has set for this node: names of `TORCHRUN` to text and its origin."""
    variables = os.environ if environment is None else environment
    return {
        name: (variables[variable], f"environment {variable}")
        for name, candidates in TORCHRUN.items()
        for variable in reversed(candidates)
        if variables.get(variable, "").strip()
    }


def launch_environment(
    processes: int, environment: Mapping[str, str] | None = None
) -> dict[str, str]:
    """The variables of a torchrun that gets all that it needs as options.

    Those that it would read besides are left out. Where nothing else is set, several processes do
    not take every core each, and torch does not tell every lost connection with a C++ trace.
    """
    variables = os.environ if environment is None else environment
    kept = {name: text for name, text in variables.items() if not name.startswith("PET_")}
    threads = {"OMP_NUM_THREADS": "1"} if processes > 1 else {}
    return {"TORCH_CPP_LOG_LEVEL": "ERROR"} | threads | kept


def rank_of_process(environment: Mapping[str, str] | None = None) -> int:
    """This process' rank, as torchrun has told it.

    Raises:
        ConfigError: torchrun has not started this process.
    """
    variables = os.environ if environment is None else environment
    text = variables.get("RANK", "")
    if not text.isdecimal():
        raise ConfigError("environment RANK", text, "a rank's number, as torchrun sets it")
    return int(text)


def _from_environment(variables: Mapping[str, str]) -> dict[str, tuple[object, str]]:
    given: dict[str, tuple[object, str]] = {}
    for variable in sorted(variables):
        name = variable.removeprefix(ENVIRONMENT_PREFIX).lower().replace("__", ".")
        linked = name not in NAMES and _SERVICE_LINK.search(variable)
        if not variable.startswith(ENVIRONMENT_PREFIX) or linked or variable in IGNORED_VARIABLES:
            continue
        given[name] = (_typed(variables[variable]), f"environment {variable}")
    return given


def _from_file(file: Path | None) -> dict[str, tuple[object, str]]:
    if file is None:
        return _from_yaml(DEFAULT_FILE) if DEFAULT_FILE.exists() else {}
    return _from_folder(file) if file.is_dir() else _from_yaml(file)


def _from_folder(folder: Path) -> dict[str, tuple[object, str]]:
    """Its `esper.yaml`, and what its files say that are called as settings are."""
    try:
        # Kubernetes keeps what it mounts behind names that begin with a dot.
        paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise ConfigError("--config", str(folder), f"one that can be read ({error})") from error
    given: dict[str, tuple[object, str]] = {}
    for path in paths:
        if path.name == DEFAULT_FILE.name:
            given = _from_yaml(path) | given
        else:
            _refuse_unknown(path.name, f"folder {folder}")
            given[path.name] = (_typed(_text_of(path, "UTF-8").strip()), f"file {path}")
    return given


def _text_of(path: Path, allowed: str) -> str:
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError("--config", str(path), "a file that exists") from None
    except OSError as error:
        raise ConfigError("--config", str(path), f"a file that can be read ({error})") from error
    if len(text) > MAXIMUM_FILE_BYTES:
        raise ConfigError(
            str(path), f"{len(text)} bytes", f"at most {MAXIMUM_FILE_BYTES} bytes of settings"
        )
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(str(path), f"{error.reason} at byte {error.start}", allowed) from None


def _from_yaml(path: Path) -> dict[str, tuple[object, str]]:
    text = _text_of(path, _YAML)
    try:
        documents = read_documents(text, str(path), quoting=False)
    except ManifestError as error:  # without its cause, which quotes lines that may hold secrets
        raise ConfigError(error.field, error.came, f"{_YAML}: {error.allowed}") from None
    if len(documents) > 1:
        raise ConfigError(str(path), f"{len(documents)} documents", "one")
    return _flattened(documents[0].data if documents else {}, path)


def _flattened(content: object, path: Path) -> dict[str, tuple[object, str]]:
    if not isinstance(content, dict):
        raise ConfigError(str(path), _kind(content), "a mapping of sections to settings")
    given: dict[str, tuple[object, str]] = {}
    for section, values in content.items():
        if values is None:
            values = {}
        if section not in EsperConfig.model_fields:
            _refuse_unknown(str(section), f"file {path}")
        if not isinstance(values, dict):
            raise ConfigError(f"{section} (file {path})", _kind(values), "a mapping of settings")
        for key, value in values.items():
            given[f"{section}.{key}"] = (value, f"file {path}")
    return given


def _kind(value: object) -> str:
    """What a value is, to be said where the value itself may be a secret."""
    kinds = {str: "a text", bool: "true or false", int: "a number", float: "a number"}
    return kinds.get(type(value), "a list")


def _typed(text: str) -> object:
    """What a person typed: nothing and `null` mean None; pydantic reads numbers out of text."""
    return None if text.strip() in {"", "null"} else text


def _refuse_unknown(name: str, origin: str) -> None:
    if name not in NAMES:
        raise ConfigError(origin, name, "one of " + ", ".join(NAMES))
