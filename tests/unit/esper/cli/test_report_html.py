from hypothesis import given
from hypothesis import strategies as st

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
from esper.contracts.enums import SeedState


@given(st.text())
def test_text_is_escaped_once(value):
    shown = text(value)
    assert "<" not in shown
    assert ">" not in shown
    assert text(shown) == shown


def test_nothing_is_a_dash():
    assert text(None) == "–"
    assert text(0) == "0"


def test_elements_escape_content_and_attributes():
    assert element("p", "a<b", class_='x"y', id="") == '<p class="x&quot;y">a&lt;b</p>'
    assert code("a&b") == "<code>a&amp;b</code>"
    assert paragraph("a ", Html("<b>b</b>"), class_="lead") == '<p class="lead">a <b>b</b></p>'


def test_parts_are_joined():
    assert join(["<", Html("<br>"), None], " & ") == "&lt; &amp; <br> &amp; –"


def test_a_state_has_words_beside_its_colour():
    assert "var(--state-culled)" in state(SeedState.CULLED)
    assert state(SeedState.FOSSILIZED, "kept").endswith(">kept</span>")


def test_a_table_has_classes_and_ids():
    shown = table([("n", "number"), ("why", "")], [(1, "<"), (2, None)], ids=["first"])
    assert '<th scope="col" class="number">n</th><th scope="col">why</th>' in shown
    assert '<tr id="first"><td class="number">1</td><td>&lt;</td></tr>' in shown
    assert '<tr><td class="number">2</td><td>–</td></tr>' in shown


def test_a_plot_says_what_it_shows():
    shown = plot("<svg viewBox='0'></svg>", 'a "b"', "c < d")
    assert shown.startswith('<figure><svg role="img" aria-label="a &quot;b&quot;" viewBox')
    assert "<figcaption>c &lt; d</figcaption>" in shown
    assert "figcaption" not in plot("<svg/>", "x")


def test_sections_and_details():
    assert section("A & B", paragraph("c")).startswith("<section>\n<h2>A &amp; B</h2>")
    assert "<summary>more</summary>" in details("more", "<")
