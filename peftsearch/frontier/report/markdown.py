"""A report as Markdown, beside its pictures and CSV files."""

from __future__ import annotations

from peftsearch.frontier.report.document import Block, Document, Figure, Heading, Points, Table, Text
from peftsearch.frontier.tables import escape_markdown


def markdown(document: Document) -> str:
    """The whole report."""
    parts = [f"# {escape_markdown(document.title)}", *(_block(block) for block in document.blocks)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _block(block: Block) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.level} {escape_markdown(block.text)}"
    if isinstance(block, Text):
        return escape_markdown(block.text)
    if isinstance(block, Points):
        return "\n".join(
            f"- **{escape_markdown(lead)}**: {escape_markdown(text)}" if lead else f"- {escape_markdown(text)}"
            for lead, text in block.items
        )
    if isinstance(block, Figure):
        return f"![{escape_markdown(block.title)}]({block.name}.png)\n\n{_table(block.table)}"
    return _table(block)


def _table(table: Table) -> str:
    lines = [f"*{escape_markdown(table.caption)}*" if table.caption else ""]
    if table.folded and table.source:
        lines = [lines[0] + f" The numbers are in [{table.source}]({table.source})."]
    elif table.rows:
        lines += ["", "| " + " | ".join(escape_markdown(title) for title in table.head) + " |"]
        lines.append("|" + "|".join(":---" if i < table.words else "---:" for i in range(len(table.head))) + "|")
        for line, row in enumerate(table.rows):
            cells = [escape_markdown(text) for text in row]
            cells = [f"**{text}**" if (line, i) in table.best else text for i, text in enumerate(cells)]
            lines.append("| " + " | ".join(cells) + " |")
    lines += [f"\n{escape_markdown(note)}" for note in table.notes]
    return "\n".join(lines).strip()
