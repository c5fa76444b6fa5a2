"""A report as one page that holds everything it shows: it opens offline, in light and dark, on a phone too."""

from __future__ import annotations

import html

from peftsearch.frontier.report.document import Block, Document, Figure, Heading, Points, Table, Text
from peftsearch.frontier.report.figures import page_svg

_SHORT = 24
"""Words of at most so many characters stay on one line."""
_WIDE = 900
"""Pixels: pictures above it stand over their table and not beside it."""


def page(document: Document) -> str:
    """The whole report."""
    anchors = {
        index: f"s{index}"
        for index, block in enumerate(document.blocks)
        if isinstance(block, Heading) and block.level == 2
    }
    contents = "".join(
        f'<a href="#{anchor}">{html.escape(document.blocks[index].text)}</a>'  # type: ignore[union-attr]
        for index, anchor in anchors.items()
    )
    body = "\n".join(_block(block, index, anchors) for index, block in enumerate(document.blocks))
    title = html.escape(document.title)
    return _PAGE.format(title=title, style=_STYLE, contents=contents, body=body)


def _block(block: Block, index: int, anchors: dict[int, str]) -> str:
    if isinstance(block, Heading):
        anchor = f' id="{anchors[index]}"' if index in anchors else ""
        return f"<h{block.level}{anchor}>{html.escape(block.text)}</h{block.level}>"
    if isinstance(block, Text):
        return f"<p>{html.escape(block.text)}</p>"
    if isinstance(block, Points):
        items = "".join(
            "<li>" + (f"<b>{html.escape(lead)}</b>: " if lead else "") + f"{html.escape(text)}</li>"
            for lead, text in block.items
        )
        return f"<ul>{items}</ul>"
    if isinstance(block, Figure):
        picture, width = page_svg(block.svg, html.escape(block.title), f"f{index}-")
        wide = " wide" if width > _WIDE else ""
        return (
            f'<div class="pair{wide}"><figure><figcaption>{html.escape(block.title)}</figcaption>'
            f'<div class="plot">{picture}</div></figure>{_table(block.table)}</div>'
        )
    return _table(block)


def _table(table: Table) -> str:
    caption = html.escape(table.caption)
    notes = "".join(f'<p class="note">{html.escape(note)}</p>' for note in table.notes)
    if not table.rows:
        return f'<p class="note">{caption}</p>{notes}'
    head = "".join(f'<th scope="col"{_class(i, table)}>{html.escape(title)}</th>' for i, title in enumerate(table.head))
    rows = "".join(
        "<tr>" + "".join(_cell(text, line, i, table) for i, text in enumerate(row)) + "</tr>"
        for line, row in enumerate(table.rows)
    )
    source = f" <span>({html.escape(table.source)})</span>" if table.source else ""
    content = (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{caption}"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )
    if table.folded:
        return f'<details class="table"><summary>{caption}{source}</summary>{content}{notes}</details>'
    return f'<div class="table"><p class="caption">{caption}{source}</p>{content}{notes}</div>'


def _cell(text: str, line: int, column: int, table: Table) -> str:
    # A setting such as lr=3.1e-04 is not torn apart at the end of a line.
    content = " ".join(f"<span>{html.escape(w)}</span>" if "=" in w else html.escape(w) for w in text.split(" "))
    if (line, column) in table.best:
        content = f"<b>{content}</b>"
    if column < table.words and len(text) <= _SHORT:
        return f'<td class="l k">{content}</td>'
    return f"<td{_class(column, table)}>{content}</td>"


def _class(column: int, table: Table) -> str:
    return ' class="l"' if column < table.words else ""


# The policy makes it certain that nothing is fetched, whatever a name in the study might contain.
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<header><h1>{title}</h1><nav aria-label="Contents">{contents}</nav></header>
<main>
{body}
</main>
</body>
</html>
"""

_STYLE = """
:root { --paper: #ffffff; --ink: #1f2937; --faint: #6b7280; --line: #e5e7eb; --link: #1d4ed8; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #15181d; --ink: #e5e7eb; --faint: #9ca3af; --line: #333a45; --link: #93c5fd; } }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; }
body { margin: 0 auto; max-width: 1500px; padding: 1rem 1.25rem 3rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { margin: 0.2rem 0; font-size: 1.5rem; }
h2 { margin: 2.2rem 0 0.4rem; font-size: 1.25rem; border-bottom: 1px solid var(--line); }
h3 { margin: 1.4rem 0 0.2rem; font-size: 1.05rem; }
p { margin: 0.4rem 0; max-width: 75ch; } ul { margin: 0.4rem 0; padding-left: 1.2rem; max-width: 85ch; }
nav { display: flex; flex-wrap: wrap; gap: 0.2rem 1rem; font-size: 0.9rem; } a { color: var(--link); }
.pair { display: grid; grid-template-columns: minmax(0, 3fr) minmax(0, 2fr); gap: 1.25rem; align-items: start; }
@media (max-width: 1050px) { .pair { grid-template-columns: minmax(0, 1fr); gap: 0; } }
.pair.wide { grid-template-columns: minmax(0, 1fr); gap: 0; }
figure { margin: 0.6rem 0; min-width: 0; } .plot { overflow-x: auto; }
.plot svg { display: block; width: 100%; height: auto; }
.plot svg * { stroke-linejoin: round; stroke-linecap: butt; }
figcaption, .caption, summary { font-size: 0.88rem; color: var(--faint); padding-bottom: 0.3rem; max-width: none; }
.table { min-width: 0; margin: 0.6rem 0; } .scroll { overflow: auto; max-height: 32rem; }
td span { white-space: nowrap; }
table { border-collapse: collapse; font-size: 0.84rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.28rem 0.55rem; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: normal; }
th { font-weight: 600; position: sticky; top: 0; background: var(--paper); }
td { white-space: nowrap; } td.l { white-space: normal; min-width: 4.5rem; } td.k { white-space: nowrap; }
.l { text-align: left; }
.note { font-size: 0.84rem; color: var(--faint); } summary { cursor: pointer; }
@media print { .scroll { max-height: none; overflow: visible; } nav { display: none; } }
"""
