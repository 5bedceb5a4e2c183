"""What Urza stores, and the one place where rows become assets."""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum
from uuid import UUID

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    DateTime,
    Dialect,
    Enum,
    ForeignKey,
    Index,
    Integer,
    String,
    Text,
    TypeDecorator,
    false,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, declared_attr, mapped_column, relationship

from esper.contracts import assets
from esper.contracts.base import utc_now
from esper.contracts.enums import BlueprintState, SessionOutcome
from esper.services.contracts import NamespaceCredentials, SessionCredentials, Stored

# SQLite's integers have 64 bits whatever they are called.
_BigInteger = BigInteger().with_variant(Integer, "sqlite")


class UtcDateTime(TypeDecorator[datetime]):
    """An aware time. SQLite keeps no offset, so UTC is what is stored everywhere."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """The time in UTC."""
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """The stored time, aware."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def _words(vocabulary: type[StrEnum]) -> Enum:
    """A column of that vocabulary's values, checked by the database."""
    return Enum(
        vocabulary,
        native_enum=False,
        create_constraint=True,
        name=vocabulary.__name__.lower(),
        values_callable=lambda words: [word.value for word in words],
    )


class Base(DeclarativeBase):
    """The tables' registry."""


class Row(Base):
    """Identity, audit times and version of every asset's row.

    `version` grows by one with every change. An archived row keeps its state; it is shown as
    archived, and lists leave it out unless it is asked for.
    """

    __abstract__ = True

    id: Mapped[UUID] = mapped_column(primary_key=True)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    updated_at: Mapped[datetime] = mapped_column(UtcDateTime, onupdate=utc_now)
    version: Mapped[int] = mapped_column(Integer, default=1, server_default=text("1"))
    archived_at: Mapped[datetime | None] = mapped_column(UtcDateTime)

    @declared_attr.directive
    @classmethod
    def __table_args__(cls) -> tuple[Index, ...]:
        """The index that pages are read along."""
        return (Index(f"ix_{cls.__tablename__}_created_at_id", "created_at", "id"),)


class Leased(Row):
    """A row that one worker at a time works on; all three are None where none does.

    Without `lease_expires_at` the claim ends only when it is given up: that of the worker in the
    hub's own process. `lease_token` outlasts the work: it says whose result was accepted.
    `attempts` are the leases so far, but for those given back for no fault of the work.
    """

    __abstract__ = True

    claimed_by: Mapped[str | None] = mapped_column(String(253))
    lease_token: Mapped[str | None] = mapped_column(String(32))
    lease_expires_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    attempts: Mapped[int] = mapped_column(Integer, default=0, server_default=text("0"))


class Blueprint(Leased):
    """A blueprint; equal content is one row, however often and under what name it is put."""

    __tablename__ = "blueprints"

    digest: Mapped[str] = mapped_column(String(64), unique=True)
    document: Mapped[dict[str, object]] = mapped_column(JSON)
    state: Mapped[BlueprintState] = mapped_column(_words(BlueprintState))
    error: Mapped[str | None] = mapped_column(Text)
    kernels: Mapped[list[CompiledKernel]] = relationship(
        back_populates="blueprint", cascade="all, delete-orphan", passive_deletes=True
    )

    @classmethod
    def of(cls, asset: assets.Blueprint) -> Blueprint:
        """The row of `asset`."""
        return cls(
            id=asset.id,
            created_at=asset.created_at,
            updated_at=asset.updated_at,
            digest=asset.digest,
            document=asset.document.to_wire(),
            state=asset.state,
            error=asset.error,
        )

    def as_asset(self) -> assets.Blueprint:
        """The row as services exchange it."""
        return assets.Blueprint.model_validate(
            {
                "id": self.id,
                "created_at": self.created_at,
                "updated_at": self.updated_at,
                "digest": self.digest,
                "document": self.document,
                "state": BlueprintState.ARCHIVED if self.archived_at else self.state,
                "error": self.error,
            }
        )

    def as_stored(self) -> Stored[assets.Blueprint]:
        """The row as services exchange it, with its version."""
        return Stored[assets.Blueprint](item=self.as_asset(), version=self.version)


class CompiledKernel(Leased):
    """A kernel that was asked for; it goes when its blueprint goes."""

    __tablename__ = "compiled_kernels"

    kernel: Mapped[str] = mapped_column(String(40), unique=True)
    blueprint_id: Mapped[UUID] = mapped_column(
        ForeignKey("blueprints.id", ondelete="CASCADE"), index=True
    )
    target: Mapped[dict[str, object]] = mapped_column(JSON)
    state: Mapped[BlueprintState] = mapped_column(_words(BlueprintState), index=True)
    artifact_digest: Mapped[str | None] = mapped_column(String(64))
    artifact_bytes: Mapped[int | None] = mapped_column(_BigInteger)
    figures: Mapped[dict[str, object] | None] = mapped_column(JSON)
    error: Mapped[str | None] = mapped_column(Text)
    blueprint: Mapped[Blueprint] = relationship(back_populates="kernels", lazy="joined")

    @classmethod
    def of(cls, asset: assets.CompiledKernel, blueprint_id: UUID) -> CompiledKernel:
        """The row of `asset`, a kernel of the blueprint in row `blueprint_id`."""
        return cls(
            id=asset.id,
            created_at=asset.created_at,
            updated_at=asset.updated_at,
            kernel=asset.kernel,
            blueprint_id=blueprint_id,
            target=asset.target.to_wire(),
            state=asset.state,
            artifact_digest=asset.artifact_digest,
            artifact_bytes=asset.artifact_bytes,
            error=asset.error,
        )

    def as_asset(self) -> assets.CompiledKernel:
        """The row as services exchange it."""
        return assets.CompiledKernel.model_validate(
            {
                "id": self.id,
                "created_at": self.created_at,
                "updated_at": self.updated_at,
                "kernel": self.kernel,
                "blueprint_digest": self.blueprint.digest,
                "blueprint": self.blueprint.document["name"],
                "target": self.target,
                "state": BlueprintState.ARCHIVED if self.archived_at else self.state,
                "artifact_digest": self.artifact_digest,
                "artifact_bytes": self.artifact_bytes,
                "error": self.error,
            }
        )

    def as_stored(self) -> Stored[assets.CompiledKernel]:
        """The row as services exchange it, with its version."""
        return Stored[assets.CompiledKernel](item=self.as_asset(), version=self.version)


class TrainingSession(Row):
    """A training session; its uid is its own within a hub, its name may be borne again."""

    __tablename__ = "training_sessions"

    name: Mapped[str] = mapped_column(String(253), index=True)
    namespace: Mapped[str] = mapped_column(String(63))
    uid: Mapped[str] = mapped_column(String(63), unique=True)
    ended_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    outcome: Mapped[SessionOutcome] = mapped_column(_words(SessionOutcome))
    epoch: Mapped[int]
    epochs: Mapped[int]
    num_layers: Mapped[int]
    num_slots: Mapped[int]
    seeds: Mapped[list[dict[str, object]]] = mapped_column(JSON)

    @classmethod
    def of(cls, asset: assets.TrainingSession) -> TrainingSession:
        """The row of `asset`."""
        return cls(
            id=asset.id,
            created_at=asset.created_at,
            updated_at=asset.updated_at,
            name=asset.name,
            namespace=asset.namespace,
            uid=asset.uid,
            ended_at=asset.ended_at,
            outcome=asset.outcome,
            epoch=asset.epoch,
            epochs=asset.epochs,
            num_layers=asset.num_layers,
            num_slots=asset.num_slots,
            seeds=[seed.to_wire() for seed in asset.seeds],
        )

    def as_asset(self) -> assets.TrainingSession:
        """The row as services exchange it."""
        return assets.TrainingSession.model_validate(
            {
                "id": self.id,
                "created_at": self.created_at,
                "updated_at": self.updated_at,
                "name": self.name,
                "namespace": self.namespace,
                "uid": self.uid,
                "ended_at": self.ended_at,
                "outcome": self.outcome,
                "epoch": self.epoch,
                "epochs": self.epochs,
                "num_layers": self.num_layers,
                "num_slots": self.num_slots,
                "seeds": self.seeds,
            }
        )

    def as_stored(self) -> Stored[assets.TrainingSession]:
        """The row as services exchange it, with its version."""
        return Stored[assets.TrainingSession](item=self.as_asset(), version=self.version)


class SessionBlueprint(Base):
    """A session uses a blueprint; it goes with either."""

    __tablename__ = "session_blueprints"

    session_id: Mapped[UUID] = mapped_column(
        ForeignKey("training_sessions.id", ondelete="CASCADE"), primary_key=True
    )
    blueprint_id: Mapped[UUID] = mapped_column(
        ForeignKey("blueprints.id", ondelete="CASCADE"), primary_key=True, index=True
    )


class SessionKernel(Base):
    """A session uses a kernel; it goes with either."""

    __tablename__ = "session_kernels"

    session_id: Mapped[UUID] = mapped_column(
        ForeignKey("training_sessions.id", ondelete="CASCADE"), primary_key=True
    )
    kernel_id: Mapped[UUID] = mapped_column(
        ForeignKey("compiled_kernels.id", ondelete="CASCADE"), primary_key=True, index=True
    )


class SessionCredential(Base):
    """That the hub made credentials for a session; the secrets themselves are kept nowhere.

    No foreign key: they are made before the session registers, and outlast its row until what
    lives in Redis is gone.
    """

    __tablename__ = "session_credentials"

    uid: Mapped[str] = mapped_column(String(63), primary_key=True)
    namespace: Mapped[str] = mapped_column(String(63), index=True)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    expires_at: Mapped[datetime] = mapped_column(UtcDateTime)
    revoked: Mapped[bool] = mapped_column(Boolean, default=False)
    removes: Mapped[bool] = mapped_column(Boolean, default=False, server_default=false())

    def as_contract(self) -> SessionCredentials:
        """The row as services exchange it."""
        return SessionCredentials(
            uid=self.uid,
            namespace=self.namespace,
            created_at=self.created_at,
            expires_at=self.expires_at,
            revoked=self.revoked,
            removes=self.removes,
        )


class NamespaceCredential(Base):
    """That the hub made credentials for a namespace's Tamiyo; the secrets are kept nowhere."""

    __tablename__ = "namespace_credentials"

    namespace: Mapped[str] = mapped_column(String(63), primary_key=True)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    expires_at: Mapped[datetime] = mapped_column(UtcDateTime)

    def as_contract(self) -> NamespaceCredentials:
        """The row as services exchange it."""
        return NamespaceCredentials(
            namespace=self.namespace, created_at=self.created_at, expires_at=self.expires_at
        )
