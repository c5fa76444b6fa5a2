"""Right studies: what a file means. Wrong ones: one sentence that says what, where, and what to do."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftsearch.spec import Range, StudyError, StudyFile, StudySpec, model_location, suggest
from peftsearch.spec.yaml_file import parse_yaml

STUDY = """\
name: quick
model: package:gt/model
domains:
  clinical:
    data: {source: a.csv}
methods:
  lora:
    rank: {low: 1, high: 64, log: true}
search: {trials: 8}
training:
  epochs: 3
"""
NAME, MODEL = "name: quick", "model: package:gt/model"
DOMAINS, DATA = "domains:\n  clinical:\n    data: {source: a.csv}", "{source: a.csv}"
METHODS, RANK = "methods:\n  lora:\n    rank: {low: 1, high: 64, log: true}", "{low: 1, high: 64, log: true}"
SEARCH, EPOCHS = "search: {trials: 8}", "  epochs: 3"
SECTION = "must be a section of keys and values"

# What is replaced in STUDY, by what, and the sentence.
WRONG: list[tuple[str, str, str]] = [
    (NAME, "name: a/b", "s.yaml, line 1: name: 'a/b' is not a name: use letters, digits, '.', '_' and '-'"),
    (NAME, "name: 7", "s.yaml, line 1: name: must be a text, not 7"),
    (NAME, "name:", "s.yaml, line 1: name: must be a text, not empty"),
    (NAME, "", "s.yaml: name: is missing"),
    (NAME, "nmae: quick", "s.yaml, line 1: nmae: unknown key; did you mean 'name'?"),
    (NAME, "name: a\nname: b", "s.yaml, line 2: 'name' stands twice; keep one of them"),
    (MODEL, "", "s.yaml: 'model' is missing: name a Hub id, a folder or package:NAME/FOLDER"),
    (MODEL, "model:", f"s.yaml, line 2: model: {SECTION}, not empty"),
    (MODEL, "model: {path: a, revison: b}", "s.yaml, line 2: model.revison: unknown key; did you mean 'revision'?"),
    (MODEL, "model: {revision: b}", "s.yaml, line 2: model.path: is missing"),
    (MODEL, "models: []", "s.yaml, line 2: models: must not be empty"),
    (MODEL, "models: a", "s.yaml, line 2: models: must be a list, not 'a'"),
    (MODEL, "models: [3]", f"s.yaml, line 2: models.0: {SECTION}, not 3"),
    (MODEL, "models: [a, a]", "s.yaml: a model is listed twice"),
    (
        MODEL,
        "models:\n- a\n- {path: b, x: 1}",
        "line 4: models.1.x: unknown key; known: config, path, revision, trust_remote_code",
    ),
    (MODEL, "model: a\nmodels: [b]", "s.yaml: 'model' and 'models' both stand there: keep one"),
    (DOMAINS, "domains: {}", "s.yaml, line 3: domains: must not be empty"),
    (DOMAINS, "domains: [a]", f"s.yaml, line 3: domains: {SECTION}, not ['a']"),
    (DOMAINS, "domains:\n  clinical:", f"s.yaml, line 4: domains.clinical: {SECTION}, not empty"),
    ("clinical:", "clin ical:", "s.yaml, line 4: domains.clin ical: 'clin ical' is not a name: use letters"),
    (DATA, "{}", "s.yaml, line 5: domains.clinical.data: name the data: either 'source', or 'train' with"),
    (DATA, "a.csv", f"s.yaml, line 5: domains.clinical.data: {SECTION}, not 'a.csv'"),
    (DATA, "{source: a, test: b}", "data: 'validation' and 'test' go with 'train', not with 'source'"),
    (
        DATA,
        "{source: a, format: xml}",
        "data.format: 'xml' is not one of 'auto', 'csv', 'tsv', 'json', 'jsonl', 'parquet' or",
    ),
    (DATA, "{source: a, header: []}", "s.yaml, line 5: domains.clinical.data.header: must not be empty"),
    (DATA, "{source: a, limit: 0}", "data.limit.train: must be a whole number of at least 1"),
    (DATA, "{source: a, limit: [4, 8, 4]}", "data.limit.train: list at least one size, and each only once"),
    (DATA, "{source: a, limit: []}", "data.limit.train: list at least one size, and each only once"),
    (
        DATA,
        "{source: a, limit: {train: ['4', 8]}}",
        "data.limit.train: the sizes of a few-shot curve are whole numbers",
    ),
    (
        DATA,
        "{source: a, limit: [4, 8]}\n  clinical-8:\n    data: {source: b}",
        "the few-shot curve of 'clinical' makes a domain 'clinical-8', and there is one: rename either",
    ),
    (
        DATA,
        "{join: {a: {source: a, limit: [4, 8]}, b: {source: b}}}",
        "data: a part of 'join' has one size: write the list of a few-shot curve's beside 'join'",
    ),
    *(
        (
            DATA,
            f"{{join: {{a: {{source: a}}, b: {{source: b}}}}, {key}}}",
            f"data: 'join' names the data of each part: '{key.split(':')[0]}' stands there, not beside it",
        )
        for key in ("source: c", "validation: c", "columns: {text: c}", "split: {test: 0.2}", "format: csv")
    ),
    (DATA, "{source: a, config: b}", "data: 'config' is about data on the Hub (source: hub:ID): leave it out"),
    (DATA, "{train: a, revision: b}", "data: 'revision' is about data on the Hub (source: hub:ID): leave it out"),
    (DATA, "{source: a, limit: some}", f"data.limit: {SECTION}, not 'some'"),
    (DATA, "{source: a, columns: {txt: b}}", "data.columns.txt: unknown key; did you mean 'text'?"),
    (
        DATA,
        "{source: a, colums: {}}",
        "s.yaml, line 5: domains.clinical.data.colums: unknown key; did you mean 'columns'?",
    ),
    (
        DATA,
        "\n      source: a\n      split: {validation: 20%}",
        "line 7: domains.clinical.data.split.validation: must be a number",
    ),
    (DATA, "{source: a, split: {validation: 0.5, test: 0.5}}", "data.split: validation + test must stay below 1"),
    (
        DATA,
        "{source: a}\n    metrics: f1",
        "s.yaml, line 6: domains.clinical.metrics: unknown key; did you mean 'metric'?",
    ),
    (DATA, "{source: a}\n    max_length: 2", "domains.clinical.max_length: must be greater than or equal to 4, not 2"),
    (METHODS, "methods: {}", "s.yaml, line 6: methods: must not be empty"),
    (METHODS, "methods: [lora]", f"s.yaml, line 6: methods: {SECTION}, not ['lora']"),
    (METHODS, "methods:\n  lora: 8", f"s.yaml, line 7: methods.lora: {SECTION}, not 8"),
    (RANK, "{low: 9, high: 1}", "s.yaml, line 8: methods.lora.rank: low (9) is above high (1): swap them"),
    (RANK, "{low: 0, high: 1, log: true}", "methods.lora.rank: a logarithmic range needs low > 0, not 0"),
    (RANK, "{low: 1, high: 2, log: true, step: 1}", "methods.lora.rank: step and log exclude each other: drop one"),
    (RANK, "{low: 1}", "s.yaml, line 8: methods.lora.rank.high: is missing"),
    (RANK, "{low: 1, hihg: 3}", "s.yaml, line 8: methods.lora.rank.hihg: unknown key; did you mean 'high'?"),
    (RANK, "{low: a, high: 3}", "s.yaml, line 8: methods.lora.rank.low: must be a number, not 'a'"),
    (RANK, "{low: 1, high: .inf}", "methods.lora.rank: low and high must be finite numbers"),
    (RANK, "[]", "s.yaml, line 8: methods.lora.rank: an empty list of choices: name at least one value"),
    (RANK, "[1, 1]", "s.yaml, line 8: methods.lora.rank: a choice is listed twice"),
    (RANK, "[1, [2]]", "methods.lora.rank: choices must be numbers, words or true/false, not [2]"),
    (SEARCH, "search: {trials: 0}", "s.yaml, line 9: search.trials: must be greater than or equal to 1, not 0"),
    (SEARCH, "search: {trials: 8.5}", "s.yaml, line 9: search.trials: must be a whole number, not 8.5"),
    (SEARCH, "search: {trials: many}", "s.yaml, line 9: search.trials: must be a whole number, not 'many'"),
    (SEARCH, "search: {scheduler: ahsa}", "search.scheduler: 'ahsa' is not one of 'pareto_asha', 'asha' or 'none'"),
    (SEARCH, "search:", f"s.yaml, line 9: search: {SECTION}, not empty"),
    (SEARCH, "SEARCH: {}", "s.yaml, line 9: SEARCH: unknown key; did you mean 'search'?"),
    (EPOCHS, "  epochs: -3", "s.yaml, line 11: training.epochs: must be greater than 0, not -3"),
    (EPOCHS, "  warmup: .nan", "s.yaml, line 11: training.warmup: must be a finite number, not nan"),
    (EPOCHS, "  epochs: 2024-01-01", "s.yaml, line 11: training.epochs: must be a number, not '2024-01-01'"),
    (EPOCHS, "  epochs: 3\nresources: {slots: many}", "s.yaml, line 12: resources.slots: must be a whole number"),
    (
        EPOCHS,
        "  epochs: 3\nresources: {pack: 4, workers_per_trial: 2}",
        "resources: pack: 4 puts several trials on one worker, and workers_per_trial one trial on 2",
    ),
    (EPOCHS, "  epochs: 3\n   batch: 1", "s.yaml, line 12: not valid YAML: mapping values are not allowed here"),
    (EPOCHS, "  epochs: [3", "s.yaml, line 12: not valid YAML: expected ',' or ']'"),
    (EPOCHS, "\tepochs: 3", "s.yaml, line 11: not valid YAML: found character '\\t'"),
    (EPOCHS, "  epochs: *x", "s.yaml, line 11: not valid YAML: found undefined alias 'x'"),
    (EPOCHS, "  epochs: &x [*x]", "s.yaml, line 11: an alias contains itself"),
    (EPOCHS, "  epochs: !!int x", "s.yaml, line 11: not valid YAML: 'x' is not a value of type int"),
    (EPOCHS, "  epochs: !!timestamp x", "s.yaml, line 11: not valid YAML: 'x' is not a value of type timestamp"),
    (
        EPOCHS,
        "  epochs: !!python/name:os.system x",
        "s.yaml, line 11: not valid YAML: could not determine a constructor",
    ),
    (EPOCHS, "  epochs: \0", "s.yaml, line 11: not valid YAML: special characters are not allowed"),
    (EPOCHS, "  ? [a]\n  : 1", "s.yaml, line 11: a key must be a plain word"),
    (
        EPOCHS,
        "  epochs: 3\n---\na: 1",
        "line 12: not valid YAML: expected a single document in the stream, but found another",
    ),
    (STUDY, "", "s.yaml: expected a study (keys such as 'name', 'model', 'domains', 'methods')"),
    (STUDY, "- name: quick", "s.yaml: expected a study (keys such as 'name', 'model', 'domains', 'methods')"),
    (STUDY, "{", "s.yaml, line 1: not valid YAML"),
]


def complaint(text: str, overrides: tuple[str, ...] = ()) -> str:
    with pytest.raises(StudyError) as caught:
        StudyFile.parse(text, "s.yaml", overrides=overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "sentence"), WRONG, ids=[f"{n}-{new[:30]}" for n, (_, new, _) in enumerate(WRONG)]
)
def test_wrong_study(old: str, new: str, sentence: str) -> None:
    assert STUDY.count(old) == 1
    found = complaint(STUDY.replace(old, new))
    assert sentence in found
    assert "\n" not in found


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("search.trials", "--set 'search.trials': write key=value, for example --set search.trials=4"),
        ("search..trials=4", "--set 'search..trials=4': write key=value"),
        ("search.trials.x=4", "--set 'search.trials.x=4': 'trials' holds a value, not a section"),
        ("name=[", "--set name=[, line 1: not valid YAML"),
        ("search.trials=x", "search.trials: must be a whole number, not 'x'"),
        ("serach.trials=4", "serach: unknown key; did you mean 'search'?"),
    ],
)
def test_wrong_override(override: str, sentence: str) -> None:
    assert sentence in complaint(STUDY, (override,))


def test_overrides_reach_sections_that_the_file_leaves_out() -> None:
    spec = StudyFile.parse(
        STUDY, overrides=("search.trials=4", "tracking.mlflow=off", "methods.prompt={tokens: 5}")
    ).spec
    assert (spec.search.trials, spec.tracking.mlflow, spec.methods["prompt"].space) == (4, "off", {"tokens": 5})


def test_meaning() -> None:
    spec = StudyFile.parse(STUDY.replace("  lora:", "  full:\n  lora:")).spec
    assert [model.path for model in spec.models] == ["package:gt/model"]
    assert {name: method.space for name, method in spec.methods.items()} == {
        "full": {},
        "lora": {"rank": Range(low=1, high=64, log=True)},
    }
    assert spec.domain_max_length("clinical") == spec.training.max_length


def test_a_method_may_train_otherwise_than_the_others() -> None:
    spec = StudyFile.parse(STUDY.replace("  lora:", "  full: {training: {epochs: 7}}\n  lora:")).spec
    assert spec.methods["full"].space == {}
    assert spec.training_of("full").epochs == 7
    assert spec.training_of("lora") == spec.training
    assert StudySpec.model_validate(spec.model_dump(mode="json")) == spec


def test_a_list_of_limits_makes_a_domain_of_each_size() -> None:
    spec = StudyFile.parse(STUDY.replace(DATA, "{source: a, limit: {train: [16, 64], test: 9}}")).spec
    limits = {name: domain.data.limit for name, domain in spec.domains.items()}
    assert {name: (limit.train, limit.test) for name, limit in limits.items()} == {
        "clinical-16": (16, 9),
        "clinical-64": (64, 9),
    }


def test_data_sets_that_are_joined_are_limited_and_drawn_together() -> None:
    data = "{join: {a: {source: a}, b: {source: b}}, limit: [4, 8], split: {seed: 3}}"
    spec = StudyFile.parse(STUDY.replace(DATA, data)).spec
    found = {name: (domain.data.limit.train, domain.data.split.seed) for name, domain in spec.domains.items()}
    assert found == {"clinical-4": (4, 3), "clinical-8": (8, 3)}
    # What is kept of a study is read as it was written.
    assert type(spec).model_validate(spec.model_dump(mode="json")) == spec


def test_a_place_in_a_few_shot_domain_or_a_search_space_is_named_as_it_is_written() -> None:
    file = StudyFile.parse(STUDY.replace(DATA, "{source: a, limit: [16, 64]}"))
    complaint = file.explain(StudyError("x", ("domains", "clinical-16", "data", "source")))
    assert complaint.endswith("domains.clinical.data.source: x")
    with pytest.raises(StudyError, match=r"methods\.full\.training\.epoch: unknown key; did you mean 'epochs'"):
        StudyFile.parse(STUDY.replace("  lora:", "  full: {training: {epoch: 7}}\n  lora:"))
    with pytest.raises(StudyError, match=r"methods\.full\.rank\.low: is missing"):
        StudyFile.parse(STUDY.replace("  lora:", "  full: {rank: {high: 7}}\n  lora:"))


def test_words_that_yaml_1_1_would_change() -> None:
    assert parse_yaml("[1e-4, 1.5E3, off, no, 2024-01-01, 1_0, yes]", "x")[0] == [
        1e-4,
        1500.0,
        "off",
        "no",
        "2024-01-01",
        10,
        "yes",
    ]


def test_keys_are_names_even_where_they_look_like_numbers() -> None:
    spec = StudyFile.parse(STUDY.replace("clinical:", "2024:").replace("lora:", "true:")).spec
    assert (list(spec.domains), list(spec.methods)) == (["2024"], ["true"])


def test_anchors_and_merges() -> None:
    text = STUDY.replace(DATA, "&data {source: a.csv}\n  other:\n    data:\n      <<: *data\n      limit: 5")
    spec = StudyFile.parse(text).spec
    assert (spec.domains["other"].data.source, spec.domains["other"].data.limit.train) == ("a.csv", 5)


def test_aliases_that_explode_are_refused() -> None:
    levels = "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9))
    assert "no study is that large" in complaint(f"a0: &a0 [x]\n{levels}\n")


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    for path, sentence in (
        (tmp_path / "absent.yaml", "no study file '.*absent.yaml': check the path"),
        (tmp_path, "is a folder: name the study's YAML file in it"),
        (tmp_path / "latin.yaml", "cannot read the study file .*latin.yaml'"),
    ):
        with pytest.raises(StudyError, match=sentence):
            StudyFile.load(path)


def test_a_file_knows_its_folder_and_explains_errors_of_later_parts(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(STUDY, encoding="utf-8")
    file = StudyFile.load(tmp_path / "s.yaml")
    assert file.folder == tmp_path.resolve()
    error = StudyError("no such column", ("domains", "clinical", "data", "columns", "text"))
    assert file.explain(error) == "s.yaml, line 5: domains.clinical.data.columns.text: no such column"
    assert file.explain(StudyError("no place")) == "no place"
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.message, copy.loc) == (error.message, error.loc)


def test_suggest() -> None:
    assert suggest("LoRA", ["lora", "full"]) == "; did you mean 'lora'?"
    assert suggest("zzz", ["b", "a"]) == "; known: a, b"
    assert suggest("zzz", [f"n{n:02}" for n in range(30)]).endswith("n24 and 5 more")
    assert suggest("zzz", []) == ""


def test_model_location(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    assert model_location("here", tmp_path) == str(tmp_path / "here")
    assert model_location("org/name", tmp_path) == "org/name"
    for path in ("./absent", "/absent", "a/b/c"):
        with pytest.raises(StudyError, match="no model folder"):
            model_location(path, tmp_path)
    with pytest.raises(StudyError, match="package 'surely_not_installed' is not installed"):
        model_location("package:surely_not_installed/model", tmp_path)


def accepts_or_explains(text: str) -> None:
    message = "s.yaml: accepted"
    try:
        StudyFile.parse(text, "s.yaml")
    except StudyError as error:
        message = error.message
    assert "\n" not in message
    assert message.startswith("s.yaml")


@given(st.text(max_size=200))
def test_any_text_is_accepted_or_explained(text: str) -> None:
    accepts_or_explains(text)


FRAGMENTS = [
    *"{}[]:-&*?|>%@`'\"~#,=!\t\0",
    *(
        "\n",
        "\n  ",
        ": ",
        "- ",
        "---",
        "...",
        "<<",
        "<<: *a",
        "&a ",
        "*a",
        "null",
        "true",
        "{}",
        "[]",
        "[[",
        "1",
        "-1",
        "1e400",
    ),
    *(".nan", ".inf", "0x", "0o7", "1:30", "1_0", "2020-01-01", "é", "\ud7ff", "1" * 5000, "!<", "! "),
    *(
        f"!!{tag} "
        for tag in ("int", "float", "bool", "null", "str", "binary", "timestamp", "set", "omap", "pairs", "map", "seq")
    ),
    "!!python/object/apply:os.system ",
]
TOKENS = [match.span() for match in re.finditer(r"[\w.:/-]+|\S", STUDY)]


@settings(max_examples=400)
@given(st.lists(st.tuples(st.sampled_from(TOKENS), st.sampled_from(FRAGMENTS), st.booleans()), min_size=1, max_size=3))
def test_any_mutation_is_accepted_or_explained(mutations: list[tuple[tuple[int, int], str, bool]]) -> None:
    text = STUDY
    for (start, end), fragment, replace in sorted(mutations, reverse=True):
        text = text[:start] + fragment + text[end if replace else start :]
    accepts_or_explains(text)
