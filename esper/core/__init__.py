"""Making a PyTorch model able to grow, and an ordinary one again."""

from esper.core.model_wrapper import LayerSelection, MorphableModel, unwrap, wrap
from esper.core.morphology import Morphology

__all__ = ["LayerSelection", "MorphableModel", "Morphology", "unwrap", "wrap"]
