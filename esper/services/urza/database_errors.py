"""What goes wrong beneath Urza's tables, in Esper's words."""

from __future__ import annotations

import re
import sqlite3

from sqlalchemy import URL
from sqlalchemy.exc import DataError, DBAPIError, SQLAlchemyError

from esper.configs import without_password
from esper.errors import BadInput, ConfigError, EsperError, HubUnavailable, StorageFull, one_line

# A connection that can't be made raises the system's own errors; a number beyond 64 bits is
# refused by Python's SQLite before SQLAlchemy sees it.
DRIVER_ERRORS = (SQLAlchemyError, OSError, OverflowError)
"""What SQLAlchemy and the drivers raise. TimeoutError is an OSError."""

_UNUSABLE = (TypeError, ValueError, OverflowError)
# SQLSTATEs, by their names in Postgres's manual, appendix A.
_DISK_FULL = "53100"
_REFUSED = {
    "28000": "a user that Postgres lets in from here",
    "28P01": "a user with the right password",
    "3D000": "a database that exists",
    "42501": "a user that may use and make Urza's tables",
}
_DATA = "22"  # the class of values that do not fit


def translated(error: BaseException, url: URL) -> EsperError:
    """One of DRIVER_ERRORS, as one line that names `database.url` without its password.

    ConfigError, StorageFull and BadInput are permanent; all else is HubUnavailable.
    """
    state = sqlstate(error)
    if state in _REFUSED:
        return ConfigError("database.url", shown_url(url), _REFUSED[state])
    cause = error.orig if isinstance(error, DBAPIError) else error
    full = getattr(cause, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
    if full or state == _DISK_FULL:
        return StorageFull("Urza's database: no room left where it writes")
    if isinstance(error, (DataError, OverflowError)) or (state or "").startswith(_DATA):
        return BadInput("value", one_line(str(cause)), "text without NUL, numbers in range")
    return HubUnavailable(f"Urza's database does not answer: {_reason(cause)} (database.url)")


def unusable(error: BaseException, url: URL) -> ConfigError | None:
    """What is wrong with `url` where a driver refused it before it asked any server, else None.

    What the driver says may quote what stands in the query, so only an option's name is told.
    """
    causes = [error, getattr(error, "orig", None)]
    causes += [cause.__cause__ for cause in causes if cause is not None]
    refusal = next((cause for cause in causes if isinstance(cause, _UNUSABLE)), None)
    if refusal is None:
        return None
    option = re.search(r"unexpected keyword argument '(\w+)'", str(refusal))
    rule = "a port up to 65535 and options with values that the driver takes"
    if option is not None:
        rule = f"options that the driver takes; {option[1]} is none"
    return ConfigError("database.url", shown_url(url), rule)


def shown_url(url: URL) -> str:
    """`url` without its secrets."""
    return without_password(url.render_as_string(hide_password=False))


def sqlstate(error: BaseException | None) -> str | None:
    """Postgres's code for what went wrong, wherever in the chain the driver left it."""
    while error is not None:
        for carrier in (error, getattr(error, "orig", None)):
            state = getattr(carrier, "sqlstate", None)
            if isinstance(state, str):
                return state
        error = error.__cause__
    return None


def _reason(cause: BaseException | None) -> str:
    # Some errors say nothing in words, a TimeoutError for one.
    return one_line(str(cause) or type(cause).__name__)
