"""What the API server holds, as last heard: projections, and who owns what.

Events may come late and twice, and the answers to writes come beside them. So each object is kept
with its version: an older one never replaces a newer one, and what was deleted does not come back
by an answer that was on its way.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, TypeVar

from esper_operator.children import names
from esper_operator.kinds import (
    BLUEPRINT,
    DEPLOYMENT,
    JOB,
    KERNEL,
    MENDED,
    NETWORK_POLICY,
    POD,
    SECRET,
    SEED,
    SERVICE,
    SESSION,
    Kind,
)
from esper_operator.ownership import ownership
from esper_operator.pod_view import PodView
from esper_operator.views import (
    BlueprintView,
    DeploymentView,
    JobView,
    KernelView,
    MetaView,
    Said,
    SessionView,
)
from esper_operator.work import Key

Object = Mapping[str, Any]
View = SessionView | JobView | PodView | DeploymentView | BlueprintView | KernelView | MetaView
AView = TypeVar("AView", JobView, PodView, DeploymentView, MetaView)
Name = tuple[str, str]
"""Namespace and name."""

NAMESPACE = "Namespace"
"""Kind of the keys for what the sessions of a namespace share."""
_REMEMBERED_DELETIONS = 20_000

_VIEWS: Mapping[str, Callable[[Object], View]] = MappingProxyType(
    {
        SESSION.name: SessionView.of,
        BLUEPRINT.name: BlueprintView.of,
        KERNEL.name: KernelView.of,
        JOB.name: JobView.of,
        POD.name: PodView.of,
        DEPLOYMENT.name: DeploymentView.of,
        SERVICE.name: MetaView.of,
        SECRET.name: MetaView.of,
        NETWORK_POLICY.name: MetaView.of,
        SEED.name: MetaView.of,
    }
)


class Store:
    """For one event loop."""

    def __init__(self) -> None:
        self._views: dict[str, dict[Name, View]] = {kind: {} for kind in _VIEWS}
        self._versions: dict[str, dict[Name, tuple[str, int]]] = {kind: {} for kind in _VIEWS}
        self._children: dict[str, dict[tuple[str, Name], View]] = {}
        self._kernel_of_job: dict[str, Key] = {}
        self._name_of_session: dict[str, Name] = {}
        self._pod_refusals: dict[str, Said] = {}
        self._applied: dict[tuple[str, Name], tuple[str, str]] = {}
        """Uid and mark of ownership of children as this process has last applied them."""
        self._deleted: OrderedDict[str, None] = OrderedDict()

    # What is heard

    def put(self, kind: Kind, found: Object, *, applied: bool = False) -> tuple[Key, ...]:
        """Take an object as it is now; the keys that it concerns, none where it is old news.

        `applied` says that it is the answer to an apply. A child that somebody else has changed
        since counts as made of something else than the operator's manifest: it has no digest.
        """
        meta = found["metadata"]
        uid, version = meta["uid"], _version(meta)
        name = (meta["namespace"], meta["name"])
        held = self._versions[kind.name].get(name)
        newest = held[1] if held and held[0] == uid else -1
        if uid in self._deleted or (newest >= version and not applied):
            return ()
        changed = kind in MENDED and self._is_changed(kind, found, applied=applied)
        if newest > version or (newest == version and kind not in MENDED):
            return ()
        view = _VIEWS[kind.name]({**found, "kind": kind.name})  # lists and metadata say another
        if changed and isinstance(view, MetaView | DeploymentView):
            view = replace(view, digest="")
        before = self._views[kind.name].get(name)
        if before is not None:
            self._unlink(kind, name, before)
        self._views[kind.name][name] = view
        self._versions[kind.name][name] = (uid, version)
        self._link(kind, name, view)
        return tuple(dict.fromkeys((*self._concerned(kind, view), *self._concerned(kind, before))))

    def drop(self, kind: Kind, found: Object) -> tuple[Key, ...]:
        """An object is gone; the keys that this concerns."""
        meta = found["metadata"]
        return self.drop_uid(kind, (meta["namespace"], meta["name"]), meta["uid"])

    def drop_uid(self, kind: Kind, name: Name, uid: str) -> tuple[Key, ...]:
        """The object of that name and uid is gone; the keys that this concerns."""
        self._deleted[uid] = None
        if len(self._deleted) > _REMEMBERED_DELETIONS:
            self._deleted.popitem(last=False)
        held = self._versions[kind.name].get(name)
        if held is None or held[0] != uid:
            return ()
        del self._versions[kind.name][name]
        self._applied.pop((kind.name, name), None)
        view = self._views[kind.name].pop(name)
        keys = self._concerned(kind, view)
        self._unlink(kind, name, view)
        self._pod_refusals.pop(uid, None)
        return keys

    def refuse_pods(self, namespace: str, job: str, said: Said) -> tuple[Key, ...]:
        """No pods can be made of a Job, which says why; the keys that this concerns."""
        view = self.job(namespace, job)
        if view is None or self._pod_refusals.get(view.uid) == said:
            return ()
        self._pod_refusals[view.uid] = said
        return self._concerned(JOB, view)

    # What is asked

    def pod_refusal(self, job: JobView) -> Said | None:
        """Why no pods can be made of a Job; None: nothing was heard."""
        return self._pod_refusals.get(job.uid)

    def session(self, namespace: str, name: str) -> SessionView | None:
        """The session of that name."""
        return self._views[SESSION.name].get((namespace, name))  # type: ignore[return-value]

    def session_of_uid(self, uid: str) -> SessionView | None:
        """The session of that uid."""
        name = self._name_of_session.get(uid)
        return None if name is None else self.session(*name)

    def blueprint(self, namespace: str, name: str) -> BlueprintView | None:
        """The blueprint of that name."""
        return self._views[BLUEPRINT.name].get((namespace, name))  # type: ignore[return-value]

    def kernel(self, namespace: str, name: str) -> KernelView | None:
        """The compiled kernel of that name."""
        return self._views[KERNEL.name].get((namespace, name))  # type: ignore[return-value]

    def job(self, namespace: str, name: str) -> JobView | None:
        """The Job of that name."""
        return self._views[JOB.name].get((namespace, name))  # type: ignore[return-value]

    def job_of_kernel(self, namespace: str, kernel: str) -> JobView | None:
        """The Job that compiles a kernel."""
        return self.job(namespace, names.compile_job(kernel))

    def deployment(self, namespace: str, name: str) -> DeploymentView | None:
        """The Deployment of that name."""
        return self._views[DEPLOYMENT.name].get((namespace, name))  # type: ignore[return-value]

    def meta(self, kind: Kind, namespace: str, name: str) -> MetaView | None:
        """The Service, Secret, NetworkPolicy or Seed of that name."""
        return self._views[kind.name].get((namespace, name))  # type: ignore[return-value]

    def own(self, kind: Kind, namespace: str, name: str, session_uid: str) -> str | None:
        """The uid of the object of that name, if it was made for that session, or for none."""
        view = self._views[kind.name].get((namespace, name))
        if view is None or getattr(view, "session_uid", "") != session_uid:
            return None
        return view.uid

    def sessions(self, namespace: str | None = None) -> Iterator[SessionView]:
        """The sessions of a namespace, or all."""
        return self._of_kind(SESSION, namespace)  # type: ignore[return-value]

    def blueprints(self, namespace: str) -> Iterator[BlueprintView]:
        """The blueprints of a namespace."""
        return self._of_kind(BLUEPRINT, namespace)  # type: ignore[return-value]

    def kernels(self, namespace: str) -> Iterator[KernelView]:
        """The compiled kernels of a namespace."""
        return self._of_kind(KERNEL, namespace)  # type: ignore[return-value]

    def children(self, session_uid: str, of: type[AView]) -> tuple[AView, ...]:
        """What was made for a session, of those that are looked at as `of`."""
        views = self._children.get(session_uid, {}).values()
        return tuple(view for view in views if isinstance(view, of))

    def pods_of(self, job_uid: str) -> tuple[PodView, ...]:
        """The pods of the Job of a compilation."""
        return self.children(job_uid, PodView)

    def held(self, kind: Kind, namespace: str | None) -> Mapping[Name, tuple[str, int]]:
        """Uid and version of each object of a kind, of a namespace or of all."""
        versions = self._versions[kind.name]
        if namespace is None:
            return dict(versions)
        return {name: held for name, held in versions.items() if name[0] == namespace}

    def version(self, kind: Kind, namespace: str, name: str) -> tuple[str, int] | None:
        """Uid and version of an object, as held now; None: there is none."""
        return self._versions[kind.name].get((namespace, name))

    def deleted(self, uid: str) -> bool:
        """Whether an object of that uid was heard to be gone, not long ago."""
        return uid in self._deleted

    def everything(self) -> Iterator[Key]:
        """Everything that can be reconciled."""
        for kind in (SESSION, BLUEPRINT, KERNEL):
            for namespace, name in self._views[kind.name]:
                yield Key(kind.name, namespace, name)
        # Also where no session is left: what they shared may be.
        shared = [view for kind in (DEPLOYMENT, SECRET) for view in self._of_kind(kind, None)]
        sessions = {namespace for namespace, _ in self._views[SESSION.name]}
        own = {
            view.namespace
            for view in shared
            if not self._owner(view) and not getattr(view, "kernel", "")
        }
        for namespace in sessions | own:
            yield Key(NAMESPACE, namespace, "")

    def _of_kind(self, kind: Kind, namespace: str | None) -> Iterator[View]:
        for (of, _), view in self._views[kind.name].items():
            if namespace is None or of == namespace:
                yield view

    def _is_changed(self, kind: Kind, found: Object, *, applied: bool) -> bool:
        """Whether somebody else has changed a child since it was applied.

        Of one that this process has not applied: whether somebody else has any of its content.
        """
        meta, (mark, others) = found["metadata"], ownership(found)
        place = kind.name, (meta["namespace"], meta["name"])
        if applied:
            self._applied[place] = meta["uid"], mark
            return False
        uid, known = self._applied.get(place, ("", ""))
        return others if uid != meta["uid"] else mark != known

    def _owner(self, view: View) -> str:
        """The uid that a view is listed under: of its session, or of the Job of a compilation."""
        if isinstance(view, PodView) and view.role == COMPILE:
            return view.job_uid
        return str(getattr(view, "session_uid", ""))

    def _link(self, kind: Kind, name: Name, view: View) -> None:
        owner = self._owner(view)
        if owner:
            self._children.setdefault(owner, {})[kind.name, name] = view
        if isinstance(view, SessionView):
            self._name_of_session[view.uid] = name
        if isinstance(view, JobView) and view.kernel:
            self._kernel_of_job[view.uid] = Key(KERNEL.name, view.namespace, view.kernel)

    def _unlink(self, kind: Kind, name: Name, view: View) -> None:
        owner = self._owner(view)
        siblings = self._children.get(owner)
        if siblings is not None:
            siblings.pop((kind.name, name), None)
            if not siblings:
                del self._children[owner]
        if isinstance(view, SessionView):
            self._name_of_session.pop(view.uid, None)
        if isinstance(view, JobView):
            self._kernel_of_job.pop(view.uid, None)

    def _concerned(self, kind: Kind, view: View | None) -> tuple[Key, ...]:
        if view is None:
            return ()
        namespace = view.namespace
        if isinstance(view, SessionView):
            return Key(kind.name, namespace, view.name), Key(NAMESPACE, namespace, "")
        if isinstance(view, BlueprintView):
            return (Key(kind.name, namespace, view.name),)
        if isinstance(view, KernelView):
            return (
                Key(kind.name, namespace, view.name),
                Key(BLUEPRINT.name, namespace, view.blueprint),
            )
        if isinstance(view, JobView | MetaView) and view.kernel:
            return (Key(KERNEL.name, namespace, view.kernel),)
        if isinstance(view, PodView) and view.role == COMPILE:
            key = self._kernel_of_job.get(view.job_uid)
            return () if key is None else (key,)
        if view.session:
            return (Key(SESSION.name, namespace, view.session),)
        return (Key(NAMESPACE, namespace, ""),)


COMPILE = "compile"
"""The role of Jobs and pods that compile a kernel."""


def version_of(found: Object) -> tuple[str, int]:
    """Uid and version of an object."""
    return found["metadata"]["uid"], _version(found["metadata"])


def _version(meta: Object) -> int:
    """The version as a number: the API server's own order of an object's versions."""
    text = str(meta.get("resourceVersion", ""))
    return int(text) if text.isdecimal() else 0
