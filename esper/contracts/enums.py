"""The controlled vocabulary. Values are what goes over the wire and into status."""

from __future__ import annotations

from enum import StrEnum


class SeedState(StrEnum):
    """Where a seed is in its life; `execution.SeedLifecycleState` is the integer twin."""

    DORMANT = "dormant"
    GERMINATED = "germinated"
    TRAINING = "training"
    GRAFTING = "grafting"
    FOSSILIZED = "fossilized"
    CULLED = "culled"


class BlueprintState(StrEnum):
    """Where a blueprint is on its way from a proposal to use."""

    PROPOSED = "proposed"
    COMPILING = "compiling"
    VALIDATING = "validating"
    CHARACTERIZED = "characterized"
    DEPLOYED = "deployed"
    FAILED = "failed"
    ARCHIVED = "archived"


class SystemHealth(StrEnum):
    """The model's mean health score, in words: ≥ 0.7, ≥ 0.4, below; offline when nothing comes."""

    HEALTHY = "healthy"
    DEGRADED = "degraded"
    CRITICAL = "critical"
    OFFLINE = "offline"

    @classmethod
    def of(cls, score: float) -> SystemHealth:
        """The word for a health score in [0, 1]."""
        if score >= 0.7:
            return cls.HEALTHY
        return cls.DEGRADED if score >= 0.4 else cls.CRITICAL


class ComponentType(StrEnum):
    """The system's components."""

    TAMIYO = "tamiyo"
    KARN = "karn"
    KASMINA = "kasmina"
    TEZZERET = "tezzeret"
    URABRASK = "urabrask"
    TOLARIA = "tolaria"
    URZA = "urza"
    OONA = "oona"
    NISSA = "nissa"
    SIMIC = "simic"
    EMRAKUL = "emrakul"


class DecisionAction(StrEnum):
    """What the controller can ask for at an interval boundary."""

    WAIT = "wait"
    GERMINATE = "germinate"
    GRAFT = "graft"
    CULL = "cull"


class ControllerPolicy(StrEnum):
    """The decision policies a session can name."""

    HEURISTIC = "heuristic"
    PERIODIC = "periodic"
    RANDOM = "random"
    NONE = "none"


class SessionOutcome(StrEnum):
    """How a session stands, as the summary condition's reason would say."""

    RUNNING = "Running"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"
    INTERRUPTED = "Interrupted"
