"""The frame of the report's page, and how it looks: on a screen, light or dark, on a phone, and in print."""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
{style}
</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

STYLE = """\
:root { color-scheme: light dark; --text: #1c2024; --soft: #5b6470; --line: #d9dee4;
  --page: #ffffff; --tint: #f4f6f8; --link: #0b5cad;
  --better: #00634a; --worse: #a33f00; --caution: #b8860b; --missing: #a33f00; }
@media screen and (prefers-color-scheme: dark) {
  :root { --text: #e4e7eb; --soft: #a2abb6; --line: #39414b; --page: #15181c; --tint: #1f242a; --link: #7db8f5;
    --better: #4fd1a5; --worse: #ff9d5c; --caution: #d9a520; --missing: #ff9d5c; }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
main { max-width: 82rem; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin: 2.6rem 0 .8rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 0 0 .6rem; }
p, li { max-width: 50rem; overflow-wrap: break-word; }
ul { padding-left: 1.3rem; }
li { margin: .25rem 0; }
a { color: var(--link); }
.answer { font-size: 1.2rem; font-weight: 600; line-height: 1.4; }
.caution { border-left: 4px solid var(--caution); background: var(--tint); padding: .6rem .9rem;
  margin: .6rem 0; }
.missing-list { border-left: 4px solid var(--missing); background: var(--tint); padding: .6rem .9rem .6rem 2rem;
  max-width: 50rem; }
nav ul { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: 1.2rem 0 0; padding: 0;
  font-size: .92rem; }
.note, figcaption { color: var(--soft); font-size: .9rem; max-width: 52rem; }
.verdicts { list-style: none; padding: 0; }
.verdicts li { padding-left: 6.6rem; position: relative; margin: .45rem 0; }
.kind { position: absolute; left: 0; width: 6rem; text-align: center; font-size: .78rem; font-weight: 600;
  line-height: 1.5; margin-top: .12rem; border: 1px solid currentColor; border-radius: 4px; color: var(--soft); }
.kind.better { color: var(--better); }
.kind.worse, .kind.missing { color: var(--worse); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .86rem; }
th, td { padding: .4rem .5rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
.text, .facts :is(th, td) { text-align: left; }
.result, .tuning { font-variant-numeric: tabular-nums; }
thead th { border-bottom: 2px solid var(--soft); }
.result td:first-child { font-weight: 600; }
:is(.result, .tuning) tbody tr:hover { background: var(--tint); }
.facts th { font-weight: 600; vertical-align: top; }
.facts td { white-space: normal; overflow-wrap: anywhere; }
td small { display: block; font-size: .82em; color: var(--soft); }
thead th { white-space: normal; vertical-align: bottom; }
code { font: .92em ui-monospace, "SF Mono", Menlo, "Liberation Mono", monospace; overflow-wrap: anywhere; }
details summary { cursor: pointer; padding: .3rem 0; color: var(--link); }
figure { margin: 0 0 2.2rem; }
figure img { display: block; max-width: 100%; height: auto; background: #fff; border: 1px solid var(--line);
  border-radius: 6px; }
figcaption { margin-top: .5rem; }
@media (max-width: 40rem) {
  main { padding: 1.2rem .9rem 3rem; }
  h1 { font-size: 1.45rem; }
  .answer { font-size: 1.08rem; }
  .verdicts li { padding-left: 0; }
  .kind { position: static; display: inline-block; }
  figure img { max-width: none; width: max(100%, 36rem); } /* scrolls, and can be read */
  .facts :is(tr, th, td) { display: block; }
  .facts th { border-bottom: 0; padding-bottom: 0; white-space: normal; }
}
@media print {
  @page { margin: 16mm; }
  @page lying { size: landscape; }
  .wide:has(> .result) { page: lying; } /* its columns need the width */
  body { font-size: 10pt; }
  main { max-width: none; padding: 0; }
  nav { display: none; }
  h2, h3 { break-after: avoid; }
  figure, tr, .caution { break-inside: avoid; }
  table { font-size: 7.5pt; }
  th, td { padding: .2rem .3rem; }
  .wide { overflow: visible; }
  details::details-content { content-visibility: visible; height: auto; }
}"""
