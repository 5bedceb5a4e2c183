"""How figures, states and foreign text are shown, on the terminal and on the page alike."""

from __future__ import annotations

import math

from esper.contracts.enums import SeedState

ABSENT = "–"

STATE_COLOURS: dict[SeedState, str] = {
    SeedState.DORMANT: "#b4b8be",
    SeedState.GERMINATED: "#f0e442",
    SeedState.TRAINING: "#56b4e9",
    SeedState.GRAFTING: "#e69f00",
    SeedState.FOSSILIZED: "#009e73",
    SeedState.CULLED: "#d55e00",
}
"""One colour a state wherever a state is drawn: Okabe and Ito's set, told apart by everyone."""

FLOP_UNITS = ((1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"))


def count(value: int | None) -> str:
    """`12345` as `12,345`."""
    return ABSENT if value is None else f"{value:,}"


def flops(value: int | None) -> str:
    """Floating-point operations to three digits, in the largest unit that leaves a whole one."""
    if value is None:
        return ABSENT
    for size, unit in FLOP_UNITS:
        if value >= size:
            return f"{value / size:.3g} {unit}" if value < 1000 * size else f"{value:.2e} FLOP"
    return f"{value:,} FLOP"


def percent(share: float | None, digits: int = 1) -> str:
    """A share in [0, 1] as a percentage."""
    if share is None or not math.isfinite(share):
        return ABSENT
    return f"{share:.{digits}%}".replace("%", " %")


def figure(value: float | None, digits: int = 4) -> str:
    """A loss or another plain figure; what is not finite says so."""
    if value is None:
        return ABSENT
    return f"{value:.{digits}f}" if math.isfinite(value) else str(value)


def nats(value: float | None, digits: int = 4) -> str:
    """A contribution in nats per sample, always signed, with a true minus."""
    if value is None:
        return ABSENT
    if not math.isfinite(value):
        return str(value)
    return f"{value:+.{digits}f}".replace("-", "−")


def duration(seconds: float) -> str:
    """Seconds as `0:07`, `12:34` or `1:02:03`."""
    minutes, rest = divmod(int(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def where(layer: str | None, slot: int | None) -> str:
    """A layer and its slot as `layer[slot]`."""
    if layer is None:
        return ""
    return layer if slot is None else f"{layer}[{slot}]"


def printable(value: object) -> str:
    """`value` on one line with nothing that a terminal would obey: control characters become ?."""
    text = " ".join(str(value).split())
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def tail(text: str, limit: int) -> str:
    """The last `limit` characters: layers that differ at all differ at the end of their names."""
    return text if len(text) <= limit else "…" + text[1 - limit :]
