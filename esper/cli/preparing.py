"""What comes before a session trains: its manifest checked, its model and data built.

Nothing is written here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

from esper.configs import EsperConfig
from esper.contracts.assets import TrainingSession
from esper.contracts.blueprints import CATALOGUE, BlueprintDocument
from esper.contracts.manifests import (
    Manifest,
    load_manifest,
    select_blueprints,
    session_document,
)
from esper.core.compilation import compile_blocks
from esper.core.model_wrapper import LayerSelection, MorphableModel, wrap
from esper.errors import ManifestError
from esper.services.tolaria.checkpoint_places import StorageAddress
from esper.services.tolaria.config import TolariaConfig
from esper.services.tolaria.data import Datasets
from esper.services.tolaria.entrypoints import (
    build_datasets,
    build_model,
    build_objective,
    check_fit,
    check_training,
    make_importable,
)
from esper.services.tolaria.growth import refuse_misfit
from esper.services.tolaria.objective import Objective
from esper.services.tolaria.ways import shards_of

SOURCE_ANNOTATION = "esper.dev/source"
"""On a run's own manifest: the folder of the manifest it was started with."""

UID_ANNOTATION = "esper.dev/uid"
"""On a run's own manifest: the session's uid, where no cluster gave it one."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A session that was checked and built, with nothing written yet."""

    manifest: Manifest
    config: TolariaConfig
    documents: tuple[BlueprintDocument, ...]
    datasets: Datasets
    objective: Objective
    model: MorphableModel
    folder: Path
    uid: str

    def asset(self) -> TrainingSession:
        """The session as the hub registers it."""
        namespace = self.manifest.session.metadata.namespace
        fields: dict[str, Any] = {} if namespace is None else {"namespace": namespace}
        return TrainingSession(
            name=self.config.session,
            uid=self.uid,
            epochs=self.config.training.epochs,
            num_layers=len(self.model.morphology.layers),
            num_slots=self.config.growth.seeds_per_layer,
            **fields,
        )


def validate_file(path: Path, config: EsperConfig) -> dict[str, Any]:
    """`esper validate FILE`: what `run` would check, and what it would train."""
    del config  # every setting was checked when it was read
    prepared = prepare(load_manifest(path), path.parent)
    morphology = prepared.model.morphology
    return {
        "session": prepared.config.session,
        "parametersBase": sum(p.numel() for p in prepared.model.parameters()),
        "samples": {
            name: len(getattr(prepared.datasets, name)) for name in ("train", "validation", "test")
        },
        "layers": list(morphology.layers),
        "refused": dict(morphology.refused),
        "blueprints": [document.name for document in prepared.documents],
    }


def prepare(
    manifest: Manifest,
    folder: Path,
    device: torch.device | None = None,
    *,
    processes: int = 1,
) -> Prepared:
    """Check and build everything a session needs; modules beside the manifest are found.

    The model goes to `device`; by default it stays where its entry point puts it. `processes` of
    them train the session.

    Raises:
        BadInput: anything a person wrote can't be used.
    """
    _refuse_unserved(manifest)
    uri = manifest.session.spec.storage.uri
    if uri is not None:
        StorageAddress.parse(uri)  # refuses what is no address
    selector = manifest.session.spec.growth.blueprints
    documents = tuple(select_blueprints(selector, CATALOGUE, manifest.blueprints))
    config = TolariaConfig.from_resource(manifest.session)
    torch.set_num_threads(config.training.threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    make_importable(folder)
    datasets = build_datasets(config)
    model = build_model(config)
    if device is not None:
        model = model.to(device)
    objective = build_objective(config, datasets)
    inputs, _ = check_fit(model, datasets, objective)
    shards = shards_of(config.training, processes, len(datasets.train))
    check_training(model, datasets, config.training, shards)
    wrapped = wrap(
        model,
        tuple(inputs) if isinstance(inputs, list) else inputs,
        layers=LayerSelection(
            types=config.growth.layers.types,
            include=config.growth.layers.include or ("*",),
            exclude=config.growth.layers.exclude,
        ),
        seeds_per_layer=config.growth.seeds_per_layer,
    )
    if config.training.compile:
        compile_blocks(wrapped)
    selected = {document.name: document for document in documents}
    for blueprint in manifest.blueprints:
        document = selected.get(blueprint.metadata.name)
        if document is not None:
            builtin = blueprint.spec.builtin is not None
            refuse_misfit(document, wrapped.morphology, builtin=builtin)
    return Prepared(
        manifest=manifest,
        config=config,
        documents=documents,
        datasets=datasets,
        objective=objective,
        model=wrapped,
        folder=folder,
        uid=uid_of(manifest),
    )


def own_manifest(prepared: Prepared) -> str:
    """The manifest as the run keeps it: every default written out, and where it came from."""
    session = prepared.manifest.session
    annotations = dict(session.metadata.annotations) | {
        SOURCE_ANNOTATION: str(prepared.folder.resolve()),
        UID_ANNOTATION: prepared.uid,
    }
    metadata = session.metadata.model_copy(update={"annotations": annotations})
    own = session.model_copy(update={"metadata": metadata})
    return "---\n".join(map(session_document, (own, *prepared.manifest.blueprints)))


def uid_of(manifest: Manifest) -> str:
    """The session's uid: the cluster's, that of the run that is resumed, or a new one."""
    metadata = manifest.session.metadata
    return metadata.uid or metadata.annotations.get(UID_ANNOTATION) or str(uuid4())


def _refuse_unserved(manifest: Manifest) -> None:
    """Refuse what this version can't do, rather than train something else than was asked for."""
    training = manifest.session.spec.training
    if training.checkpoint.resume_from is not None:
        raise ManifestError(
            "spec.training.checkpoint.resumeFrom",
            training.checkpoint.resume_from,
            "nothing; this version resumes a run with: esper run --resume D",
        )
