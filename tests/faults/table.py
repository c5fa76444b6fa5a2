"""What every fault cost when the tests last injected it: `python tests/faults/table.py` prints it as Markdown."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

RESULTS = Path(__file__).parents[2] / ".pytest_cache" / "d" / "faults"
"""Where the tests leave what they measured."""


@dataclass(frozen=True)
class Row:
    """One fault.

    Attributes:
        fault: What goes wrong.
        injected: How the test does it.
        happened: What followed.
        lost: Trials that never ended.
        duplicated: Trials that are in the ledger or in MLflow twice.
        seconds: From each injection to the next evaluation in the ledger, unless ``happened`` says from what else.
    """

    fault: str
    injected: str
    happened: str
    lost: int
    duplicated: int
    seconds: tuple[float, ...] = ()

    def save(self, folder: Path) -> None:
        """Keep it for the table."""
        name = re.sub(r"\W+", "-", self.fault.lower()).strip("-")
        (folder / f"{name}.json").write_text(json.dumps(asdict(self), indent=1))


def markdown(rows: list[Row]) -> str:
    """The table."""
    lines = [
        "| fault | how it is injected | what happened | trials lost | trials duplicated | seconds to recover |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        times = sorted(row.seconds)
        recovery = "-" if not times else f"{times[len(times) // 2]:.1f}"
        if len(times) > 1:
            recovery += f" (at most {times[-1]:.1f})"
        lines.append(f"| {row.fault} | {row.injected} | {row.happened} | {row.lost} | {row.duplicated} | {recovery} |")
    return "\n".join(lines)


def main() -> int:
    """Print the table of the latest results; 1 where there are none."""
    rows = [Row(**json.loads(path.read_text())) for path in sorted(RESULTS.glob("*.json"))]
    if not rows:
        print(f"no results in {RESULTS}: run pytest tests/faults first", file=sys.stderr)
        return 1
    print(markdown(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
