"""The look and the behavior of the report: a style sheet for phones and dark mode, and a small script."""

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

const table = document.getElementById('rows'), heads = [...table.tHead.rows[0].cells];
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
"""
