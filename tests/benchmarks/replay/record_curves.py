"""Records the learning curves of a full grid: every configuration trained to its full budget, on real data.

    python tests/benchmarks/replay/record_curves.py [--to FILE.csv] [--storage DIR] [--study FILE.yaml] [--set K=V]

The study is `grid.yaml` (the quickstart's data and model, cheap settings), run by peftsearch itself. Run the same
command again after an interruption: it goes on where it was. What a domain has no curve of yet is left out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from curve_table import write_table

HERE = Path(__file__).parent
TABLE = HERE / "data" / "curves.csv"


def record(study_file: Path, storage: Path, table: Path, overrides: list[str]) -> int:
    """Run what is left of the grid, and write the table; returns the number of curves."""
    from peftsearch import Study

    study = Study.from_file(study_file, storage=storage, overrides=overrides)
    study.run()
    return write_table(table, study.trials(), study.facts())


def main() -> None:
    """Record the curves."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--to", type=Path, default=TABLE, help="the table")
    parser.add_argument("--storage", type=Path, default=Path("replay-storage"), help="where the study lives meanwhile")
    parser.add_argument("--study", type=Path, default=HERE / "grid.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as of peftsearch run")
    options = parser.parse_args()
    curves = record(options.study, options.storage, options.to, options.set)
    print(f"{curves} curves, {options.to.stat().st_size / 1000:.0f} kB: {options.to}")


if __name__ == "__main__":
    main()
