"""The report's page frame and style sheet: one column, light and dark, fit for print."""

from __future__ import annotations

from string import Template

from esper.cli.formats import STATE_COLOURS
from esper.cli.report_drawing import GRID, INK, MUTED, PAPER, TRAIN, TRIALS, VALIDATION

_STATE_VARIABLES = "".join(
    f"  --state-{state.value}: {colour};\n" for state, colour in STATE_COLOURS.items()
)

STYLE = (
    f""":root {{
  color-scheme: light dark;
  --paper: {PAPER};
  --ink: {INK};
  --muted: {MUTED};
  --rule: {GRID};
  --panel: #f5f5f2;
  --validation: {VALIDATION};
  --train: {TRAIN};
  --trials: {TRIALS};
{_STATE_VARIABLES}}}
"""
    + """@media screen and (prefers-color-scheme: dark) {
  :root {
    --paper: #16181c;
    --ink: #e4e6e9;
    --muted: #9aa0a9;
    --rule: #33373d;
    --panel: #1e2126;
    --validation: #56a8e0;
    --train: #9aa0a9;
    --state-dormant: #5a5f67;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto;
  max-width: 70rem;
  padding: 2.5rem 1.5rem 4rem;
  background: var(--paper);
  color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  font-variant-numeric: tabular-nums;
}
h1 { margin: 0; font-size: 1.9rem; line-height: 1.2; letter-spacing: -0.01em; }
h2 { margin: 2.8rem 0 0.6rem; font-size: 1.25rem; line-height: 1.3; }
h3 { margin: 1.4rem 0 0.4rem; font-size: 1rem; }
p { margin: 0.5rem 0; max-width: 46rem; }
.kicker { color: var(--muted); margin: 0 0 0.2rem; }
.lead { font-size: 1.1rem; margin: 0.9rem 0 1.6rem; }
.aside { color: var(--muted); font-size: 0.92rem; }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
code { font-size: 0.9em; overflow-wrap: anywhere; }
pre {
  margin: 0.6rem 0;
  padding: 0.8rem 1rem;
  background: var(--panel);
  border-radius: 4px;
  overflow-x: auto;
  font-size: 0.86rem;
  line-height: 1.5;
}
.figures {
  display: grid;
  grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr));
  margin: 0;
  border-top: 1px solid var(--rule);
  border-bottom: 1px solid var(--rule);
}
.figures div { padding: 0.8rem 1rem 0.8rem 0; }
.figures dt { color: var(--muted); font-size: 0.85rem; }
.figures dd { margin: 0; font-size: 1.3rem; line-height: 1.35; font-weight: 600; }
.figures dd small { display: block; color: var(--muted); font-size: 0.82rem; font-weight: 400; }
.plots {
  display: grid;
  grid-template-columns: repeat(auto-fit, minmax(min(27rem, 100%), 1fr));
  gap: 1.2rem 1.6rem;
  margin: 1rem 0;
}
figure { margin: 0; break-inside: avoid; }
figure svg { display: block; width: 100%; height: auto; }
figure svg text { font-family: inherit !important; font-variant-numeric: tabular-nums; }
section > figure { overflow-x: auto; }
section > figure svg { min-width: 42rem; }
figcaption { color: var(--muted); font-size: 0.88rem; max-width: 46rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; margin: 0.6rem 0; font-size: 0.88rem; }
th {
  text-align: left;
  font-weight: 600;
  color: var(--muted);
  border-bottom: 1px solid var(--muted);
  white-space: nowrap;
}
th, td { padding: 0.38rem 0.8rem 0.38rem 0; vertical-align: top; }
th:last-child, td:last-child { padding-right: 0; }
tbody tr { break-inside: avoid; }
tbody td { border-bottom: 1px solid var(--rule); }
.number { text-align: right; white-space: nowrap; }
.short { white-space: nowrap; }
.long { min-width: 13rem; }
table:has(.long) :is(.number, .short) { width: 1%; }
tr:target { background: var(--panel); }
.state::before {
  content: "";
  display: inline-block;
  width: 0.7em;
  height: 0.7em;
  margin-right: 0.45em;
  border-radius: 2px;
  background: var(--state);
  print-color-adjust: exact;
  -webkit-print-color-adjust: exact;
}
details { margin: 0.8rem 0; }
summary { cursor: pointer; color: var(--muted); }
summary:hover, summary:focus-visible { color: var(--ink); }
footer { margin-top: 3rem; padding-top: 0.8rem; border-top: 1px solid var(--rule); }
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  h2 { break-after: avoid; }
  .plots { grid-template-columns: 1fr 1fr; }
  .scroll, section > figure { overflow: visible; }
  section > figure svg { min-width: 0; }
  pre { white-space: pre-wrap; }
  details:not([open])::details-content { content-visibility: visible; display: block; }
}
"""
)

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>$title</title>
<style>
$style</style>
</head>
<body>
$body
</body>
</html>
""")
