"""One session at one moment, as all of its policies look at it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from esper.contracts.operational import SessionSnapshot
from esper.contracts.resources import TrainingSessionSpec, TrainingSessionStatus
from esper_operator.children import names
from esper_operator.observed import Observed
from esper_operator.options import Options
from esper_operator.pod_view import PodView
from esper_operator.status import changed
from esper_operator.views import JobView, SessionView


@dataclass(frozen=True)
class Scene:
    """What is observed, read with the spec.

    `record` is the status as decided so far, `before` as it was.
    """

    observed: Observed
    spec: TrainingSessionSpec
    record: TrainingSessionStatus
    options: Options
    before: TrainingSessionStatus

    def recorded(self, **fields: object) -> Scene:
        """The scene with other values in the status."""
        return replace(self, record=changed(self.record, **fields))

    @property
    def session(self) -> SessionView:
        """The session."""
        return self.observed.session

    @property
    def now(self) -> float:
        """The time of the decision."""
        return self.observed.now

    @cached_property
    def jobs(self) -> tuple[JobView, ...]:
        """All Jobs of this session and of no other that had its name, the oldest attempt first."""
        own = (job for job in self.observed.jobs if job.session_uid == self.session.uid)
        return tuple(sorted(own, key=lambda job: (job.attempt, job.created)))

    @property
    def job(self) -> JobView | None:
        """The Job of the attempt; one that is being deleted is none."""
        attempt = self.record.attempt
        return next((j for j in self.jobs if j.attempt == attempt and not j.deleting), None)

    @property
    def job_name(self) -> str:
        """What the Job of the attempt is, or will be, called."""
        return names.job(self.session.name, self.session.uid, self.record.attempt)

    @cached_property
    def pods(self) -> tuple[PodView, ...]:
        """All pods of this session, in the order of their index."""
        own = (pod for pod in self.observed.pods if pod.session_uid == self.session.uid)
        workers = (pod for pod in own if pod.role == "worker")
        return tuple(sorted(workers, key=lambda pod: (pod.index, pod.created, pod.name)))

    def pods_of(self, job: JobView) -> tuple[PodView, ...]:
        """The pods that a Job has made."""
        return tuple(pod for pod in self.pods if pod.job_uid == job.uid)

    def living(self, job: JobView) -> dict[int, PodView]:
        """Those of them that work or may come to work, by index."""
        return {pod.index: pod for pod in self.pods_of(job) if pod.alive}

    @property
    def snapshot(self) -> SessionSnapshot | None:
        """The newest report of the attempt; what an earlier one says of itself is past."""
        snapshot = self.observed.snapshot
        if snapshot is None or snapshot.attempt != self.record.attempt:
            return None
        return snapshot
