"""The report's figures, drawn with matplotlib: SVG for the page, one PNG for a paper or a README.

Every `draw_` function draws one run onto given axes, so that the page and the PNG show the same.
Figures are made without pyplot: nothing global is touched.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING

from esper.cli import formats
from esper.cli.report_drawing import (
    INK,
    MUTED,
    PAPER,
    TRAIN,
    TRIALS,
    VALIDATION,
    drawing,
    to_svg,
)
from esper.cli.run_record import EpochRecord, Life, RunRecord, Span
from esper.contracts.enums import SeedState

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANEL = (5.3, 2.6)
WIDE = 10.8
LANE_INCHES = 0.36
MAX_LANES = 48
MAX_LAYERS = 24
LABEL_POINTS = 7.5


def page_plots(run: RunRecord) -> dict[str, str]:
    """The page's figures by name, as SVG text ready to stand inside HTML.

    Returns:
        `metric`, `loss`, `parameters`, `compute`, and `lives` and `health` where the run has any;
        nothing for a run of which no epoch has ended.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    if not run.rows:
        return {}
    with drawing():
        panels: dict[str, Callable[[Axes, RunRecord], None]] = {
            "metric": draw_metric,
            "loss": draw_loss,
            "parameters": draw_parameters,
            "compute": draw_compute,
        }
        plots = {name: _panel(name, draw, run) for name, draw in panels.items()}
        if run.lives:
            plots["lives"] = _lives_figure(run)
        if healths_of(run):
            plots["health"] = _health_figure(run)
    return plots


def growth_png(run: RunRecord) -> bytes:
    """Accuracy, parameters and the seeds' lives over the epochs, as one PNG.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    with drawing() as new_figure:
        lanes = len(lanes_of(run))
        heights = [2.3, 1.5, 0.35 + LANE_INCHES * max(lanes, 1)]
        figure = new_figure(figsize=(8.6, sum(heights) + 1.4))
        figure.set_layout_engine("constrained", h_pad=0.09, w_pad=0.09)
        figure.set_facecolor("white")
        axes = figure.subplots(3, 1, sharex=True, height_ratios=heights)
        draw_metric(axes[0], run)
        draw_parameters(axes[1], run)
        draw_lives(axes[2], run)
        axes[2].set_title("Seeds")
        for upper in axes[:2]:
            upper.set_xlabel("")
            upper.tick_params(labelbottom=False)
        figure.suptitle(_headline(run), x=0.02, ha="left", fontsize=12, fontweight="bold")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=160, metadata={"Software": None})
    return buffer.getvalue()


def _headline(run: RunRecord) -> str:
    """The session's name, and where the run has ended its accuracy on the test set."""
    name = formats.printable(run.name)
    tested = run.result.accuracy if run.result and run.classification else None
    return name if tested is None else f"{name}: {formats.percent(tested)} test accuracy"


def draw_metric(axes: Axes, run: RunRecord) -> None:
    """Validation metric over epochs, with a line where a seed became part of the model."""
    name = "Validation accuracy" if run.classification else "Validation metric"
    axes.set_title(name)
    _line(axes, run.rows, lambda row: row.validation_metric, VALIDATION, name)
    if run.classification:
        from matplotlib.ticker import PercentFormatter

        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    _finish(axes, run)


def draw_loss(axes: Axes, run: RunRecord) -> None:
    """Training and validation loss over epochs."""
    axes.set_title("Loss")
    _line(axes, run.rows, lambda row: row.train_loss, TRAIN, "training", style="--")
    _line(axes, run.rows, lambda row: row.validation_loss, VALIDATION, "validation")
    axes.legend(loc="upper right")
    _finish(axes, run)


def draw_parameters(axes: Axes, run: RunRecord) -> None:
    """Parameters over epochs: those the model began with, and what has grown on top."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_title("Parameters")
    epochs = [row.epoch for row in run.rows]
    now = [row.parameters for row in run.rows]
    base = run.parameters_base or (now[0] if now else 0)
    axes.fill_between(
        epochs, base, now, step="pre", color=formats.STATE_COLOURS[SeedState.FOSSILIZED], alpha=0.25
    )
    axes.step(epochs, now, where="pre", color=INK, linewidth=1.4)
    axes.axhline(base, color=MUTED, linewidth=0.8, linestyle=":")
    axes.set_ylim(0, max([*now, base, 1]) * 1.12)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{int(value):,}"))
    _finish(axes, run)


def draw_compute(axes: Axes, run: RunRecord) -> None:
    """Cumulative training FLOPs, split into the model's own and those of trials."""
    axes.set_title("Cumulative training FLOPs")
    last = max(run.rows[-1].flops, 1)
    scale, unit = next(
        ((size, unit) for size, unit in formats.FLOP_UNITS if last >= size), (1.0, "FLOP")
    )
    epochs = [row.epoch for row in run.rows]
    total = [row.flops / scale for row in run.rows]
    model = [(row.flops - min(row.flops_trials, row.flops)) / scale for row in run.rows]
    share = min(run.rows[-1].flops_trials, last) / last
    axes.fill_between(
        epochs,
        model,
        total,
        color=TRIALS,
        alpha=0.75,
        linewidth=0,
        label=f"trials ({formats.percent(share, 0)})",
    )
    axes.fill_between(epochs, 0, model, color=VALIDATION, alpha=0.45, linewidth=0, label="model")
    axes.set_ylim(bottom=0)
    axes.set_ylabel(unit)
    axes.legend(loc="upper left")
    _finish(axes, run)


def lanes_of(run: RunRecord) -> list[tuple[str, int]]:
    """The (layer, slot) pairs that get a lane, in the order of execution, at most `MAX_LANES`.

    Layers where nothing was tried have a lane as well while there is room for them.
    """
    used = {(life.layer, life.slot) for life in run.lives}
    lanes = [
        lane
        for layer in run.layers
        for lane in sorted(pair for pair in used if pair[0] == layer) or [(layer, 0)]
    ]
    if len(lanes) > MAX_LANES:
        lanes = [lane for lane in lanes if lane in used]
    return lanes[:MAX_LANES]


def draw_lives(axes: Axes, run: RunRecord) -> None:
    """Each slot's lane over the epochs, coloured by the state of its seed, named by trial."""
    from matplotlib.patches import Patch, Rectangle

    lanes = lanes_of(run)
    axes.grid(False)
    axes.grid(True, axis="x")
    axes.set_yticks(
        range(len(lanes)),
        [formats.tail(formats.printable(formats.where(layer, slot)), 26) for layer, slot in lanes],
    )
    axes.set_ylim(len(lanes) - 0.4, -0.7)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    for row in range(len(lanes)):
        axes.axhline(row, color=formats.STATE_COLOURS[SeedState.DORMANT], linewidth=0.8, zorder=1)
    shown = [life for life in run.lives if (life.layer, life.slot) in lanes]
    for life in shown:
        row = lanes.index((life.layer, life.slot))
        for index, span in enumerate(life.spans):
            patch = Rectangle(
                *_bar(span, row),
                facecolor=formats.STATE_COLOURS[span.state],
                edgecolor=PAPER,
                linewidth=0.6,
                zorder=2,
            )
            patch.set_gid(f"life-{life.number}-{index}")
            axes.add_patch(patch)
        axes.text(
            life.started,
            row - 0.24,
            _label(life, shown, axes, run),
            fontsize=LABEL_POINTS,
            va="bottom",
            ha="left",
            zorder=3,
        )
    states = {span.state for life in shown for span in life.spans}
    handles = [
        Patch(facecolor=colour, label=state.value)
        for state, colour in formats.STATE_COLOURS.items()
        if state in states or state is SeedState.DORMANT
    ]
    axes.legend(
        handles=handles,
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        ncols=6,
        handlelength=1.1,
        handleheight=0.9,
        columnspacing=1.2,
        borderaxespad=0.2,
    )
    _finish(axes, run, marks=False)


def _bar(span: Span, row: int) -> tuple[tuple[float, float], float, float]:
    """A span's corner, width and height; the embargo after a cull is thin, as nothing lives."""
    width = max(span.end - span.start, 0.3)
    if span.state is SeedState.CULLED:
        return (span.start, row - 0.03), width, 0.14
    return (span.start, row - 0.17), width, 0.42


def _label(life: Life, lives: list[Life], axes: Axes, run: RunRecord) -> str:
    """The trial's number, with the blueprint's name where the lane has room for it."""
    figure = axes.get_figure(root=True)
    inches = figure.get_size_inches()[0] if figure is not None else WIDE
    points_per_epoch = 0.84 * inches * 72 / max(run.epochs, 1)
    same_lane = [
        other.started for other in lives if (other.layer, other.slot) == (life.layer, life.slot)
    ]
    until = min((start for start in same_lane if start > life.started), default=run.epochs)
    room = (until - life.started) * points_per_epoch
    full = formats.printable(f"{life.number} {life.blueprint}")
    return full if len(full) * LABEL_POINTS * 0.6 <= room else str(life.number)


def _panel(name: str, draw: Callable[[Axes, RunRecord], None], run: RunRecord) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=PANEL, layout="constrained")
    draw(figure.subplots(), run)
    return to_svg(figure, name, {})


def _lives_figure(run: RunRecord) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDE, 0.9 + LANE_INCHES * len(lanes_of(run))), layout="constrained")
    draw_lives(figure.subplots(), run)
    titles = {
        f"life-{life.number}-{index}": (
            f"trial {life.number}: {life.blueprint} at {formats.where(life.layer, life.slot)}, "
            f"{span.state.value}, epochs {span.start} to {span.end}"
        )
        for life in run.lives
        for index, span in enumerate(life.spans)
    }
    return to_svg(figure, "lives", titles)


def healths_of(run: RunRecord) -> dict[str, list[tuple[int, float]]]:
    """Each layer's (epoch, health score) pairs, the least healthy `MAX_LAYERS` of them."""
    healths: dict[str, list[tuple[int, float]]] = {layer: [] for layer in run.layers}
    for row in run.rows:
        for layer in row.layers:
            if layer.health_score is not None and layer.layer in healths:
                healths[layer.layer].append((row.epoch, layer.health_score))
    told = {layer: pairs for layer, pairs in healths.items() if pairs}
    worst = sorted(told, key=lambda layer: min(score for _, score in told[layer]))[:MAX_LAYERS]
    return {layer: pairs for layer, pairs in told.items() if layer in worst}


def _health_figure(run: RunRecord) -> str:
    from matplotlib.figure import Figure

    healths = healths_of(run)
    columns = min(4, max(len(healths), 3))
    rows = -(-len(healths) // columns)
    figure = Figure(figsize=(WIDE, 0.2 + 1.7 * rows))
    figure.set_layout_engine("constrained", wspace=0.06)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat[len(healths) :]:
        axes.set_visible(False)
    for axes, (layer, pairs) in zip(grid.flat, healths.items(), strict=False):
        axes.set_title(formats.tail(formats.printable(layer), 28), fontsize=9)
        for bound in (0.4, 0.7):
            axes.axhline(bound, color=MUTED, linewidth=0.7, linestyle=":")
        axes.plot(*zip(*pairs, strict=True), color=VALIDATION, linewidth=1.4)
        axes.set_ylim(0, 1.02)
        axes.set_yticks([0, 0.4, 0.7, 1.0])
        axes.grid(False)
        axes.set_xlim(0, run.epochs)
        axes.tick_params(labelbottom=True)
        _mark_fossils(axes, run, layer)
    return to_svg(figure, "health", {})


def _line(
    axes: Axes,
    rows: tuple[EpochRecord, ...],
    value: Callable[[EpochRecord], float | None],
    colour: str,
    label: str,
    style: str = "-",
) -> None:
    """A line over epochs; gaps where a value is missing."""
    nan = float("nan")
    values = [nan if (found := value(row)) is None else found for row in rows]
    axes.plot([row.epoch for row in rows], values, style, color=colour, label=label)


def _mark_fossils(axes: Axes, run: RunRecord, layer: str | None = None) -> None:
    """A vertical line where a seed (of one layer) became part of the model."""
    for life in run.lives:
        if life.state is SeedState.FOSSILIZED and layer in (None, life.layer):
            axes.axvline(
                life.spans[-1].start,
                color=formats.STATE_COLOURS[SeedState.FOSSILIZED],
                linewidth=1.1,
                zorder=1,
            )


def _finish(axes: Axes, run: RunRecord, marks: bool = True) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(0, max(run.epochs, 1))
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
    if marks:
        _mark_fossils(axes, run)
