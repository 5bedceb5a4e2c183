"""What can go wrong between the operator and the API server; parts of Esper's one error tree.

EsperError
├── WorkFailed
│   └── ApiRefused          the API server says no, and would say it again: 400, 403, 404, 422, …
│       ├── ApiNotFound     there is no such object, or no such kind
│       ├── ApiConflict     the object was changed, or made, by somebody else meanwhile
│       └── NotOurs         an object of that name is there, and somebody else's
└── Unavailable
    ├── ApiUnavailable      no answer, no answer in time, or one that asks to come again
    └── LeaseLost           this process may not write any more; it ends
"""

from __future__ import annotations

from esper.errors import Unavailable, WorkFailed


class ApiRefused(WorkFailed):
    """The API server refuses a request.

    `status` is the HTTP status, `reason` the word that the API server gives, as in Invalid or
    Forbidden, `said` its message.
    """

    def __init__(self, what: str, status: int, reason: str, said: str) -> None:
        self.status = status
        self.reason = reason
        self.said = said
        super().__init__(f"{what}: the API server refuses it with {status} {reason}: {said}")


class ApiNotFound(ApiRefused):
    """No such object, or no such kind."""


class ApiConflict(ApiRefused):
    """The object is another one, or another version, than the request is about."""


class NotOurs(ApiRefused):
    """An object of a child's name exists that the operator has not made for that parent."""

    def __init__(self, what: str) -> None:
        allowed = "none of that name, or the operator's own: rename or delete it"
        super().__init__(
            what, 409, "AlreadyExists", f"it exists and is not ours; allowed: {allowed}"
        )


class ApiUnavailable(Unavailable):
    """The API server gives no answer, or asks to be asked again later."""


class LeaseLost(Unavailable):
    """The lease is another's, or could not be renewed in time."""
