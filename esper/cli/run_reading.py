"""Reads a run's directory.

Tolerant of a run in progress and of one that was killed: a last line without its end counts as not
written, a file that is not there yet as empty, and where an epoch, a transition or a decision was
recorded twice (a run resumed from its checkpoint) the later record stands.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import ValidationError

from esper.cli.run_record import (
    DecisionRecord,
    EpochRecord,
    EventRecord,
    Life,
    ResultRecord,
    RunRecord,
    TransitionRecord,
    grown_from,
    lives_of,
)
from esper.contracts.base import Contract
from esper.contracts.enums import SessionOutcome
from esper.errors import OutputError

A_RUN = "a directory that `esper run` wrote"

Record = TypeVar("Record", bound=Contract)


def read_run(directory: Path) -> RunRecord:
    """Read a run's directory.

    Raises:
        OutputError: `directory` is missing, is no run, or one of its files can't be read as such.
    """
    if not directory.is_dir():
        raise OutputError("directory", str(directory), A_RUN)
    manifest = _text(directory, "manifest.yaml")
    if manifest is None:
        raise OutputError("directory", f"{directory}, which has no manifest.yaml", A_RUN)
    session = _session(directory, manifest)
    status = _status(directory)
    result = _result(directory)
    by_epoch = {row.epoch: row for row in _records(directory, "metrics.jsonl", EpochRecord)}
    rows = tuple(by_epoch[epoch] for epoch in sorted(by_epoch))
    transitions, events = _events(directory)
    decisions = {item.id: item for item in _records(directory, "decisions.jsonl", DecisionRecord)}
    training = _mapping(_mapping(session, "spec"), "training")
    reached = rows[-1].epoch if rows else 0
    lives = tuple(
        lives_of(transitions, max([reached, *(transition.epoch for transition in transitions)]))
    )
    outcome, message = _outcome(status, result)
    return RunRecord(
        name=str(_mapping(session, "metadata").get("name") or directory.name),
        outcome=outcome,
        message=message,
        epochs=max(_whole(status, "epochs") or _whole(training, "epochs") or 0, reached),
        classification=training.get("objective", "classification") == "classification",
        manifest=manifest,
        rows=rows,
        lives=lives,
        events=events,
        decisions=tuple(sorted(decisions.values(), key=lambda decision: decision.epoch)),
        refused=tuple(_refused(status)),
        grown=tuple(grown_from(lives)) if result is None or result.grown is None else result.grown,
        result=result,
        parameters_base=_parameters_base(result, status, rows),
        exported=(directory / "grown.py").is_file() and (directory / "model.safetensors").is_file(),
        layers=_layers(rows, status, lives),
    )


def _text(directory: Path, name: str) -> str | None:
    """A file's text, None where there is no such file.

    Raises:
        OutputError: the file can't be read, or is no UTF-8 (a broken last character aside).
    """
    path = directory / name
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise OutputError("directory", f"{path}: {error.strerror}", "readable files") from error
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        if len(data) - error.start < 4:
            return data[: error.start].decode()
        raise OutputError("directory", f"{path}, which is no UTF-8", A_RUN) from error


def _documents(directory: Path, name: str, text: str) -> list[object]:
    try:
        return list(yaml.safe_load_all(text))
    except yaml.YAMLError as error:
        raise OutputError("directory", f"{directory / name}, broken YAML", A_RUN) from error


def _session(directory: Path, manifest: str) -> Mapping[str, object]:
    """The TrainingSession of a manifest, as plain data: the page only quotes from it."""
    for document in _documents(directory, "manifest.yaml", manifest):
        if isinstance(document, dict) and document.get("kind") == "TrainingSession":
            return document
    raise OutputError(
        "directory", f"{directory}, whose manifest.yaml holds no TrainingSession", A_RUN
    )


def _status(directory: Path) -> Mapping[str, object]:
    """The status of status.yaml; empty where it is not written yet."""
    text = _text(directory, "status.yaml") or ""
    documents = _documents(directory, "status.yaml", text)
    first = documents[0] if documents and isinstance(documents[0], dict) else {}
    return _mapping(first, "status")


def _result(directory: Path) -> ResultRecord | None:
    text = _text(directory, "result.json")
    if text is None:
        return None
    try:
        return ResultRecord.model_validate(json.loads(text))
    except (ValidationError, json.JSONDecodeError) as error:
        raise OutputError("directory", f"{directory / 'result.json'}, malformed", A_RUN) from error


def _lines(directory: Path, name: str) -> Iterator[tuple[int, dict[str, object]]]:
    """The complete lines of a JSON Lines file, with their numbers.

    A line is complete once its line break is there; a killed run leaves the last one half written.
    """
    text = _text(directory, name) or ""
    for index, line in enumerate(text.split("\n")[:-1], start=1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
        except json.JSONDecodeError as error:
            raise OutputError(
                "directory", f"{directory / name}, line {index} is no JSON", A_RUN
            ) from error
        if not isinstance(data, dict):
            raise OutputError("directory", f"{directory / name}, line {index} is no object", A_RUN)
        yield index, data


def _records(directory: Path, name: str, kind: type[Record]) -> Iterator[Record]:
    for index, data in _lines(directory, name):
        yield _record(directory / name, index, data, kind)


def _record(path: Path, index: int, data: object, kind: type[Record]) -> Record:
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        field = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise OutputError("directory", f"{path}, line {index}: {field}", A_RUN) from error


def _events(directory: Path) -> tuple[list[TransitionRecord], tuple[EventRecord, ...]]:
    """Transitions and other events, each once, in the order of their epochs."""
    transitions: dict[tuple[object, ...], TransitionRecord] = {}
    events: dict[tuple[object, ...], EventRecord] = {}
    path = directory / "events.jsonl"
    for index, data in _lines(directory, path.name):
        if data.get("type") == "transition":
            step = _record(path, index, data, TransitionRecord)
            key = (step.epoch, step.layer, step.slot, step.cycle, step.previous, step.current)
            transitions[key] = step
        elif data.get("type") == "event":
            event = _record(path, index, data, EventRecord)
            events[event.epoch, event.reason, event.message] = event
    return (
        sorted(transitions.values(), key=lambda step: step.epoch),
        tuple(sorted(events.values(), key=lambda event: event.epoch)),
    )


def _outcome(
    status: Mapping[str, object], result: ResultRecord | None
) -> tuple[SessionOutcome, str]:
    """How the run stands: the summary condition, or the result where that is all there is."""
    conditions = status.get("conditions")
    for condition in conditions if isinstance(conditions, list) else ():
        if isinstance(condition, dict) and condition.get("type") == "Succeeded":
            reason, message = condition.get("reason"), str(condition.get("message") or "")
            if reason in set(SessionOutcome):
                return SessionOutcome(str(reason)), message
            if condition.get("status") == "True":
                return SessionOutcome.SUCCEEDED, message
            if condition.get("status") == "False":
                return SessionOutcome.FAILED, message
    if result is not None and result.outcome in set(SessionOutcome):
        return SessionOutcome(result.outcome), ""
    return SessionOutcome.RUNNING, ""


def _refused(status: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    layers = status.get("refusedLayers")
    for layer in layers if isinstance(layers, list) else ():
        if isinstance(layer, dict):
            yield str(layer.get("name", "")), str(layer.get("reason", ""))


def _parameters_base(
    result: ResultRecord | None, status: Mapping[str, object], rows: tuple[EpochRecord, ...]
) -> int | None:
    """Parameters before growth; the first epoch's where nothing else tells."""
    if result is not None and result.parameters_base is not None:
        return result.parameters_base
    return _whole(status, "parametersBase") or (rows[0].parameters if rows else None)


def _layers(
    rows: tuple[EpochRecord, ...], status: Mapping[str, object], lives: tuple[Life, ...]
) -> tuple[str, ...]:
    """Host layers in execution order, from the metrics, else from the status, else from seeds."""
    names = [layer.layer for row in rows[-1:] for layer in row.layers]
    summaries = status.get("layers")
    if not names and isinstance(summaries, list):
        names = [
            str(item["name"]) for item in summaries if isinstance(item, dict) and "name" in item
        ]
    return tuple(dict.fromkeys([*names, *(life.layer for life in lives)]))


def _mapping(data: Mapping[str, object], key: str) -> Mapping[str, object]:
    value = data.get(key)
    return value if isinstance(value, dict) else {}


def _whole(data: Mapping[str, object], key: str) -> int | None:
    value = data.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) else None
