"""The live view on a terminal, drawn with rich."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from esper.cli import formats
from esper.cli.live import (
    SessionFacts,
    decision_line,
    measurement_cells,
    number,
    transition_line,
    whole,
)
from esper.contracts.enums import DecisionAction, SeedState
from esper.contracts.operational import SeedObservation

RECENT_LINES = 6
WIDE = 100
LAYER_NARROW, LAYER_WIDE = 11, 40
FIXED_LINES = 19
"""Lines of the view that are no seed: header, bar, figures, headings, recent lines, a margin."""

_ORDER = (
    SeedState.GRAFTING,
    SeedState.TRAINING,
    SeedState.GERMINATED,
    SeedState.FOSSILIZED,
    SeedState.CULLED,
    SeedState.DORMANT,
)


class TerminalView:
    """Redraws itself in place: header, progress, figures, seeds, what happened last.

    The frame is drawn from a thread of rich's, so that the clock moves during a long epoch; what it
    reads is replaced, never changed in place.
    """

    def __init__(self, console: Console, facts: SessionFacts) -> None:
        self._console = console
        self._facts = facts
        self._recent: deque[Text] = deque(maxlen=RECENT_LINES)
        self._first_epoch: int | None = None
        self._arrow = "->" if console.options.ascii_only else "→"
        self._ended = False
        self._live = Live(
            self,
            console=console,
            refresh_per_second=2,
            redirect_stdout=False,
            vertical_overflow="crop",
        )

    def __enter__(self) -> Self:
        self._live.start(refresh=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended = True
        self._live.stop()

    def epoch(self, metrics: Mapping[str, object]) -> None:
        """Show the epoch's figures and its seeds."""
        if self._first_epoch is None:
            self._first_epoch = (whole(metrics.get("epoch")) or 1) - 1
        self._facts.take_epoch(metrics)

    def transition(self, event: Mapping[str, object]) -> None:
        """Show the transition among the last lines and in the table."""
        self._facts.take_transition(event)
        state = str(event.get("current", ""))
        self._remember(transition_line(event, self._arrow), _style_of(state))

    def decision(self, decision: Mapping[str, object]) -> None:
        """Show the decision among the last lines, unless it is to wait."""
        if decision.get("action") != DecisionAction.WAIT:
            self._remember(decision_line(decision), "default")

    def _remember(self, line: str, style: str) -> None:
        self._recent.append(Text(line, style=style, no_wrap=True, overflow="ellipsis"))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The whole frame, at the width and height the terminal has now."""
        room = max(console.size.height - FIXED_LINES, 3)
        parts: list[RenderableType] = [
            self._header(),
            self._progress(options.max_width),
            self._figures(options),
        ]
        if self._facts.seeds:
            parts += [Text(""), self._seeds(options.max_width, room)]
        if self._recent:
            parts += [Text(""), Text("Last events", style="bold"), *self._recent]
        yield Group(*parts, fit=False)

    def _header(self) -> Table:
        facts = self._facts
        row = Table.grid(expand=True)
        row.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
        row.add_column(no_wrap=True, justify="right")
        title = Text(facts.session, style="bold")
        if facts.policy:
            title.append(f"  policy {facts.policy}", style="dim not bold")
        row.add_row(title, Text(formats.duration(facts.elapsed)))
        return row

    def _progress(self, width: int) -> Table:
        facts = self._facts
        row = Table.grid(expand=True, padding=(0, 1))
        row.add_column(no_wrap=True)
        row.add_column(ratio=1)
        row.add_column(no_wrap=True, justify="right")
        bar = ProgressBar(
            total=facts.epochs,
            completed=facts.reached,
            width=max(width - 42, 10),
            style="bright_black",
            complete_style=formats.STATE_COLOURS[SeedState.TRAINING],
            finished_style=formats.STATE_COLOURS[SeedState.FOSSILIZED],
        )
        row.add_row(Text(f"epoch {facts.reached}/{facts.epochs}"), bar, Text(self._remaining()))
        return row

    def _remaining(self) -> str:
        """The time left, from the pace of the epochs this view has seen."""
        facts = self._facts
        seen = facts.reached - (self._first_epoch or 0)
        if self._ended or seen <= 0:
            return ""
        left = (facts.epochs - facts.reached) * facts.elapsed / seen
        return f"about {formats.duration(left)} left" if facts.reached < facts.epochs else ""

    def _figures(self, options: ConsoleOptions) -> Table:
        metrics = self._facts.metrics
        pairs = [
            ("train loss", formats.figure(number(metrics.get("trainLoss")))),
            ("validation loss", formats.figure(number(metrics.get("validationLoss")))),
            (self._facts.metric_name, self._facts.metric()),
            ("parameters", self._facts.parameters(self._arrow)),
            ("compute", _compute(metrics)),
            ("health", formats.printable(metrics.get("health", formats.ABSENT))),
        ]
        columns = 3 if options.max_width >= WIDE else 2
        grid = Table.grid(padding=(0, 3, 0, 0))
        for _ in range(columns):
            grid.add_column(no_wrap=True)
            grid.add_column(no_wrap=True)
        rows = len(pairs) // columns
        for index in range(rows):
            cells: list[Text] = []
            for label, value in pairs[index::rows]:
                cells += [Text(label, style="dim"), Text(value)]
            grid.add_row(*cells)
        return grid

    def _seeds(self, width: int, room: int) -> Table:
        table = Table(
            box=box.SIMPLE_HEAD,
            show_edge=False,
            pad_edge=False,
            padding=(0, 1 if width >= WIDE else 0, 0, 0),
            expand=width < WIDE,
            title=Text("Seeds", style="bold", justify="left"),
            title_justify="left",
            title_style="",
            header_style="dim",
        )
        table.add_column("layer", no_wrap=True, overflow="ellipsis", ratio=2, min_width=8)
        table.add_column("slot", justify="right", no_wrap=True)
        table.add_column("state", no_wrap=True, min_width=12)
        table.add_column("blueprint", no_wrap=True, overflow="ellipsis", ratio=3, min_width=10)
        for name in ("alpha", "age", "gain", "at least", "rent"):
            table.add_column(name, justify="right", no_wrap=True)
        ordered = sorted(
            self._facts.seeds.values(), key=lambda seed: (_ORDER.index(seed.state), seed.layer)
        )
        for seed in ordered[:room]:
            table.add_row(*_cells(seed, LAYER_WIDE if width >= WIDE else LAYER_NARROW))
        if len(ordered) > room:
            table.add_row(Text(f"and {len(ordered) - room} more", style="dim"))
        return table


def _cells(seed: SeedObservation, layer_width: int) -> list[Text]:
    mark = Text("● ", style=_style_of(seed.state.value))
    plain = (
        formats.percent(seed.alpha, 0),
        str(seed.age_epochs),
        *measurement_cells(seed.measurement),
    )
    return [
        Text(formats.tail(formats.printable(seed.layer), layer_width)),
        Text(str(seed.slot)),
        mark.append(seed.state.value, style="default"),
        Text(formats.printable(seed.blueprint or formats.ABSENT)),
        *map(Text, plain),
    ]


def _style_of(state: str) -> str:
    """The colour of a state; the terminal's own where the text is no state."""
    return formats.STATE_COLOURS[SeedState(state)] if state in set(SeedState) else "default"


def _compute(metrics: Mapping[str, object]) -> str:
    """Training FLOPs so far, and which share of them trials took."""
    total, trials = whole(metrics.get("flops")), whole(metrics.get("flopsTrials"))
    share = f", {trials / total:.0%} trials".replace("%", " %") if total and trials else ""
    return formats.flops(total) + share
