"""The style sheet of our pages: light and dark, from phone to desktop, on paper too."""

from __future__ import annotations

from hf_shrink.reporting.palette import BASE, DAMAGE, KEPT, ink_on


def _variables(mode: str) -> str:
    found = dict(BASE[mode])
    for name, scale in (("k", KEPT[mode]), ("d", dict(enumerate(DAMAGE[mode])))):
        for level, colour in scale.items():
            found |= {f"{name}{level}": colour, f"on-{name}{level}": ink_on(colour)}
    return " ".join(f"--{name}: {colour};" for name, colour in found.items())


def _levels() -> str:
    """A class for each step of a scale, for cells of tables and for shapes of charts."""
    names = [f"k{level}" for level in KEPT["light"]] + [f"d{level}" for level in range(len(DAMAGE["light"]))]
    return "\n".join(
        f".{name} {{ background: var(--{name}); color: var(--on-{name}); fill: var(--{name}); }}" for name in names
    )


STYLE = f"""
:root {{ color-scheme: light dark; {_variables("light")} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_variables("dark")} }} }}
* {{ box-sizing: border-box; }}
html {{ -webkit-text-size-adjust: 100%; }}
body {{ margin: 0; background: var(--back); color: var(--text);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }}
.skip {{ position: absolute; left: -99rem; }}
.skip:focus {{ left: 1rem; top: 1rem; background: var(--back); padding: .5rem 1rem; z-index: 2; }}
a {{ color: var(--accent); text-underline-offset: .2em; }}
:focus-visible {{ outline: 3px solid var(--accent); outline-offset: 2px; }}
header, nav, main, footer {{ max-width: 66rem; margin: 0 auto; padding: 0 clamp(1rem, 4vw, 2rem); }}
header {{ padding-top: 2.5rem; }}
.kind {{ margin: 0; color: var(--soft); font-size: .875rem; letter-spacing: .04em; text-transform: uppercase; }}
h1 {{ font-size: clamp(1.5rem, 1.1rem + 1.8vw, 2.125rem); line-height: 1.2; margin: .25rem 0 .75rem;
  overflow-wrap: anywhere; letter-spacing: -.01em; }}
.lede {{ font-size: 1.125rem; margin: 0; max-width: 44rem; overflow-wrap: anywhere; }}
nav ul {{ max-width: none; list-style: none; display: flex; flex-wrap: wrap; gap: 0 1.25rem; padding: .75rem 0;
  margin: 1.25rem 0 0; border-block: 1px solid var(--line); font-size: .9375rem; }}
nav a {{ display: inline-block; padding: .2rem 0; text-decoration: none; }}
nav a:hover {{ text-decoration: underline; }}
section {{ margin-top: 3rem; }}
h2 {{ font-size: 1.3125rem; line-height: 1.3; margin: 0 0 .5rem; letter-spacing: -.005em; }}
h3 {{ font-size: 1rem; margin: 1.75rem 0 .5rem; }}
p, ul, ol {{ max-width: 44rem; margin: .5rem 0; }}
li {{ margin: .25rem 0; overflow-wrap: anywhere; }}
.note, figcaption, caption, summary {{ color: var(--soft); font-size: .9375rem; }}
footer {{ margin-top: 4rem; padding-block: 1.5rem; color: var(--soft); font-size: .875rem; }}
.hidden {{ position: absolute; width: 1px; height: 1px; margin: -1px; overflow: hidden; clip-path: inset(50%);
  white-space: nowrap; }}

.tiles {{ display: grid; gap: 1rem; margin: 1.5rem 0; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); }}
.tiles > div {{ border: 1px solid var(--line); border-radius: 10px; padding: 1rem 1.125rem; }}
.tiles dt {{ color: var(--soft); font-size: .9375rem; }}
.tiles dd {{ margin: 0; }}
.figure {{ font-size: 1.875rem; font-weight: 650; line-height: 1.25; font-variant-numeric: tabular-nums;
  letter-spacing: -.015em; }}
.unit {{ font-size: .55em; font-weight: 500; letter-spacing: 0; color: var(--soft); }}
.dense {{ color: var(--soft); }}
.change {{ display: block; font-weight: 600; font-size: .9375rem; margin-top: .25rem; }}
.bar {{ display: block; height: 6px; border-radius: 3px; margin: .625rem 0 0; background: var(--line); }}
.bar i {{ display: block; height: 100%; border-radius: 3px; background: var(--accent); }}
.bar + .bar {{ margin-top: .25rem; }}
.bar.was i {{ background: var(--dense); }}

table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
caption {{ text-align: left; padding-bottom: .5rem; }}
th, td {{ padding: .5rem 0 .5rem 1.25rem; border-bottom: 1px solid var(--line); vertical-align: baseline; }}
th:first-child {{ padding-left: 0; }}
th {{ text-align: left; font-weight: 600; }}
thead th {{ color: var(--soft); font-size: .875rem; font-weight: 500; }}
td, thead th:not(:first-child) {{ text-align: right; }}
.wide {{ width: 100%; }}
.interval {{ color: var(--soft); font-size: .875em; white-space: nowrap; }}
dl.meanings {{ margin: .5rem 0; max-width: 44rem; }}
dl.meanings dt {{ font-weight: 600; margin-top: .5rem; }}
dl.meanings dd {{ margin: 0; }}

figure {{ margin: 1.25rem 0; }}
figcaption {{ margin-bottom: .5rem; max-width: 44rem; }}
details {{ margin: .5rem 0; }}
summary {{ cursor: pointer; padding: .25rem 0; }}
.scroll {{ overflow-x: auto; max-width: 100%; position: relative; }}
.tall {{ max-height: 24rem; overflow-y: auto; }}
svg {{ display: block; width: 100%; overflow: visible; }}
svg text {{ fill: var(--soft); font-size: 12px; font-variant-numeric: tabular-nums; }}
svg text.name {{ fill: var(--text); }}
.grid {{ stroke: var(--line); }} .base {{ stroke: var(--soft); }}
.main {{ fill: var(--accent); stroke: var(--accent); }} .other {{ fill: var(--other); stroke: var(--other); }}
.muted {{ fill: var(--dense); stroke: var(--dense); }} .ring {{ fill: none; stroke: var(--text); stroke-width: 2; }}
rect.main, rect.other, rect.muted {{ stroke: none; }} .dot {{ stroke: var(--soft); stroke-width: 1; }}
.legend {{ list-style: none; display: flex; flex-wrap: wrap; gap: .25rem 1rem; padding: 0; margin: .5rem 0;
  font-size: .875rem; color: var(--soft); }}
.legend i {{ display: inline-block; width: .875rem; height: .875rem; border-radius: 3px; margin-right: .375rem;
  vertical-align: -.125rem; border: 1px solid var(--line); }}
.legend i.main {{ background: var(--accent); }} .legend i.other {{ background: var(--other); }}
.legend i.muted {{ background: var(--dense); }}

.map {{ border-collapse: separate; border-spacing: 2px; }}
.map th, .map td {{ border: 0; padding: 0; }}
.map td {{ min-width: 1.625rem; height: 1.625rem; border-radius: 4px; text-align: center; vertical-align: middle;
  font-size: .75rem; font-weight: 600; line-height: 1; }}
.map thead th:not(:first-child) {{ text-align: center; font-size: .75rem; font-weight: 400; }}
.map th:first-child {{ position: sticky; left: 0; z-index: 1; background: var(--back); padding-right: .75rem;
  white-space: nowrap; font-size: .8125rem; font-weight: 400; color: var(--text); vertical-align: middle; }}
.gone {{ background: repeating-linear-gradient(45deg, var(--back) 0 3px, var(--line) 3px 5px); color: var(--text); }}
.nothing {{ background: none; color: var(--soft); }}

pre, blockquote {{ background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: .75rem 1rem;
  margin: .5rem 0; white-space: pre-wrap; overflow-wrap: anywhere; }}
pre, code {{ font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace;
  font-size: .875rem; }}
code {{ overflow-wrap: anywhere; }}
.columns {{ display: grid; gap: 0 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }}
.columns h4 {{ margin: .5rem 0 0; font-size: .9375rem; font-weight: 600; }}
{_levels()}
@media (max-width: 36rem) {{
  .tiles {{ grid-template-columns: 1fr 1fr; gap: .75rem; }}
  .tiles > div {{ padding: .75rem .875rem; }}
  .figure {{ font-size: 1.375rem; }}
  .wide {{ font-size: .875rem; }} .wide thead th {{ font-size: .8125rem; }}
  th, td {{ padding-left: .375rem; }}
  .interval {{ display: block; font-size: .75rem; white-space: normal; }}
  section {{ margin-top: 2.25rem; }}
}}
@media print {{ nav, .skip {{ display: none; }} section {{ break-inside: avoid; }} }}
"""
