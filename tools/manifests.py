"""Manifests as the tools change them before they apply them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from esper.contracts.manifests import load_manifest


def session_document(manifest: Path) -> dict[str, Any]:
    """The TrainingSession of a manifest as it was written, without the defaults.

    Raises:
        BadInput: the manifest can't be read, or is refused.
    """
    load_manifest(manifest)
    documents = yaml.safe_load_all(manifest.read_text())
    found: dict[str, Any] = next(
        each for each in documents if each and each["kind"] == "TrainingSession"
    )
    return found
