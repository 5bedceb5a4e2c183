"""What Urza stores, and the one place where rows become assets."""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum
from uuid import UUID

from sqlalchemy import JSON, DateTime, Dialect, Enum, ForeignKey, String, Text, TypeDecorator
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from esper.contracts import assets
from esper.contracts.base import utc_now
from esper.contracts.enums import BlueprintState, SessionOutcome


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


class _Row(Base):
    """Identity and audit times of every row."""

    __abstract__ = True

    id: Mapped[UUID] = mapped_column(primary_key=True)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    updated_at: Mapped[datetime] = mapped_column(UtcDateTime, onupdate=utc_now)


class Blueprint(_Row):
    """A blueprint; equal content is one row, however often and under what name it is put."""

    __tablename__ = "blueprints"

    digest: Mapped[str] = mapped_column(String(64), unique=True)
    document: Mapped[dict[str, object]] = mapped_column(JSON)
    state: Mapped[BlueprintState] = mapped_column(_words(BlueprintState))
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
                "state": self.state,
            }
        )


class CompiledKernel(_Row):
    """A kernel that was asked for; it goes when its blueprint goes."""

    __tablename__ = "compiled_kernels"

    kernel: Mapped[str] = mapped_column(String(40), unique=True)
    blueprint_id: Mapped[UUID] = mapped_column(
        ForeignKey("blueprints.id", ondelete="CASCADE"), index=True
    )
    target: Mapped[dict[str, object]] = mapped_column(JSON)
    state: Mapped[BlueprintState] = mapped_column(_words(BlueprintState), index=True)
    claimed_by: Mapped[str | None] = mapped_column(String(253))
    artifact_digest: Mapped[str | None] = mapped_column(String(64))
    artifact_bytes: Mapped[int | None]
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
                "state": self.state,
                "artifact_digest": self.artifact_digest,
                "artifact_bytes": self.artifact_bytes,
                "error": self.error,
            }
        )


class TrainingSession(_Row):
    """A training session; its name is its own within a hub."""

    __tablename__ = "training_sessions"

    name: Mapped[str] = mapped_column(String(253), unique=True)
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
                "outcome": self.outcome,
                "epoch": self.epoch,
                "epochs": self.epochs,
                "num_layers": self.num_layers,
                "num_slots": self.num_slots,
                "seeds": self.seeds,
            }
        )
