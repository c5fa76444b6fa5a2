"""The documentation says what is tested, and no more."""

from __future__ import annotations

from battery_table import table, written


def test_the_table_of_methods_and_tasks_is_what_the_battery_trains() -> None:
    assert written() == table(), "write it anew: PYTHONPATH=tests python tests/battery/battery_table.py"
