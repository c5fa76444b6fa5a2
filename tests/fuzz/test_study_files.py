"""Whatever stands in a study file: it is a study, or one sentence says why not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from fuzzing import damage, effort, no_hang, seeds
from hypothesis import example, given
from hypothesis import strategies as st

from peftsearch.spec import StudyError, StudyFile

STUDY: dict[str, Any] = {
    "name": "quick",
    "description": "What for",
    "model": {"path": "package:gt/model", "revision": "main"},
    "domains": {
        "clinical": {
            "task": "classification",
            "data": {
                "source": "notes.csv",
                "columns": {"text": "text", "label": "label"},
                "split": {"validation": 0.2, "test": 0.2, "group": "document", "seed": 1},
                "limit": [4, 8],
            },
            "metric": "accuracy",
            "max_length": 32,
        },
        "legal": {"data": {"train": "a.jsonl", "test": "b.jsonl", "format": "jsonl"}, "options": {"x": [1, {"y": 2}]}},
        "both": {"data": {"join": {"a": {"source": "a.csv"}, "b": {"source": "b.csv"}}}},
    },
    "methods": {
        "lora": {"rank": {"low": 1, "high": 64, "log": True}, "learning_rate": [1e-4, 1e-3], "training": {"epochs": 2}},
        "full": {},
    },
    "search": {"trials": 8, "scheduler": "asha", "seed": 0},
    "training": {"epochs": 3, "batch_size": 16, "precision": "fp32"},
    "confirm": {"seeds": 3},
    "forgetting": {"source": "general.txt"},
    "resources": {"slots": "auto", "gpus_per_worker": 0.5},
    "tracking": {"mlflow": "off", "ledger": "auto"},
}

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(10**40), 10**40),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["", "auto", "off", "../../x", "hub:", "package:", "package:/", "hub:a/b", "/", "NaN", "1e999"]),
    st.sampled_from([2**63, -(2**63) - 1, 10**400, 1e308, 5e-324, "x" * 5000, "\ud800", "\0", "\x1b[31m"]),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def check_sentence(message: str) -> None:
    assert message
    assert message.isprintable(), message
    assert len(message) < 2000, message[:300]


def check(text: str, overrides: tuple[str, ...] = ()) -> None:
    """It loads, or it is refused in one sentence that a terminal can show."""
    with no_hang():
        try:
            file = StudyFile.parse(text, "study.yaml", overrides=overrides)
        except StudyError as error:
            check_sentence(str(error))
        else:
            # What is accepted can be kept, and opened again.
            kept = file.spec.model_dump_json()
            assert type(file.spec).model_validate_json(kept) == file.spec
            kept.encode()


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """All paths into a document."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in inner for place in places(item, (*path, key)))]


PLACES = [place for place in places(STUDY) if place]


@given(
    st.lists(
        st.tuples(st.sampled_from(PLACES), st.sampled_from(["delete", "replace", "rename", "add", "wrap"]), values),
        min_size=1,
        max_size=3,
    )
)
@effort(120)
def test_changed_studies(changes: list[tuple[tuple[Any, ...], str, Any]]) -> None:
    study = yaml.safe_load(yaml.safe_dump(STUDY))
    for place, kind, value in changes:
        parent = study
        try:
            for key in place[:-1]:
                parent = parent[key]
            if kind == "delete":
                del parent[place[-1]]
            elif kind == "replace":
                parent[place[-1]] = value
            elif kind == "rename":
                parent[str(value)[:300]] = parent.pop(place[-1])
            elif kind == "add":
                parent[place[-1]][str(value)[:300]] = value
            else:
                parent[place[-1]] = [parent[place[-1]]]
        except (KeyError, IndexError, TypeError, AttributeError):
            continue
    check(yaml.dump(study, allow_unicode=True))


TEXT = yaml.safe_dump(STUDY)


@given(seeds)
@effort(100)
def test_damaged_texts(seed: int) -> None:
    check(damage(TEXT.encode(), seed).decode("utf-8", "replace"))


@given(st.text(max_size=400))
@effort(50)
def test_any_text(text: str) -> None:
    check(text)


fragments = st.lists(
    st.sampled_from(
        [
            *("a: ", "- ", "? ", ": ", "&x ", "*x ", "!!python/object:os.system ", "!!int ", "!!binary ", "!!set "),
            *("{", "}", "[", "]", ", ", "\n", "  ", "'", '"', "|\n", ">\n", "---\n", "...\n", "%YAML 9.9\n", "#"),
            *("name: x\n", "models: ", "domains: ", "methods: ", "1e400", "0x", "0o9", ".nan", "~", "\\x", "<<: "),
            *(
                "2001-99-99",
                "1:2:3",
                "!!timestamp ",
                "!!omap ",
                "!!pairs ",
                "!!float ",
                "!!null ",
                "!!merge ",
                "=",
                "!x ",
            ),
            *("\t", '"\\ud800"'),
        ]
    ),
    max_size=40,
).map("".join)


@given(fragments)
@effort(120)
@example("a: !!python/object/apply:os.system ['touch /tmp/peftsearch-was-here']")
@example("!!python/object/new:os.system [x]")
@example("a: " + "[" * 5000)
@example("a: " + "{a: " * 5000)
@example("[" * 20000 + "]" * 20000)
@example("a:\n" + "".join(" " * n + "a:\n" for n in range(1, 1500)))
@example("a: &a [x]\n" + "".join(f"{chr(98 + n)}: &{chr(98 + n)} [{f'*{chr(97 + n)}, ' * 9}]\n" for n in range(12)))
@example("a: &a {<<: *a}")
@example("a: &a {b: 1}\nc: {<<: [*a, *a]}\nd: {<<: 1}")
@example("? {a: b}\n: c")
@example("1: a\ntrue: b\n~: c\n2001-01-01: d")
@example("a: 1\na: 2")
@example("a: !!int 9" + "9" * 5000)
@example("a: 9" + "9" * 5000)
@example("a: 1_000\nb: 0b1\nc: 190:20:30\nd: 0o17")
@example('a: "\\ud800"')
@example('"\\udc00": a')
@example("\ufeffname: x")
@example("name: x\r\nmodel: y\r")
def test_yaml_of_all_kinds(text: str) -> None:
    check(text)


@given(
    st.one_of(
        st.tuples(st.sampled_from([".".join(map(str, place)) for place in PLACES]), st.text(max_size=30)).map("=".join),
        st.text(max_size=60),
    )
)
@effort(60)
@example("name=../../x")
@example("name=..")
@example("domains.clinical=")
@example("models.0.path=x")
@example("a" + ".a" * 3000 + "=1")
@example("name={a: &a [*a]}")
def test_overrides(override: str) -> None:
    check(TEXT, (override,))


ENCODED = {
    "empty": b"",
    "utf-16": TEXT.encode("utf-16"),
    "utf-32": TEXT.encode("utf-32"),
    "latin-1": TEXT.replace("What for", "für").encode("latin-1"),
    "bom": b"\xef\xbb\xbf" + TEXT.encode(),
    "nul": b"name: \0",
    "png": b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
    "pickle": b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94\x93.",
    "gzip": b"\x1f\x8b\x08\x00" + bytes(64),
    "no end": TEXT.encode()[:-40],
    "escape": b'name: "\\e]0;title\\a"',
}


@pytest.mark.parametrize("kind", ENCODED)
def test_files_of_bytes(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_bytes(ENCODED[kind])
    with no_hang():
        try:
            StudyFile.load(path)
        except StudyError as error:
            check_sentence(str(error))


def test_what_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (
        tmp_path,
        tmp_path / "loop",
        tmp_path / "no" / "file",
        tmp_path / ("x" * 300),
        Path("a\0b"),
        "/dev/null",
        "/dev/zero",
    ):
        with pytest.raises(StudyError):
            StudyFile.load(path)


def test_the_command_line_refuses_in_one_sentence(tmp_path: Path) -> None:
    """A sample through the real program, one process for all of them."""
    texts = [damage(TEXT.encode(), seed) for seed in range(6)] + [*ENCODED.values(), b"a: " + b"[" * 3000]
    files = []
    for number, data in enumerate(texts):
        files.append(tmp_path / f"{number}.yaml")
        files[-1].write_bytes(data)
    program = (
        "import sys\n"
        "from peftsearch.cli.app import run_app\n"
        "for path in sys.argv[2:]:\n"
        "    for command in ('validate', 'run'):\n"
        "        print(run_app([command, path, '--storage', sys.argv[1]]), flush=True)\n"
        "        print('#', file=sys.stderr, flush=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "storage"), *map(str, files)],
        capture_output=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [b"2"] * (2 * len(files))
    assert b"Traceback" not in done.stderr
    answers = done.stderr.decode().split("#\n")[:-1]
    assert len(answers) == 2 * len(files)
    for answer in answers:
        lines = [line for line in answer.splitlines() if not line.startswith("checking the study")]
        assert len(lines) == 1, answer
        assert lines[0].startswith("Error: ")
    assert not (tmp_path / "storage").exists()


def test_one_refusal_in_a_process_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text("a: !!python/object/apply:os.system [x]")
    done = subprocess.run(
        [sys.executable, "-m", "peftsearch", "run", str(tmp_path / "study.yaml"), "--storage", os.fsdecode(b"\xff")],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert "not valid YAML: could not determine a constructor" in done.stderr
