import builtins
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from esper.cli.report_drawing import VARIABLES
from esper.cli.report_plots import (
    MAX_LANES,
    MAX_LAYERS,
    growth_png,
    healths_of,
    lanes_of,
    page_plots,
)
from esper.cli.run_reading import read_run
from esper.cli.run_record import LayerHealth
from esper.contracts.enums import SessionOutcome
from esper.errors import ConfigError
from tests.unit.esper.cli.run_directories import LAYERS, trial, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return read_run(write_run(tmp_path_factory.mktemp("runs") / "run"))


@pytest.fixture(scope="module")
def plots(run):
    return page_plots(run)


def parsed(svg):
    return ElementTree.fromstring(svg)


def test_every_plot_is_there_and_well_formed(plots):
    assert set(plots) == {"metric", "loss", "parameters", "compute", "lives", "health"}
    for svg in plots.values():
        assert parsed(svg).get("viewBox")


def test_colours_are_the_pages_variables(plots):
    for svg in plots.values():
        assert not set(re.findall(r"#[0-9a-f]{6}\b", svg)) & set(VARIABLES)
        assert "var(--" in svg


def test_ids_are_unique_over_all_plots(plots):
    ids = [each for svg in plots.values() for each in re.findall(r'\bid="([^"]+)"', svg)]
    assert len(ids) == len(set(ids))


def test_every_reference_inside_a_plot_leads_somewhere(plots):
    for svg in plots.values():
        ids = set(re.findall(r'\bid="([^"]+)"', svg))
        assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg)) <= ids


def test_plots_hold_no_date_and_no_random_name(run, plots):
    assert page_plots(run) == plots
    assert "<metadata" not in "".join(plots.values())


def test_the_lanes_name_each_trial_and_its_state(plots):
    titles = re.findall(r"<title>([^<]+)</title>", plots["lives"])
    assert "trial 5: bottleneck-mlp at layers.0[0], fossilized, epochs 47 to 100" in titles
    assert "5 bottleneck-mlp" in plots["lives"]
    assert "layers.2[0]" in plots["lives"]


def test_the_share_of_trials_is_in_the_legend(plots):
    assert "trials (22 %)" in plots["compute"]


def test_the_picture_is_a_png_and_repeats(run):
    first = growth_png(run)
    assert first.startswith(b"\x89PNG")
    assert growth_png(run) == first


def test_a_run_without_an_epoch(tmp_path):
    run = read_run(write_run(tmp_path / "run", reached=0, outcome=SessionOutcome.RUNNING))
    assert page_plots(run) == {}
    assert growth_png(run).startswith(b"\x89PNG")


def test_a_run_without_seeds_has_no_lanes_plot(tmp_path):
    run = read_run(write_run(tmp_path / "run", reached=5, steps=[]))
    assert "lives" not in page_plots(run)
    assert lanes_of(run) == [(layer, 0) for layer in LAYERS]


def test_figures_that_are_not_finite_leave_gaps(run):
    rows = tuple(
        replace_row(row, train_loss=float("nan"), validation_loss=None) for row in run.rows
    )
    assert "loss" in page_plots(replace(run, rows=rows[:3]))


def replace_row(row, **fields):
    return row.model_copy(update=fields)


def test_many_layers_keep_to_lanes_that_were_used(run):
    crowded = replace(run, layers=(*(f"deep.{index}" for index in range(500)), *LAYERS))
    assert lanes_of(crowded) == [(layer, 0) for layer in LAYERS]


def test_more_trials_than_lanes(run):
    lives = tuple(
        replace(run.lives[0], layer=f"deep.{index}", number=index + 1) for index in range(200)
    )
    crowded = replace(run, lives=lives, layers=tuple(life.layer for life in lives))
    assert len(lanes_of(crowded)) == MAX_LANES
    assert "lives" in page_plots(crowded)


def test_only_the_least_healthy_layers_of_many_are_drawn(run):
    layers = tuple(f"deep.{index}" for index in range(60))
    health = tuple(
        LayerHealth(layer=layer, health_score=1 - index / 100) for index, layer in enumerate(layers)
    )
    rows = (replace_row(run.rows[0], layers=health),)
    drawn = healths_of(replace(run, rows=rows, layers=layers))
    assert list(drawn) == list(layers[-MAX_LAYERS:])


def test_names_that_look_like_formulas_or_markup_are_text(tmp_path):
    name = r"<b>$\frac$&"
    run = read_run(write_run(tmp_path / "run", reached=30, steps=trial(name, "noop", 2, 0.1)))
    lives = page_plots(run)["lives"]
    assert any(name in (text or "") for text in parsed(lives).itertext())
    assert "<b>" not in lives


def test_without_matplotlib_the_message_names_what_to_install(run, monkeypatch):
    real = builtins.__import__

    def refuse(name, *rest, **named):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ConfigError, match=r"esper\[report\]"):
        growth_png(run)
