"""docs/api.md is what the hub's description gives."""

import re

from tools.api_reference import PATH, reference


def test_the_reference_is_up_to_date() -> None:
    assert PATH.read_text(encoding="utf-8") == reference()


def test_the_reference_has_every_endpoint_and_no_dangling_link() -> None:
    page = reference()
    for heading in ("PUT /api/v1/sessions/{uid}", "POST /internal/requested-kernels/claim"):
        assert f"### {heading}\n" in page
    headings = {line[4:].lower() for line in page.splitlines() if line.startswith("### ")}
    assert "problem" in headings
    linked = set(re.findall(r"\]\(#([^)]+)\)", page))
    assert linked
    assert linked <= headings, linked - headings
