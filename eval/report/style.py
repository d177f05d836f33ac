"""The style sheet of a report: system fonts, light and dark, phone and desk."""

from __future__ import annotations

from eval.report.figures import DARK, LIGHT, Theme


def _variables(theme: Theme, page: str, soft: str) -> str:
    return (
        f"--page:{page};--card:{theme.paper};--soft:{soft};--ink:{theme.ink};--faint:{theme.faint};"
        f"--line:{theme.line};--main:{theme.main};--second:{theme.second};--alarm:{theme.alarm};"
    )


_RULES = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);
  font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
  font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
main,header,footer{max-width:72rem;margin:0 auto;padding:0 clamp(1rem,4vw,2.5rem)}
header{padding-top:clamp(1.75rem,5vw,3.5rem)}
.eyebrow{margin:0;color:var(--faint);font-size:.875rem;letter-spacing:.02em}
h1{margin:.15rem 0 .35rem;font-size:clamp(1.75rem,1.3rem + 2.2vw,2.6rem);line-height:1.15;
  letter-spacing:-.015em;font-weight:650}
h2{margin:clamp(2.5rem,6vw,3.75rem) 0 .4rem;font-size:1.35rem;line-height:1.25;letter-spacing:-.01em;
  font-weight:650}
h3{margin:1.75rem 0 .6rem;font-size:1rem;line-height:1.4;font-weight:600}
p{margin:.35rem 0 .9rem;max-width:44rem}
.lead{color:var(--faint);margin:0}
.note{color:var(--faint);font-size:.9rem;font-weight:400}
nav{margin-top:1.1rem}
nav ul{display:flex;flex-wrap:wrap;gap:.3rem 1.1rem;list-style:none;margin:0;padding:0;font-size:.925rem}
a{color:var(--main);text-underline-offset:.2em}
a:focus-visible,[tabindex]:focus-visible{outline:2px solid var(--main);outline-offset:3px;border-radius:2px}
.numbers{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(19rem,100%),1fr));gap:.85rem;
  margin:.85rem 0 0}
.card{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:1rem 1.15rem 1.1rem}
.wide{margin-top:1.1rem;padding:1.3rem 1.4rem 1.4rem}
dt{color:var(--faint);font-size:.9rem}
dd{margin:0}
.value{display:block;font-size:1.7rem;line-height:1.25;font-weight:640;letter-spacing:-.02em}
.range{display:block;color:var(--faint);font-size:.875rem}
.says{display:block;margin-top:.45rem;font-size:.875rem;line-height:1.45;color:var(--faint)}
.alarm .value,.warn{color:var(--alarm)}
.pair{margin:0;display:grid;grid-template-columns:repeat(auto-fit,minmax(min(13rem,100%),1fr));gap:.9rem 2rem}
.pair .value{font-size:clamp(2rem,1.5rem + 2vw,2.75rem)}
.pair .of .value{color:var(--second)}
.gauge{position:relative;height:8px;border-radius:4px;background:var(--line);margin:1rem 0 .2rem}
.gauge i{position:absolute;inset:0 auto 0 0;border-radius:4px;background:var(--main)}
.gauge b{position:absolute;top:-5px;bottom:-5px;width:3px;margin-left:-1.5px;border-radius:2px;
  background:var(--second)}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(24rem,100%),1fr));gap:1rem;
  margin-top:1rem}
figure{margin:0}
.plots figure{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:.9rem}
.plots img{display:block;width:100%;height:auto}
.plots figcaption{margin-top:.7rem;color:var(--faint);font-size:.875rem;line-height:1.45}
.scroll{overflow-x:auto;margin:1rem 0;background:var(--card);border:1px solid var(--line);border-radius:12px}
table{border-collapse:collapse;width:100%;font-size:.875rem;line-height:1.4}
th,td{padding:.55rem .9rem;text-align:left;vertical-align:top;border-top:1px solid var(--line);
  overflow-wrap:normal}
thead th{border-top:0;color:var(--faint);font-weight:500;white-space:nowrap}
tbody th{font-weight:500;min-width:11rem}
.n{text-align:right;white-space:nowrap}
.long{min-width:13rem;overflow-wrap:anywhere}
.file{white-space:nowrap}
code{font:.92em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.pictures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(9.25rem,46%),1fr));gap:1rem .85rem}
.pictures img,.drift img{display:block;width:100%;height:auto;border-radius:8px;background:var(--soft)}
.pictures figcaption{margin-top:.4rem;font-size:.8125rem;line-height:1.4;color:var(--faint)}
.pictures .scores{display:grid;grid-template-columns:auto 1fr;column-gap:.6rem}
.scores b{font-weight:550;color:var(--ink);text-align:right}
.tags{display:flex;flex-wrap:wrap;gap:.25rem;margin-top:.3rem}
.tag{padding:.05rem .45rem;border-radius:99px;border:1px solid currentColor;color:var(--faint);
  font-size:.75rem;line-height:1.5}
.tag.good{color:var(--second)}
.tag.bad{color:var(--alarm)}
.number{display:inline-block;min-width:1.65em;margin-right:.5em;padding:0 .35em;border-radius:99px;
  background:var(--main);color:var(--card);font-size:.8em;line-height:1.65;text-align:center}
.drift{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(19rem,100%),1fr));gap:1.25rem;
  margin-top:1rem}
.drift .two{display:grid;grid-template-columns:1fr 1fr;gap:.5rem}
.drift h3{margin:0 0 .5rem}
.drift figcaption{font-size:.8125rem;color:var(--faint);margin-top:.3rem}
footer{padding-top:2.5rem;padding-bottom:3rem;color:var(--faint);font-size:.875rem}
@media print{.card,.plots figure,.scroll{break-inside:avoid}nav{display:none}}
"""


def style_sheet() -> str:
    """All rules, for a `style` element."""
    light = _variables(LIGHT, "#f7f8f9", "#eceff1")
    dark = _variables(DARK, "#12161a", "#252b31")
    return (
        f":root{{color-scheme:light dark;{light}}}"
        f"@media (prefers-color-scheme:dark){{:root{{{dark}}}}}{_RULES}"
    )
