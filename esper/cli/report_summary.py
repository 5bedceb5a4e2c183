"""The head of the report: what came of the run, in a few sentences and a row of figures."""

from __future__ import annotations

from esper.cli import formats
from esper.cli.report_html import Html, code, element, join, paragraph, text
from esper.cli.run_record import GrownPart, RunRecord
from esper.contracts.enums import SeedState, SessionOutcome

NAMED_PARTS = 4
"""So many grown parts are told in full; the table has the rest."""

_OUTCOMES = {
    SessionOutcome.RUNNING: "In progress",
    SessionOutcome.SUCCEEDED: "Finished",
    SessionOutcome.FAILED: "Failed",
    SessionOutcome.INTERRUPTED: "Interrupted",
}


def kicker(run: RunRecord) -> Html:
    """How the run stands, above the title."""
    words = f"Training session · {_OUTCOMES[run.outcome]}"
    if run.outcome is not SessionOutcome.SUCCEEDED:
        words += f" at epoch {run.reached} of {run.epochs}"
    return paragraph(words, class_="kicker")


def lead(run: RunRecord) -> Html:
    """The outcome in sentences: accuracy, size, what grew on what evidence, and what it cost."""
    sentences = [_quality(run), _size(run), _growth(run), _cost(run)]
    if run.outcome is SessionOutcome.FAILED and run.message:
        sentences.insert(0, text(f"The run failed: {run.message.rstrip('.')}."))
    return paragraph(join((each for each in sentences if each), " "), class_="lead")


def _quality(run: RunRecord) -> Html:
    tested = run.result.accuracy if run.result else None
    if tested is not None:
        shown = formats.percent(tested) if run.classification else formats.figure(tested)
        name = "accuracy" if run.classification else "metric"
        return join(
            [
                f"Test {name} ",
                element("strong", shown),
                f" after {run.reached} epochs.",
            ]
        )
    last = run.rows[-1].validation_metric if run.rows else None
    if last is None:
        return text(f"{run.reached} epochs have ended.")
    shown = formats.percent(last) if run.classification else formats.figure(last)
    name = "accuracy" if run.classification else "metric"
    return join([f"Validation {name} ", element("strong", shown), f" after {run.reached} epochs."])


def _size(run: RunRecord) -> Html:
    base, now = run.parameters_base, parameters_now(run)
    if base is None or now is None:
        return Html("")
    if now == base:
        return text(f"The model has kept its {base:,} parameters.")
    change = f"{(now - base) / base:+.0%}".replace("%", " %").replace("-", "−") if base else ""
    return join(
        [
            "The model went from ",
            element("strong", f"{base:,}"),
            " to ",
            element("strong", f"{now:,}"),
            f" parameters ({change}).",
        ]
    )


def _growth(run: RunRecord) -> Html:
    if not run.lives and not run.grown:
        return text("Nothing was tried and nothing grew.")
    culled = sum(life.state is SeedState.CULLED for life in run.lives)
    trials = f"{len(run.lives)} trial" + ("" if len(run.lives) == 1 else "s")
    if not run.grown:
        going = len(run.lives) - culled
        ended = "Nothing has grown yet" if run.outcome is SessionOutcome.RUNNING else "Nothing grew"
        open_ended = f" and {going} not decided" if going else ""
        return text(f"{ended}: of {trials}, {culled} culled{open_ended}.")
    named = [_part(part) for part in run.grown[:NAMED_PARTS]]
    if len(run.grown) > NAMED_PARTS:
        named.append(text(f"{len(run.grown) - NAMED_PARTS} more"))
    listed = join(named[:-1], ", ") + " and " + named[-1] if len(named) > 1 else named[0]
    return join(
        [
            f"Of {trials}, {len(run.grown)} {'was' if len(run.grown) == 1 else 'were'} kept and "
            f"{culled} culled. Grown: ",
            Html(listed),
            ".",
        ]
    )


def _part(part: GrownPart) -> Html:
    words: list[object] = [code(part.blueprint), " at ", code(part.layer)]
    if part.contribution is not None:
        rent = "" if part.rent is None else f" against a rent of {formats.figure(part.rent)}"
        words.append(
            f" in epoch {part.epoch} ({formats.nats(part.contribution.mean)} nats per sample,"
            f" at least {formats.nats(part.contribution.lower)},{rent})".replace(",)", ")")
        )
    return join(words)


def _cost(run: RunRecord) -> Html:
    total, share = flops_of(run)
    if total is None:
        return Html("")
    part = f", {formats.percent(share, 0)} of it for trials" if share is not None else ""
    return text(f"Training has cost {formats.flops(total)}{part}.")


def parameters_now(run: RunRecord) -> int | None:
    """Parameters at the end, or where the run stands."""
    if run.result is not None and run.result.parameters is not None:
        return run.result.parameters
    return run.rows[-1].parameters if run.rows else None


def flops_of(run: RunRecord) -> tuple[int | None, float | None]:
    """Training FLOPs, and the share of them that went into trials."""
    last = run.rows[-1] if run.rows else None
    total = run.result.flops if run.result and run.result.flops is not None else None
    if total is None:
        total = last.flops if last else None
    share = last.flops_trials / total if last and total else None
    return total, share


def key_figures(run: RunRecord) -> Html:
    """The row of figures under the title."""
    last = run.rows[-1] if run.rows else None
    total, share = flops_of(run)
    kept = sum(life.state is SeedState.FOSSILIZED for life in run.lives)
    culled = sum(life.state is SeedState.CULLED for life in run.lives)
    going = len(run.lives) - kept - culled
    seconds = sum(row.seconds for row in run.rows)
    if run.result is not None and run.result.seconds is not None:
        seconds = run.result.seconds
    metric = "accuracy" if run.classification else "metric"
    show = formats.percent if run.classification else formats.figure
    validation = show(last.validation_metric if last else None)
    tested = run.result.accuracy if run.result else None
    best = max(
        (row.validation_metric for row in run.rows if row.validation_metric is not None),
        default=None,
    )
    figures = [
        (f"test {metric}", show(tested), f"validation {validation}")
        if tested is not None
        else (f"validation {metric}", validation,
              f"best {show(best)}" if run.classification else ""),
        ("parameters", formats.count(parameters_now(run)),
         f"from {formats.count(run.parameters_base)}"),
        ("training compute", formats.flops(total),
         f"{formats.percent(share, 0)} in trials" if share is not None else ""),
        ("trials", str(len(run.lives)),
         f"{kept} kept, {culled} culled" + (f", {going} open" if going else "")),
        ("epochs", f"{run.reached} / {run.epochs}", f"{formats.duration(seconds)} of training"),
    ]  # fmt: skip
    rows = [
        element(
            "div",
            join(
                [
                    element("dt", name),
                    element("dd", join([value, element("small", note) if note else ""])),
                ]
            ),
        )
        for name, value, note in figures
    ]
    return element("dl", join(rows, "\n"), class_="figures")
