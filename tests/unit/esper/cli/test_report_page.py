import errno
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from esper.cli.report_page import page_of, write_report
from esper.cli.report_summary import lead
from esper.cli.run_reading import read_run
from esper.contracts.enums import SessionOutcome
from esper.errors import OutputError, StorageFull
from tests.unit.esper.cli.run_directories import write_run

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Outline(HTMLParser):
    """Checks that tags are balanced; gathers headings, text, and each element's attributes."""

    def __init__(self):
        super().__init__()
        self.open, self.headings, self.seen, self.text = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)
        if "style" not in self.open:
            self.text.append(data)


def outline(page):
    parser = Outline()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


def plain(page):
    return " ".join("".join(outline(page).text).split())


def table_after(page, heading):
    """The cells of the first table after a heading, as text."""
    body = page.split(f"<h2>{heading}</h2>", 1)[1].split("<tbody>", 1)[1].split("</tbody>", 1)[0]
    return [
        [
            re.sub(r"<[^>]+>", "", cell)
            for cell in re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL)
        ]
        for row in body.strip().split("</tr>")
        if row.strip()
    ]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return read_run(write_run(tmp_path_factory.mktemp("runs") / "run"))


@pytest.fixture(scope="module")
def page(run):
    return page_of(run)


def test_the_report_has_its_sections_in_order(page):
    assert outline(page).headings == [
        "Course of the run",
        "What grew",
        "Every trial",
        "Decisions",
        "Layers left alone",
        "Layer health",
        "The grown model",
        "Manifest",
    ]


def test_the_lead_tells_the_outcome_and_its_evidence(run):
    told = re.sub(r"<[^>]+>", "", lead(run))
    assert told == (
        "Test accuracy 60.1 % after 100 epochs. The model went from 1,098 to 5,202 parameters"
        " (+374 %). Of 7 trials, 2 were kept and 5 culled. Grown: bottleneck-mlp at layers.0 in"
        " epoch 47 (+0.0674 nats per sample, at least +0.0554, against a rent of 0.0040) and"
        " bottleneck-mlp at layers.2 in epoch 71 (+0.0313 nats per sample, at least +0.0193,"
        " against a rent of 0.0040). Training has cost 8.51 GFLOP, 22 % of it for trials."
    )


def test_the_page_needs_nothing_else(page):
    for tag, attributes in outline(page).seen:
        assert tag not in {"script", "link", "img", "iframe", "object", "embed"}
        assert "src" not in attributes
        target = attributes.get("href") or attributes.get("xlink:href") or "#"
        assert target.startswith("#")
    assert "@import" not in page
    assert "url(http" not in page


def test_what_grew(page):
    assert table_after(page, "What grew") == [
        ["layers.0", "0", "bottleneck-mlp", "47", "+0.0674", "+0.0554", "0.0040", "500"],
        ["layers.2", "0", "bottleneck-mlp", "71", "+0.0313", "+0.0193", "0.0040", "500"],
    ]


def test_every_trial_has_its_verdict_and_reason(page):
    rows = table_after(page, "Every trial")
    assert [row[8] for row in rows] == [
        "culled", "culled", "culled", "culled after grafting", "kept", "culled", "kept",
    ]  # fmt: skip
    assert rows[0][:5] == ["1", "layers.0", "0", "noop", "2–8"]
    assert all(row[9] for row in rows)


def test_decisions_keep_waiting_apart(page):
    rows = table_after(page, "Decisions")
    assert {row[1] for row in rows} == {"germinate", "graft"}
    assert "It decided to wait 90 times" in page
    assert "wait" not in {row[1] for row in rows}


def test_equal_reasons_to_wait_stand_in_one_row(page):
    waits = page.split("It decided to wait", 1)[1].split("</details>", 1)[0]
    assert "3–7" in waits


def test_how_to_load_the_model(page):
    assert "import grown\nmodel = grown.load()\nprediction = model(inputs)" in page


def test_events_refused_layers_and_the_manifest_are_told(page):
    told = plain(page)
    assert "HealthChanged" in told
    assert "attention.out_proj its forward is never called" in told.replace("its", " its").replace(
        "  ", " "
    )
    assert "# A small MLP that grows." in page


def test_a_run_under_way(tmp_path):
    directory = write_run(tmp_path / "run", reached=43, outcome=SessionOutcome.RUNNING, torn=True)
    told = plain(page_of(read_run(directory)))
    assert "In progress at epoch 43 of 100" in told
    assert "Validation accuracy 49.4 % after 43 epochs." in told
    assert "Nothing has grown yet: of 5 trials, 4 culled and 1 not decided." in told
    assert "Not written yet" in told


def test_an_interrupted_run_that_has_grown(tmp_path):
    directory = write_run(tmp_path / "run", reached=60, outcome=SessionOutcome.INTERRUPTED)
    told = plain(page_of(read_run(directory)))
    assert "Interrupted at epoch 60 of 100" in told
    assert "1 was kept" in told


def test_a_failed_run_says_why(tmp_path):
    directory = write_run(tmp_path / "run", reached=12, outcome=SessionOutcome.FAILED)
    assert "The run failed: loss not finite after 3 rollbacks." in plain(
        page_of(read_run(directory))
    )


def test_a_run_that_tried_nothing(tmp_path):
    told = plain(page_of(read_run(write_run(tmp_path / "run", reached=5, steps=[]))))
    assert "The model has kept its 1,098 parameters. Nothing was tried and nothing grew." in told
    assert "The controller asked for no change." in told
    assert "Nothing: no seed was germinated." in told


def test_a_run_before_its_first_epoch(tmp_path):
    directory = write_run(tmp_path / "run", reached=0, outcome=SessionOutcome.RUNNING, torn=True)
    write_report(directory)
    assert "No epoch has ended yet." in plain((directory / "report.html").read_text())


def test_a_regression_speaks_of_its_metric(run):
    told = plain(page_of(replace(run, classification=False)))
    assert "Test metric 0.6013" in told
    assert "accuracy" not in told


def test_many_grown_parts_are_summed_up(run):
    told = re.sub(r"<[^>]+>", "", lead(replace(run, grown=run.grown * 3)))
    assert "and 2 more." in told


def test_foreign_text_is_escaped(tmp_path):
    hostile = "</td><script>alert('x')</script> & \"quoted\""
    directory = write_run(tmp_path / "run", reached=30, name="a<b>&c", reason=hostile)
    page = page_of(read_run(directory))
    assert "<script" not in page
    assert hostile in "".join(outline(page).text)
    assert "<title>a&lt;b&gt;&amp;c · Esper</title>" in page


def test_a_template_mark_in_foreign_text_is_text(tmp_path):
    directory = write_run(tmp_path / "run", reached=10, reason="$style $$ ${body}")
    assert "$style $$ ${body}" in page_of(read_run(directory))


def test_states_wear_one_colour_in_tables_and_plots(page):
    for name in ("culled", "fossilized"):
        variable = f"var(--state-{name})"
        assert f"--state: {variable}" in page
        assert f"fill: {variable}" in page


def test_the_files_are_written_whole_and_repeat(tmp_path):
    directory = write_run(tmp_path / "run", reached=20)
    before = {path.name for path in directory.iterdir()}
    write_report(directory)
    first = {name: (directory / name).read_bytes() for name in ("report.html", "growth.png")}
    write_report(directory)
    assert {path.name for path in directory.iterdir()} - before == set(first)
    assert first == {name: (directory / name).read_bytes() for name in first}


def test_a_directory_that_is_no_run_gets_no_file(tmp_path):
    with pytest.raises(OutputError) as caught:
        write_report(tmp_path)
    assert caught.value.field == "directory"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("code", "kind"), [(errno.ENOSPC, StorageFull), (errno.EACCES, OutputError)]
)
def test_a_write_that_fails_leaves_nothing_behind(tmp_path, monkeypatch, code, kind):
    directory = write_run(tmp_path / "run", reached=2)
    before = sorted(directory.iterdir())

    def refuse(self, target):
        raise OSError(code, "refused")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(kind, match="run"):
        write_report(directory)
    assert sorted(directory.iterdir()) == before
