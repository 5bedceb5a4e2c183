"""Sample hosts: what a new blueprint is compiled for before any session asks for it."""

from __future__ import annotations

from esper.contracts.blueprints import BlueprintDocument, KernelTarget, LayerGeometry, lower
from esper.errors import BlueprintError

_WIDE, _NARROW, _SIDE = 64, 32, 8


def _target(layer: LayerGeometry, given: tuple[int, ...], back: tuple[int, ...]) -> KernelTarget:
    return KernelTarget(layer=layer, input_shape=given, output_shape=back)


SAMPLES: tuple[KernelTarget, ...] = (
    _target(LayerGeometry(kind="Linear", inputs=_WIDE, outputs=_NARROW), (_WIDE,), (_NARROW,)),
    _target(LayerGeometry(kind="Linear", inputs=_WIDE, outputs=_WIDE), (_WIDE,), (_WIDE,)),
    _target(
        LayerGeometry(kind="Conv1d", inputs=_WIDE, outputs=_WIDE, kernel_size=(3,), padding=(1,)),
        (_WIDE, _SIDE),
        (_WIDE, _SIDE),
    ),
    _target(
        LayerGeometry(
            kind="Conv2d", inputs=_WIDE, outputs=_WIDE, kernel_size=(3, 3), padding=(1, 1)
        ),
        (_WIDE, _SIDE, _SIDE),
        (_WIDE, _SIDE, _SIDE),
    ),
    _target(LayerGeometry(kind="LayerNorm", inputs=_WIDE, outputs=_WIDE), (_WIDE,), (_WIDE,)),
    _target(
        LayerGeometry(kind="BatchNorm2d", inputs=_WIDE, outputs=_WIDE),
        (_WIDE, _SIDE, _SIDE),
        (_WIDE, _SIDE, _SIDE),
    ),
    _target(
        LayerGeometry(kind="Embedding", inputs=_WIDE, outputs=_NARROW), (_SIDE,), (_SIDE, _NARROW)
    ),
)


def sample_targets(document: BlueprintDocument) -> tuple[KernelTarget, ...]:
    """The sample hosts that `document` fits; none for one that needs what no sample has.

    A blueprint for hosts of one width, or that widens a traced producer, may fit none of them and
    is judged where a session asks for it.
    """
    return tuple(target for target in SAMPLES if _fits(document, target))


def _fits(document: BlueprintDocument, target: KernelTarget) -> bool:
    if target.layer.kind not in document.hosts:
        return False
    try:
        lower(document, target)
    except BlueprintError:
        return False
    return True
