"""Pages that need nothing but themselves: words, figures, a table and how it was measured, with plotly's JavaScript.

A page is a `Page`, made of `Figure` and `Table`; everything in it is plain text but `heading`, `summary` and `method`,
which are HTML. A content security policy forbids all network, so a page can be opened, mailed and kept.
"""

import base64
import gzip
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from moe2gguf.errors import HarnessError
from moe2gguf.gguf.outputs import write_whole

_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


@dataclass(frozen=True)
class Figure:
    """A figure with a heading; `data` and `layout` are plotly's, `words` is a sentence on what good looks like."""

    title: str
    data: Sequence[Mapping[str, Any]]
    layout: Mapping[str, Any]
    words: str = ""


@dataclass(frozen=True)
class Table:
    """A table that sorts at a click on a heading; see `_cell` for the values. `words` (HTML) explain its columns."""

    title: str
    words: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    name: str = "rows"


@dataclass(frozen=True)
class Page:
    """A page from top to bottom.

    title      of the window
    heading    HTML
    summary    paragraphs of HTML: the result in sentences
    figures, table
    arguments  the command line that made it, the program first
    method     how it was measured: blocks of HTML
    facts      settings, versions and the machine, by name
    """

    title: str
    heading: str
    summary: Sequence[str]
    figures: Sequence[Figure]
    table: Table
    arguments: Sequence[str]
    method: Sequence[str]
    facts: Mapping[str, Any] = field(default_factory=dict)


COLORS = ("#2a8fd0", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#7f7f7f")
"""Told apart by most eyes, on white and on black."""

DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
_TICKS = 12

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
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: 0.85rem; width: max-content; }
th, td { border-bottom: 1px solid var(--edge); padding: 0.3rem 0.6rem; text-align: left; }
th { white-space: nowrap; }
td { max-width: min(36rem, 60vw); overflow-wrap: anywhere; vertical-align: top; }
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
      margin: {l: 60, r: 20, t: 30, b: 50}, legend: {orientation: 'h', y: 1.02, yanchor: 'bottom'},
      hovermode: 'closest', hoverlabel: {namelength: -1},
      modebar: {bgcolor: 'rgba(0,0,0,0)', color: 'gray', activecolor: css('--text')}
    });
    const place = document.getElementById('figure' + i), names = figure.data.map(one => (one.name ?? '').length);
    const lines = names.length / Math.max(1, Math.floor(place.clientWidth / (60 + 7 * Math.max(...names))));
    place.style.height = 26 + 1.3 * Math.min(Math.ceil(lines), 20) + 'rem';
    Plotly.react('figure' + i, figure.data, layout, {responsive: true, displaylogo: false});
  });
}
async function start() {
  const packed = Uint8Array.fromBase64?.(PLOTLY) ?? Uint8Array.from(atob(PLOTLY), letter => letter.charCodeAt(0));
  const script = document.createElement('script');
  script.text = await new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream('gzip'))).text();
  document.head.append(script);
  draw();
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', draw);
}
start();

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


def render_page(page: Page, plotly: str) -> str:
    """Return the page as HTML; `plotly` is the text of plotly.js."""
    sections = [
        f"<h1>{page.heading}</h1>",
        *(f"<p>{line}</p>" for line in page.summary),
        "<noscript><p>The figures need JavaScript, which is off; the table has all numbers.</p></noscript>",
        *(
            f'<h2>{escape(one.title)}</h2><div class="figure" id="figure{i}"></div><p>{escape(one.words)}</p>'
            for i, one in enumerate(page.figures)
        ),
        f"<h2>{page.table.title}</h2>",
        f"<p>A click on a heading sorts by it. {page.table.words}</p>",
        _table(page.table),
        "<h2>How it was measured</h2>",
        f"<pre>{escape(shlex.join(['moe2gguf', *page.arguments[1:]]))}</pre>",
        *page.method,
        plain_table("setting", "value", page.facts),
    ]
    figures = [{"data": [*one.data], "layout": one.layout} for one in page.figures]
    data = json.dumps(figures, allow_nan=False).replace("<", "\\u003c")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(page.title)}</title><style>{STYLE}</style></head><body><main>\n"
        + "\n".join(sections)
        + f'\n</main><script>const FIGURES = {data};\nconst PLOTLY = "{_pack(plotly)}";\n'
        + f"{SCRIPT}</script></body></html>\n"
    )


def _pack(script: str) -> str:
    """A script, compressed, as text: a page is half as large with it, and every browser since 2023 unpacks it."""
    return base64.b64encode(gzip.compress(script.encode(), mtime=0)).decode()


def write_page(page: Page, target: Path) -> None:
    """Write a page, whole or not at all. Raises HarnessError without plotly, OutputError for an error of the disk."""
    text = render_page(page, plotly_script())
    with write_whole(target) as partial:
        partial.write_text(text, "utf-8", errors="replace")  # a path may be no UTF-8


# --- figures ---


def draw_line(
    name: str, x: Sequence[Any], y: Sequence[Any], mode: str = "lines+markers", **more: Any
) -> dict[str, Any]:
    """Return a line or points of a figure; `name` is plain text."""
    return {"type": "scatter", "mode": mode, "name": escape(shorten_name(name)), "x": [*x], "y": [*y], **more}


def shorten_name(name: str, most: int = 48) -> str:
    """Return a name that a legend has room for: start and end of a long one, as the end tells type and count."""
    return name if len(name) <= most else f"{name[: most // 2]}…{name[-most // 2 + 1 :]}"


def draw_map(
    rows: Sequence[Sequence[float]],
    hover: str,
    y: Sequence[int] | None = None,
    limits: tuple[float, float] | None = None,
) -> dict[str, Any]:
    """Return a heat map of numbers, row after row from the top; `hover` may use plotly's %{x}, %{y} and %{z}."""
    trace: dict[str, Any] = {
        "type": "heatmap",
        "z": [list(row) for row in rows],
        "x": [*range(len(rows[0]))],
        "y": [*range(len(rows))] if y is None else [*y],
        "colorscale": "Viridis",
        "colorbar": {"thickness": 12},
        "hovertemplate": f"{hover}<extra></extra>",
    }
    return trace | ({"zmin": limits[0], "zmax": limits[1]} if limits else {})


def label_axes(x: str, y: str, *, log: bool = False, counts: Sequence[int] = ()) -> dict[str, Any]:
    """Return the layout of a figure with these titles.

    `log`: the upright axis is logarithmic; `counts`: the values on the other one, whole numbers, of which a dozen at
    most get a tick.
    """
    scale = {"type": "log", "exponentformat": "power", "nticks": 8} if log else {}
    values = sorted(set(counts))
    ticks = {"tickmode": "array", "tickvals": values[:: math.ceil(len(values) / _TICKS)]} if values else {}
    return {"xaxis": {"title": {"text": x}, **ticks}, "yaxis": {"title": {"text": y}, **scale}}


def label_map(x: str, y: str) -> dict[str, Any]:
    """Return the layout of a heat map: whole numbers only, the first row on top."""
    axes = [{"title": {"text": title}, "type": "category"} for title in (x, y)]
    return {"xaxis": axes[0], "yaxis": axes[1] | {"autorange": "reversed"}}


def mark_value(axis: str, value: float) -> dict[str, Any]:
    """Return a dashed line across a figure at a value of its axis, "x" or "y"."""
    other = "y" if axis == "x" else "x"
    ends = {f"{axis}0": value, f"{axis}1": value, f"{other}0": 0, f"{other}1": 1, f"{other}ref": "paper"}
    return {"type": "line", "line": {"dash": "dash", "width": 1, "color": "gray"}, **ends}


# --- tables ---


def _table(table: Table) -> str:
    head = "".join(f'<th><button type="button">{escape(title)}</button></th>' for title in table.columns)
    body = "".join("<tr>" + "".join(_cell(value) for value in row) + "</tr>" for row in table.rows)
    start = f'<div class="wide"><table class="sortable" id="{table.name}">'
    return f"{start}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _cell(value: Any) -> str:
    """Return a value as a table cell: text, yes or no, a number to four digits, nothing for what is not there."""
    if value is None:
        return "<td></td>"
    if isinstance(value, bool):
        return f"<td>{'yes' if value else 'no'}</td>"
    if isinstance(value, int | float):
        return f'<td class="number" data-value="{value!r}">{value:.4g}</td>' if math.isfinite(value) else "<td></td>"
    return f"<td>{escape(str(value))}</td>"


def plain_table(name: str, value: str, values: Mapping[str, Any], *, code: bool = False) -> str:
    """Return values by name as a table of two columns with these headings; `code` sets the values in its type."""
    start, end = ("<code>", "</code>") if code else ("", "")
    items = "".join(
        f"<tr><td>{escape(str(k))}</td><td>{start}{escape(str(v))}{end}</td></tr>" for k, v in values.items()
    )
    return f'<div class="wide"><table><thead><tr><th>{name}</th><th>{value}</th></tr></thead>{items}</table></div>'


# --- files ---


def plotly_script() -> str:
    """Return plotly.js. Raises HarnessError without plotly: call it before the measurements, not after them."""
    try:
        from plotly.offline import get_plotlyjs
    except ModuleNotFoundError as error:
        raise HarnessError("the report needs plotly: pip install plotly") from error
    return str(get_plotlyjs())
