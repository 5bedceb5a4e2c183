"""From a packet to the analysed graph: smoothed health, its direction, and layers with problems.

Health is smoothed by an exponential moving average (EMA), because one probe batch is noisy. The
averages are the controller's only memory, and replaying a session's packets rebuilds them to the
bit. Problems inform the reasons that people read. They choose no site: in the measurements behind
this design, what a layer looks like before growth did not say where growth pays.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from esper.contracts.enums import SeedState, SystemHealth
from esper.contracts.operational import (
    GraphTopology,
    HealthSignal,
    LayerNode,
    ModelGraphState,
    ProblemLayer,
    SystemStatePacket,
)

__all__ = ["GraphTopology", "LayerNode", "ModelGraphAnalyzer"]

LOW_HEALTH = 0.4
"""Below it a layer is critical, as `SystemHealth` has it."""
LOW_RANK = 0.1
"""Share of its width that a layer's output spans, below which its width is wasted."""
MANY_DEAD = 0.5
"""Share of output units that never rise above zero."""
VANISHING_RATIO = 1e-5
"""Gradient over weight norm below which a layer as good as stands still."""
EXPLODING_RATIO = 1.0
"""Gradient over weight norm above which one step could replace the weights."""
FALLING_TREND = -0.02
"""Smoothed health lost an epoch."""

KEPT_SESSIONS = 256
KEPT_EPOCHS = 256

ACTIVE_STATES = frozenset({SeedState.GERMINATED, SeedState.TRAINING, SeedState.GRAFTING})
"""The states in which a seed holds one of the session's active seats."""


@dataclass(frozen=True)
class _Memory:
    """The averages after an epoch's first packet; loss is None until a finite one came."""

    sequence: int = -1
    epoch: int = 0
    health: Mapping[str, float] = field(default_factory=dict)
    loss: float | None = None


class ModelGraphAnalyzer:
    """Smooths health per layer and session, and names the layers with problems.

    An average moves as `decay · before + (1 - decay) · now` with the first packet of an epoch; a
    trend is the average's change an epoch. The packets that follow at the same epoch, one after
    each decision that was carried out, move nothing: their measurements are those of the first.

    A packet with a sequence number seen before is analysed from the averages before it, so a
    redelivered packet changes nothing and a trainer that went back to a checkpoint is followed
    there. At most `KEPT_EPOCHS` steps back are remembered, for `KEPT_SESSIONS` sessions.
    """

    def __init__(self, decay: float = 0.7) -> None:
        """Args: `decay` in [0, 1), the weight of the past.

        Raises:
            ValueError: `decay` is outside of [0, 1).
        """
        if not 0 <= decay < 1:
            raise ValueError(f"decay: got {decay}; allowed: at least 0 and below 1")
        self.decay = decay
        self._sessions: OrderedDict[tuple[str, str], deque[_Memory]] = OrderedDict()

    def analyze(self, packet: SystemStatePacket, scope: str = "") -> ModelGraphState:
        """The graph of `packet` with smoothed health, trends and problem layers.

        `scope` tells apart sessions of one name: the uid of the packet's.

        A layer without a signal keeps its average, and has health 0 before its first signal: a
        measurement that is missing counts against a layer. `loss_trend` is the change an epoch of
        the smoothed validation loss in nats, infinite while that loss is not finite.
        """
        before, now = self._remembered(packet, scope)
        signals = {signal.layer: signal for signal in packet.signals}
        elapsed = max(packet.epoch - before.epoch, 1)
        topology = _topology(packet, now.health, before, elapsed)
        problems = tuple(
            ProblemLayer(layer=node.name, reason="; ".join(found))
            for node in topology.nodes
            if (found := _findings(node, signals.get(node.name)))
        )
        scores = [now.health[node.name] for node in topology.nodes if node.name in now.health]
        return ModelGraphState(
            session=packet.session,
            epoch=packet.epoch,
            topology=topology,
            problems=problems,
            health=(SystemHealth.of(sum(scores) / len(scores)) if scores else SystemHealth.OFFLINE),
            loss_trend=_loss_trend(packet, before, now, elapsed),
        )

    def _remembered(self, packet: SystemStatePacket, scope: str) -> tuple[_Memory, _Memory]:
        """The averages before the packet's epoch, and those at it."""
        session = (scope, packet.session)
        past = self._sessions.setdefault(session, deque(maxlen=KEPT_EPOCHS))
        self._sessions.move_to_end(session)
        if len(self._sessions) > KEPT_SESSIONS:
            self._sessions.popitem(last=False)
        while past and past[-1].sequence >= packet.sequence:
            past.pop()
        if past and past[-1].epoch == packet.epoch:
            return (past[-2] if len(past) > 1 else _Memory()), past[-1]
        before = past[-1] if past else _Memory()
        past.append(now := self._moved(before, packet))
        return before, now

    def _moved(self, before: _Memory, packet: SystemStatePacket) -> _Memory:
        """The averages once the packet's measurements are in."""
        health = dict(before.health)
        for signal in packet.signals:
            health[signal.layer] = self._smooth(
                before.health.get(signal.layer), signal.health_score()
            )
        loss = before.loss
        if math.isfinite(packet.validation_loss):
            loss = self._smooth(before.loss, packet.validation_loss)
        return _Memory(sequence=packet.sequence, epoch=packet.epoch, health=health, loss=loss)

    def _smooth(self, before: float | None, now: float) -> float:
        return now if before is None else self.decay * before + (1 - self.decay) * now


def _loss_trend(packet: SystemStatePacket, before: _Memory, now: _Memory, elapsed: int) -> float:
    if not math.isfinite(packet.validation_loss):
        return math.inf
    if before.loss is None or now.loss is None:
        return 0.0
    return (now.loss - before.loss) / elapsed


def _topology(
    packet: SystemStatePacket, health: Mapping[str, float], before: _Memory, elapsed: int
) -> GraphTopology:
    """Nodes in the packet's layer order; edges that name an unknown layer are left out."""
    active = Counter(seed.layer for seed in packet.seeds if seed.state in ACTIVE_STATES)
    nodes = tuple(
        LayerNode(
            name=layer.name,
            kind=layer.kind,
            parameters=layer.parameters,
            health=health.get(layer.name, 0.0),
            trend=(
                (health[layer.name] - before.health[layer.name]) / elapsed
                if layer.name in before.health
                else 0.0
            ),
            active_seeds=active[layer.name],
        )
        for layer in packet.layers
    )
    index = {node.name: position for position, node in enumerate(nodes)}
    edges = tuple(
        (index[producer], index[consumer])
        for producer, consumer in packet.edges
        if producer in index and consumer in index
    )
    return GraphTopology(nodes=nodes, edges=edges)


def _findings(node: LayerNode, signal: HealthSignal | None) -> list[str]:
    """What is wrong with a layer, in clauses that continue its name."""
    if signal is None:
        return ["sent no health signal"]
    ratio, rank, dead = (
        signal.gradient_to_weight_ratio,
        signal.activation_rank,
        signal.dead_fraction,
    )
    measured = (signal.gradient_norm, signal.gradient_variance, ratio, rank, dead)
    checks = (
        (not all(map(math.isfinite, measured)), "sent measurements that are not finite"),
        (ratio < VANISHING_RATIO, f"has a vanishing gradient ({ratio:.1e} of its weights)"),
        (
            EXPLODING_RATIO < ratio < math.inf,
            f"has an exploding gradient ({ratio:.1f} times its weights)",
        ),
        (rank < LOW_RANK, f"uses {rank:.0%} of its rank"),
        (MANY_DEAD < dead < math.inf, f"has {dead:.0%} of its units dead"),
        (node.health < LOW_HEALTH, f"has a health of {node.health:.2f}"),
        (node.trend < FALLING_TREND, f"loses {-node.trend:.2f} of its health an epoch"),
    )
    return [clause for holds, clause in checks if holds]
