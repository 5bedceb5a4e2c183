"""The settings file of a pod: where the hub and the bus are, and what opens them.

Secrets reach pods in this file alone, which the command reads with `--config`: never in arguments,
and never in the environment, which every process of the pod and many a trace would show.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

from esper.utils.documents import write_document
from esper_operator.children.pods import SETTINGS_FOLDER
from esper_operator.options import Options

SETTINGS_FILE = "esper.yaml"
TOKEN_FILE = "hub-token"
MANIFEST_FILE = "session.yaml"


def redis_url(url: str, username: str | None, password: str | None) -> str:
    """`url` with that user in place of any other; without a user as it is."""
    if username is None:
        return url
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    user = f"{quote(username, safe='')}:{quote(password or '', safe='')}"
    return urlunsplit(parts._replace(netloc=f"{user}@{host}"))


def settings_files(
    options: Options,
    *,
    namespace: str,
    token: str,
    username: str | None = None,
    password: str | None = None,
    bus: bool = True,
) -> dict[str, str]:
    """The files by name; without `bus` for a pod that only talks to the hub.

    The token has a file of its own, which is read for each request: it may be renewed while the
    pod runs.
    """
    sections: dict[str, dict[str, Any]] = {
        "hub": {"url": options.hub_url, "token_file": f"{SETTINGS_FOLDER}/{TOKEN_FILE}"},
        "component": {"log_level": options.log_level},
    }
    if bus:
        sections["redis"] = {
            "url": redis_url(options.redis_url, username, password),
            "namespace": namespace,
        }
    return {SETTINGS_FILE: write_document(sections), TOKEN_FILE: token}


def connection_of(options: Options) -> dict[str, str]:
    """What of the options such a file depends on: it is written anew where this changes."""
    return {
        "hub": options.hub_url,
        "redis": options.redis_url,
        "logLevel": options.log_level,
    }
