"""Which namespaces an operator serves, and how the API server is asked for those alone.

Two operators that served one namespace would both make its sessions' children, each with addresses
and credentials of its own hub.
"""

from __future__ import annotations

from dataclasses import dataclass

from esper.configs import OperatorConfig
from esper.errors import ConfigError
from esper_operator.kinds import Kind, selecting


@dataclass(frozen=True)
class Scope:
    """The namespaces of `served`; where there are none the whole cluster but for `excluded`."""

    served: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()

    @classmethod
    def of(cls, settings: OperatorConfig) -> Scope:
        """That of the settings.

        Raises:
            ConfigError: they name namespaces to serve, and others to leave out.
        """
        served = tuple(filter(None, settings.namespaces.split(",")))
        excluded = tuple(filter(None, settings.excluded_namespaces.split(",")))
        if served and excluded:
            raise ConfigError(
                "operator.excluded_namespaces",
                settings.excluded_namespaces,
                "nothing beside operator.namespaces, which name all that are served",
            )
        return cls(served, excluded)

    @property
    def places(self) -> tuple[str | None, ...]:
        """Where to list and to watch; None is everywhere, with `fields`."""
        return self.served or (None,)

    @property
    def fields(self) -> str:
        """The field selector that leaves out what is excluded; empty: nothing is."""
        return ",".join(f"metadata.namespace!={name}" for name in self.excluded)

    def has(self, namespace: str) -> bool:
        """Whether a namespace is served."""
        return namespace in self.served if self.served else namespace not in self.excluded

    def selecting(self, kind: Kind) -> dict[str, str]:
        """The selectors with which objects of a kind are listed and watched."""
        return selecting(kind) | ({"fieldSelector": self.fields} if self.fields else {})
