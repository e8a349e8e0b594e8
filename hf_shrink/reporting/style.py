"""The style sheet of report.html: light and dark, from phone to desktop."""

STYLE = """
:root { --back: #ffffff; --text: #1b1f24; --soft: #59636e; --line: #d1d9e0; --panel: #f6f8fa;
  --dense: #8c959f; --small: #0b6bcb; --on: #ffffff;
  --b2: #8f1d14; --b3: #a8480c; --b4: #1f6f43; --b5: #0f6a6a; --b6: #0b5cad; --b7: #4b45b8; --b8: #6b2fa0; }
@media (prefers-color-scheme: dark) { :root { --back: #0d1117; --text: #e6edf3; --soft: #9da7b3; --line: #30363d;
  --panel: #161b22; --dense: #6e7681; --small: #4493f8; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; border-bottom: 1px solid var(--line); padding-bottom: .25rem; }
h3 { font-size: 1rem; margin: 1rem 0 .25rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .75rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { text-align: left; font-weight: 600; }
td, thead th { text-align: right; white-space: nowrap; }
th small { display: block; color: var(--soft); font-weight: 400; min-width: 11rem; }
pre, blockquote { background: var(--panel); border: 1px solid var(--line); border-radius: 6px; padding: .75rem;
  margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
pre, code { font-family: ui-monospace, monospace; font-size: .9em; }
code { overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
.columns { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 16rem), 1fr)); }
svg { display: block; width: 100%; height: auto; max-height: 32rem; }
.label { fill: var(--text); font-size: 13px; } .cell { fill: var(--on); font-size: 13px; font-weight: 600; }
.axis { stroke: var(--line); } .bar0 { fill: var(--dense); } .bar1 { fill: var(--small); }
.none { fill: var(--dense); } .b2 { fill: var(--b2); } .b3 { fill: var(--b3); } .b4 { fill: var(--b4); }
.b5 { fill: var(--b5); } .b6 { fill: var(--b6); } .b7 { fill: var(--b7); } .b8 { fill: var(--b8); }
"""
