"""Pages that need nothing but themselves: style for phones and dark mode, a small script, and plotly's JavaScript.

A content security policy forbids all network, so a page can be opened, mailed and kept.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from moe2gguf.errors import HarnessError, OutputError

_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"

Figure = Mapping[str, Any]
"""plotly's `data` and `layout`."""

STYLE = """
:root { color-scheme: light dark; --text: #1c1e21; --back: #ffffff; --edge: #d0d4da; --soft: #f3f5f7; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e6eb; --back: #16181c; --edge: #3a3f47; --soft: #22262c; }
}
body { margin: 0; background: var(--back); color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 70rem; margin: auto; padding: 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
p, pre { overflow-wrap: anywhere; white-space: pre-line; }
pre, code { background: var(--soft); border-radius: 4px; padding: 0.1em 0.3em; font-size: 0.9em; }
pre { padding: 0.7rem; white-space: pre-wrap; }
.figure { height: 32rem; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: 0.85rem; }
th, td { border-bottom: 1px solid var(--edge); padding: 0.3rem 0.6rem; text-align: left; white-space: nowrap; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
th button { font: inherit; font-weight: 600; color: inherit; background: none; border: 0; padding: 0; cursor: pointer; }
th[aria-sort=ascending] button::after { content: " \\25B2"; }
th[aria-sort=descending] button::after { content: " \\25BC"; }
tbody tr:hover { background: var(--soft); }
"""

SCRIPT = """
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
function draw() {
  FIGURES.forEach((figure, i) => {
    const layout = structuredClone(figure.layout);
    for (const axis of [layout.xaxis, layout.yaxis]) Object.assign(axis, {gridcolor: css('--edge'), automargin: true});
    Object.assign(layout, {
      paper_bgcolor: 'rgba(0,0,0,0)', plot_bgcolor: 'rgba(0,0,0,0)', font: {color: css('--text')},
      margin: {l: 60, r: 20, t: 30, b: 50}, legend: {orientation: 'h', y: -0.2, yanchor: 'top'}, hovermode: 'closest'
    });
    Plotly.react('figure' + i, figure.data, layout, {responsive: true, displaylogo: false});
  });
}
draw();
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', draw);

for (const table of document.querySelectorAll('table.sortable')) {
const heads = [...table.tHead.rows[0].cells];
heads.forEach((head, column) => head.addEventListener('click', () => {
  const down = head.getAttribute('aria-sort') === 'ascending';
  heads.forEach(other => other.removeAttribute('aria-sort'));
  head.setAttribute('aria-sort', down ? 'descending' : 'ascending');
  const value = row => {
    const cell = row.cells[column], number = parseFloat(cell.dataset.value);
    return Number.isNaN(number) ? cell.textContent : number;
  };
  const order = (a, b) => {
    const x = value(a), y = value(b);
    if (x === '' || y === '') return (x === '') - (y === '');  // what is missing stays at the end
    const less = typeof x === 'number' && typeof y === 'number' ? x - y : String(x).localeCompare(String(y));
    return down ? -less : less;
  };
  table.tBodies[0].append(...[...table.tBodies[0].rows].sort(order));
}));
}
"""


def document(title: str, sections: Sequence[str], figures: Sequence[Figure], plotly: str) -> str:
    """Return a page of HTML `sections`; figure I is drawn in the element `figureI`. `plotly` is plotly.js."""
    data = json.dumps([*figures], allow_nan=False).replace("<", "\\u003c")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>\n"
        + "\n".join(sections)
        + f"\n</main><script>{plotly}</script><script>const FIGURES = {data};\n{SCRIPT}</script></body></html>\n"
    )


def figure(number: int, title: str) -> str:
    """Return the heading and the place of a figure."""
    return f'<h2>{escape(title)}</h2><div class="figure" id="figure{number}"></div>'


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], name: str) -> str:
    """Return a table that sorts at a click on a heading; see `cell` for the values."""
    head = "".join(f'<th><button type="button">{escape(title)}</button></th>' for title in columns)
    body = "".join("<tr>" + "".join(cell(value) for value in row) + "</tr>" for row in rows)
    start = f'<div class="wide"><table class="sortable" id="{name}">'
    return f"{start}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def cell(value: Any) -> str:
    """Return a value as a table cell: text, yes or no, a number to four digits, nothing for what is not there."""
    if value is None:
        return "<td></td>"
    if isinstance(value, bool):
        return f"<td>{'yes' if value else 'no'}</td>"
    if isinstance(value, int | float):
        return f'<td class="number" data-value="{value!r}">{value:.4g}</td>' if math.isfinite(value) else "<td></td>"
    return f"<td>{escape(str(value))}</td>"


def facts(values: Mapping[str, Any]) -> str:
    """Return settings by name as a table."""
    items = "".join(f"<tr><td>{escape(str(k))}</td><td>{escape(str(v))}</td></tr>" for k, v in values.items())
    return f'<div class="wide"><table><thead><tr><th>setting</th><th>value</th></tr></thead>{items}</table></div>'


def require_plotly(target: Path) -> None:
    """Raise HarnessError if the page cannot be made: better before the measurements than after them."""
    plotly_script()
    if not target.parent.is_dir():
        raise HarnessError(f"{target}: there is no folder {target.parent}; make it, or name another file")


def plotly_script() -> str:
    """Return plotly.js. Raises HarnessError without plotly."""
    try:
        from plotly.offline import get_plotlyjs
    except ModuleNotFoundError as error:
        raise HarnessError("the report needs plotly: pip install 'moe2gguf[report]'") from error
    return str(get_plotlyjs())


def write_page(page: str, target: Path) -> None:
    """Write a page, whole or not at all. Raises OutputError if `target` cannot be written."""
    with write_whole(target) as partial:
        partial.write_text(page, "utf-8")


@contextlib.contextmanager
def write_whole(target: Path) -> Iterator[Path]:
    """A name to write to, which becomes `target` if the block succeeds. Raises OutputError for an error of the disk."""
    partial = target.with_name(f".{target.name}.partial")
    try:
        yield partial
        os.replace(partial, target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OutputError(f"{target}: cannot be written: {error.strerror}") from error
