"""What the battery trains, as the table of methods and tasks in studies/README.md.

Written anew by ``PYTHONPATH=tests python tests/battery/battery_table.py``.
"""

from __future__ import annotations

from pathlib import Path

from test_battery import BASES, CASES, CONFIGURATIONS, VARIANTS

from peftsearch.domains import TASKS

README = Path(__file__).parents[2] / "studies" / "README.md"
LETTERS = {"encoder": "E", "encoder-decoder": "S", "decoder": "D"}
REFUSED = "-"


def table() -> str:
    """A line for each method and variant, a column for each task, a letter for each kind of model.

    A variant is trained on few tasks only, and refused by none that its method does: of methods alone a dash shows the
    kinds that are missing.
    """
    tasks = list(TASKS)
    done = {(name, task, BASES[base][0]) for base, task, name in CASES}
    lines = [["", *(f"`{task}`" for task in tasks)], ["---"] * (len(tasks) + 1)]
    for name in CONFIGURATIONS:
        missing = "" if name in VARIANTS else REFUSED
        cells = [
            " ".join(
                filter(None, (letter if (name, task, kind) in done else missing for kind, letter in LETTERS.items()))
            )
            for task in tasks
        ]
        lines.append([_called(name), *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _called(name: str) -> str:
    if name not in VARIANTS:
        return f"`{name}`"
    method, words = VARIANTS[name]
    return f"`{method}`, {', '.join(f'`{word}`' for word in words.values())}"


def written() -> str:
    """The table as the document has it."""
    lines = README.read_text(encoding="utf-8").splitlines(keepends=True)
    start = lines.index(table().splitlines(keepends=True)[0])
    stop = next(number for number in range(start, len(lines)) if not lines[number].startswith("|"))
    return "".join(lines[start:stop])


if __name__ == "__main__":
    README.write_text(README.read_text(encoding="utf-8").replace(written(), table()), encoding="utf-8")
