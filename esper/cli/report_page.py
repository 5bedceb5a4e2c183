"""The report of a run: `report.html`, one file that needs nothing else, and `growth.png`."""

from __future__ import annotations

import contextlib
import errno
import os
from itertools import groupby
from pathlib import Path

from esper.cli import formats
from esper.cli.report_html import (
    Html,
    code,
    details,
    element,
    join,
    paragraph,
    plot,
    section,
    state,
    table,
    text,
)
from esper.cli.report_plots import growth_png, healths_of, page_plots
from esper.cli.report_style import PAGE, STYLE
from esper.cli.report_summary import key_figures, kicker, lead
from esper.cli.run_reading import read_run
from esper.cli.run_record import DecisionRecord, GrownPart, Life, RunRecord
from esper.contracts.enums import DecisionAction, SeedState
from esper.errors import OutputError, StorageFull

PAGE_FILE = "report.html"
PICTURE_FILE = "growth.png"


def write_report(run_dir: Path) -> None:
    """Write `report.html` and `growth.png` into a run's directory, whole or not at all.

    The run may be over, under way, or interrupted. Equal directories give equal bytes.

    Raises:
        OutputError: `run_dir` is missing or is no run, or can't be written.
        StorageFull: the disk has no room for the files.
        ConfigError: matplotlib is not installed.
    """
    run = read_run(run_dir)
    page = page_of(run).encode()
    picture = growth_png(run)
    _replace(run_dir / PICTURE_FILE, picture)
    _replace(run_dir / PAGE_FILE, page)


def page_of(run: RunRecord) -> str:
    """The report as one HTML document."""
    plots = page_plots(run)
    parts = [
        element("header", join([kicker(run), element("h1", run.name), lead(run)], "\n")),
        key_figures(run),
        _course(run, plots),
        _grown(run.grown, run),
        _trials(run.lives),
        _decisions(run),
        _refused(run),
        _health(run, plots),
        _loading(run),
        section(
            "Manifest",
            details(
                "The manifest as the run took it", element("pre", element("code", run.manifest))
            ),
        ),
    ]
    body = join((part for part in parts if part), "\n")
    return PAGE.substitute(title=text(f"{run.name} · Esper"), style=STYLE, body=body)


def _course(run: RunRecord, plots: dict[str, str]) -> Html:
    if not plots:
        return section("Course of the run", paragraph("No epoch has ended yet."))
    metric = "accuracy" if run.classification else "metric"
    panels = [
        plot(plots["metric"], f"Validation {metric} over epochs"),
        plot(plots["loss"], "Training and validation loss over epochs"),
        plot(plots["parameters"], "Number of parameters over epochs"),
        plot(plots["compute"], "Cumulative training FLOPs, the share of trials apart"),
    ]
    parts: list[object] = [element("div", join(panels, "\n"), class_="plots")]
    if run.grown:
        parts.append(
            paragraph(
                "A green line marks the epoch in which a seed became part of the model.",
                class_="aside",
            )
        )
    if "lives" in plots:
        parts += [
            element("h3", "The life of each seed"),
            plot(
                plots["lives"],
                "Lanes of layers over epochs, coloured by the state of their seed",
                "One lane a slot, layers in the order in which they run. A trial bears its number"
                " in the table below, and its blueprint where the lane has room.",
            ),
        ]
    return section("Course of the run", *parts)


def _grown(grown: tuple[GrownPart, ...], run: RunRecord) -> Html:
    if not grown:
        return section(
            "What grew",
            paragraph(
                "Nothing: no seed has passed its recovery trial."
                if run.lives
                else "Nothing: no seed was germinated."
            ),
        )
    columns = [
        ("layer", "short"), ("slot", "number"), ("blueprint", "short"), ("epoch", "number"),
        ("contribution", "number"), ("at least", "number"), ("rent", "number"),
        ("samples", "number"),
    ]  # fmt: skip
    rows = [
        (
            code(part.layer),
            part.slot,
            code(part.blueprint),
            part.epoch,
            formats.nats(part.contribution.mean if part.contribution else None),
            formats.nats(part.contribution.lower if part.contribution else None),
            formats.figure(part.rent),
            formats.count(part.samples),
        )
        for part in grown
    ]
    note = paragraph(
        "Contribution in nats per validation sample, as the recovery trial measured it: one"
        " interval trained with the seed against one without, from the same snapshot. The lower"
        " bound must be above the rent, which is the price of the seed's parameters and FLOPs.",
        class_="aside",
    )
    return section("What grew", table(columns, rows), note)


def _trials(lives: tuple[Life, ...]) -> Html:
    if not lives:
        return Html("")
    columns = [
        ("trial", "number"), ("layer", "short"), ("slot", "number"), ("blueprint", "short"),
        ("epochs", "number"), ("gain", "number"), ("at least", "number"), ("rent", "number"),
        ("verdict", ""), ("reason", "long"),
    ]  # fmt: skip
    rows = [
        (
            life.number,
            code(life.layer),
            life.slot,
            code(life.blueprint or formats.ABSENT),
            _epochs(life),
            formats.nats(life.measurement.mean if life.measurement else None),
            formats.nats(life.measurement.lower if life.measurement else None),
            formats.figure(life.measurement.rent if life.measurement else None),
            verdict(life),
            life.reason,
        )
        for life in lives
    ]
    ids = [f"trial-{life.number}" for life in lives]
    return section(
        "Every trial",
        table(columns, rows, ids),
        paragraph(
            "Gain and rent in nats per validation sample; the last measurement of each trial.",
            class_="aside",
        ),
    )


def verdict(life: Life) -> Html:
    """What became of a trial, beside the colour of its last state."""
    words = life.state.value
    if life.state is SeedState.FOSSILIZED:
        words = "kept"
    elif life.state is SeedState.CULLED:
        words = "culled after grafting" if life.grafted else "culled"
    return state(life.state, words)


def _epochs(life: Life) -> str:
    decided = life.decided
    return f"{life.started}–{decided}" if decided is not None else f"{life.started}–"


def _decisions(run: RunRecord) -> Html:
    changes = [item for item in run.decisions if item.action is not DecisionAction.WAIT]
    parts: list[object] = []
    if changes:
        columns = [
            ("epoch", "number"), ("decision", "short"), ("where", "short"),
            ("blueprint", "short"), ("confidence", "number"), ("applied", "short"),
            ("reason", "long"),
        ]  # fmt: skip
        parts.append(table(columns, [_decision_row(item) for item in changes]))
    else:
        parts.append(paragraph("The controller asked for no change."))
    waits = _waits(run.decisions)
    if waits:
        times = sum(num_waits for _, _, num_waits in waits)
        parts.append(
            details(
                f"It decided to wait {'once' if times == 1 else f'{times} times'}",
                table(
                    [("epochs", "number"), ("reason", "long")],
                    [(epochs, reason) for epochs, reason, _ in waits],
                ),
            )
        )
    if run.events:
        events = [(event.epoch, event.reason, event.message) for event in run.events]
        parts += [
            element("h3", "Other events"),
            table([("epoch", "number"), ("event", "short"), ("message", "long")], events),
        ]
    return section("Decisions", *parts)


def _decision_row(item: DecisionRecord) -> tuple[object, ...]:
    applied = "yes" if item.applied else f"no: {item.outcome or 'no reason recorded'}"
    return (
        item.epoch,
        item.action.value,
        code(formats.where(item.layer, item.slot)) if item.layer else None,
        code(item.blueprint) if item.blueprint else None,
        formats.percent(item.confidence, 0),
        applied,
        item.reason,
    )


def _waits(decisions: tuple[DecisionRecord, ...]) -> list[tuple[str, str, int]]:
    """Runs of decisions to wait for one reason: their epochs, the reason, how many they are."""
    waits = []
    for (action, reason), items in groupby(decisions, lambda item: (item.action, item.reason)):
        if action is DecisionAction.WAIT:
            epochs = [item.epoch for item in items]
            first, last = epochs[0], epochs[-1]
            told = str(first) if first == last else f"{first}–{last}"
            waits.append((told, reason, len(epochs)))
    return waits


def _refused(run: RunRecord) -> Html:
    if not run.refused:
        return Html("")
    rows = [(code(name), reason) for name, reason in run.refused]
    return section(
        "Layers left alone",
        paragraph("These layers can't host seeds and train as they always would."),
        table([("layer", "short"), ("reason", "long")], rows),
    )


def _health(run: RunRecord, plots: dict[str, str]) -> Html:
    if "health" not in plots:
        return Html("")
    shown, total = len(healths_of(run)), len(run.layers)
    left_out = f" The {shown} least healthy of {total} layers are shown." if shown < total else ""
    return section(
        "Layer health",
        plot(
            plots["health"],
            "Health score of each layer over epochs",
            "Health score from 0 to 1: the mean of the activation rank, the share of units alive"
            " and the gradient's share. Dotted: below 0.7 degraded, below 0.4 critical. A green"
            f" line marks growth at that layer.{left_out}",
        ),
    )


def _loading(run: RunRecord) -> Html:
    if not run.exported:
        return section(
            "The grown model",
            paragraph("Not written yet: ", code("grown.py"), " appears when the run ends."),
        )
    lines = "import grown\nmodel = grown.load()\nprediction = model(inputs)"
    return section(
        "The grown model",
        paragraph(
            "In the run's directory, beside ", code("model.safetensors"),
            "; it needs torch and your own module, not Esper.",
        ),
        element("pre", element("code", lines)),
    )  # fmt: skip


def _replace(path: Path, data: bytes) -> None:
    """Write a file whole: beside its place first, then moved there.

    Raises:
        OutputError: the directory can't be written.
        StorageFull: there is no room.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_bytes(data)
        draft.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFull(f"{path.parent}: no room left for {path.name}") from error
        raise OutputError(
            "directory", f"{path.parent}: {error.strerror}", "a directory that can be written"
        ) from error
