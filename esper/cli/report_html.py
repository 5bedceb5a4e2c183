"""The few HTML parts the report is made of. Text is escaped unless it is `Html` already."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from esper.cli.formats import ABSENT
from esper.contracts.enums import SeedState


class Html(str):
    """Markup that is safe to put on the page as it is."""

    __slots__ = ()


def text(value: object) -> Html:
    """`value` as markup: escaped, unless it is markup already; None as a dash."""
    if isinstance(value, Html):
        return value
    return Html(ABSENT if value is None else escape(str(value)))


def join(parts: Iterable[object], between: str = "") -> Html:
    """The parts as one piece of markup."""
    return Html(text(between).join(text(part) for part in parts))


def element(name: str, content: object, **attributes: str) -> Html:
    """An element; `class_` stands for `class`."""
    given = "".join(
        f' {key.rstrip("_")}="{escape(value)}"' for key, value in attributes.items() if value
    )
    return Html(f"<{name}{given}>{text(content)}</{name}>")


def code(value: object) -> Html:
    """A name from the code: a layer, a blueprint, a file."""
    return element("code", value)


def paragraph(*parts: object, class_: str = "") -> Html:
    """A paragraph of the parts, one after the other."""
    return element("p", join(parts), class_=class_)


def state(value: SeedState, words: str | None = None) -> Html:
    """A state's name beside its colour, which is the same in every table and plot."""
    return Html(
        f'<span class="state" style="--state: var(--state-{value.value})">'
        f"{text(words or value.value)}</span>"
    )


def table(
    columns: Sequence[tuple[str, str]], rows: Iterable[Sequence[object]], ids: Sequence[str] = ()
) -> Html:
    """A table.

    Args:
        columns: each column's heading and class: `number`, `short`, `long` or none.
        rows: the cells of each row.
        ids: the rows' ids, where something links to them.
    """
    head = join(
        element("th", name, scope="col", class_="number" if kind == "number" else "")
        for name, kind in columns
    )
    body = []
    for index, row in enumerate(rows):
        cells = join(
            element("td", cell, class_=kind) for cell, (_, kind) in zip(row, columns, strict=True)
        )
        body.append(element("tr", cells, id=ids[index] if index < len(ids) else ""))
    return Html(
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{join(body, chr(10))}\n</tbody></table></div>"
    )


def details(summary: object, content: object) -> Html:
    """Content that is folded away until asked for."""
    return Html(f"<details><summary>{text(summary)}</summary>\n{text(content)}\n</details>")


def plot(svg: str, description: str, caption: object = None) -> Html:
    """An SVG figure with what it shows in words, and a caption where given."""
    labelled = svg.replace("<svg", f'<svg role="img" aria-label="{escape(description)}"', 1)
    below = "" if caption is None else element("figcaption", caption)
    return Html(f"<figure>{labelled}{below}</figure>")


def section(title: str, *parts: object) -> Html:
    """A section under its heading."""
    return Html(f"<section>\n{element('h2', title)}\n{join(parts, chr(10))}\n</section>")
