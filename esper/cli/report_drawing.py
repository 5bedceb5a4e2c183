"""How the report's figures are drawn: colours, matplotlib's settings, and SVG fit for the page.

Figures hold no date and no random name, so that equal runs give equal bytes. Colours become CSS
variables on the page, which has a light and a dark set of them.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any

from esper.cli.formats import STATE_COLOURS
from esper.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, MUTED, GRID, PAPER = "#21242a", "#6b7079", "#e3e5e8", "#fdfdfc"
VALIDATION, TRAIN, TRIALS = "#0072b2", "#8a8f98", "#cc79a7"

VARIABLES: dict[str, str] = {
    INK: "ink",
    MUTED: "muted",
    GRID: "rule",
    PAPER: "paper",
    VALIDATION: "validation",
    TRAIN: "train",
    TRIALS: "trials",
    **{colour: f"state-{state.value}" for state, colour in STATE_COLOURS.items()},
}
"""The CSS variable of every colour that a plot may use."""

_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "esper",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "text.parse_math": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.7,
    "lines.solid_capstyle": "round",
}


@contextmanager
def drawing() -> Iterator[type[Figure]]:
    """The figure class, under the report's style.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "report", "matplotlib is not installed", "an installation of esper[report]"
        ) from error
    with mpl.rc_context(rc=_STYLE):
        yield Figure


def to_svg(figure: Figure, name: str, titles: dict[str, str]) -> str:
    """The figure as an SVG element for HTML: own ids, CSS variables for colours, titled parts."""
    buffer = io.StringIO()
    figure.patch.set_visible(False)
    for axes in figure.axes:
        axes.patch.set_visible(False)
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg [^>]*?) ?width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg [^>]*?) ?height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    for gid, title in titles.items():
        text = text.replace(f'<g id="{gid}">', f'<g id="{gid}"><title>{escape(title)}</title>')
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{name}-", text)
    return re.sub(r"#[0-9a-f]{6}\b", _variable, text)


def _variable(match: re.Match[str]) -> str:
    colour = match.group(0)
    return f"var(--{VARIABLES[colour]})" if colour in VARIABLES else colour
