"""IOB files: what is read, what becomes IOB2, and what is refused with its line."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from seqeval.metrics.sequence_labeling import get_entities

from peftsearch.domains.iob import DOCUMENT, LINE, TagError, entities, read_iob, to_iob2
from peftsearch.spec import StudyError


def read(path: Path, text: str) -> dict[str, list[object]]:
    file = path / "a.tsv"
    file.write_text(text, encoding="utf-8", newline="")
    found: dict[str, list[object]] = read_iob(file, "tokens", "tags").to_pydict()
    return found


def iob2(tags: str, **kwargs: bool) -> str:
    return " ".join(to_iob2([tags.split()], **kwargs).tags[0])


@pytest.mark.parametrize(
    "text",
    [
        "The\tO\nrash\tB-D\n\nNo\tO\n",
        "The O\nrash B-D\n\nNo O",
        "\ufeffThe\tDT\tx\tO\r\nrash\tNN\ty\tB-D\r\n\r\n \r\n\r\nNo\tUH\tz\tO\r\n",
    ],
)
def test_words_and_tags_are_the_first_and_the_last_field(tmp_path: Path, text: str) -> None:
    found = read(tmp_path, text)
    assert found["tokens"] == [["The", "rash"], ["No"]]
    assert found["tags"] == [["O", "B-D"], ["O"]]


def test_lines_and_documents(tmp_path: Path) -> None:
    found = read(tmp_path, "-DOCSTART- -X- O\n\nA\tO\nB\tO\n\nC\tO\n-DOCSTART-\nD\tO\n")
    assert found == {
        "tokens": [["A", "B"], ["C"], ["D"]],
        "tags": [["O", "O"], ["O"], ["O"]],
        LINE: [3, 6, 8],
        DOCUMENT: ["a.tsv 1", "a.tsv 1", "a.tsv 2"],
    }


def test_odd_words_stay_as_they_are(tmp_path: Path) -> None:
    words = ["#", '"', "a b", "\u00a0", "\u2028x", "\u0085"]
    assert read(tmp_path, "".join(f"{word}\tO\n" for word in words))["tokens"] == [words]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("The\tO\nrash\n", ", line 2: the word 'rash' has no tag"),
        ("The\tO\n" * 1001, " is one sentence of 1,001 words: end each sentence with a blank line"),
        ("The\tO\nrash\t\n", ", line 2: the word 'rash' has no tag"),
        ("The O\n\nrash \n", ", line 3: the word 'rash' has no tag"),
        ("\tO\n", ", line 1: the tag 'O' has no word in front of it"),
    ],
)
def test_lines_that_are_no_word_with_a_tag(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(StudyError) as caught:
        read(tmp_path, text)
    assert sentence in caught.value.message


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("O B-D I-D B-D O", "O B-D I-D B-D O"),
        ("B-D B-D B-C I-C", "B-D B-D B-C I-C"),
        # IOB1
        ("O I-D I-D B-D O", "O B-D I-D B-D O"),
        ("I-D I-C I-C", "B-D B-C I-C"),
        # BIOES and BILOU
        ("S-D B-D E-D O B-D I-D E-D", "B-D B-D I-D O B-D I-D I-D"),
        ("U-D B-D L-D O", "B-D B-D I-D O"),
        # bare, and types with a hyphen
        ("B I O", "B-ENTITY I-ENTITY O"),
        ("B-cell-line I-cell-line", "B-cell-line I-cell-line"),
        ("O O", "O O"),
    ],
)
def test_every_scheme_becomes_iob2(written: str, meant: str) -> None:
    assert iob2(written) == meant


@pytest.mark.parametrize(
    ("written", "sentence", "word", "repaired"),
    [
        ("B-D O I-D", "the tag 'I-D' continues no entity (the tag before is 'O')", 2, "B-D O B-D"),
        ("B-D I-C", "the tag 'I-C' continues no entity (the tag before is 'B-D')", 1, "B-D B-C"),
        ("I-D O B-C", "the tag 'I-D' continues no entity (it is the first of its sentence)", 0, "B-D O B-C"),
        ("S-D E-D", "the tag 'E-D' continues no entity (the tag before is 'S-D')", 1, "B-D B-D"),
        ("B-D O S-D", "the tag 'B-D' is not followed by the rest of its entity but by 'O'", 0, "B-D O B-D"),
        ("S-D B-D", "the tag 'B-D' is not followed by the rest of its entity (the sentence ends)", 1, "B-D B-D"),
    ],
)
def test_tags_in_a_wrong_place_are_refused_or_repaired(written: str, sentence: str, word: int, repaired: str) -> None:
    with pytest.raises(TagError) as caught:
        iob2(written)
    assert sentence in str(caught.value)
    assert (caught.value.word, caught.value.broken) == (word, True)
    found = to_iob2([written.split()], repair=True)
    assert (" ".join(found.tags[0]), found.repaired) == (repaired, [1])


@pytest.mark.parametrize("tag", ["X-D", "b-D", "D", "B-", "0", "D-B", "I_D"])
def test_tags_that_are_none_are_refused_even_with_repair(tag: str) -> None:
    with pytest.raises(TagError, match="is none of O, B-TYPE and I-TYPE") as caught:
        iob2(f"O {tag}", repair=True)
    assert not caught.value.broken


TAGS = st.lists(st.sampled_from(["O", "B-A", "I-A", "B-C", "I-C"]), max_size=12)


@given(TAGS)
def test_repaired_tags_mean_what_conlleval_takes_the_broken_ones_for(tags: list[str]) -> None:
    anchored = [*tags, "O", "B-A"]  # a sure sign that this is IOB2
    found = to_iob2([anchored], repair=True).tags[0]
    assert get_entities(found) == get_entities(anchored)
    assert [(kind, start, end - 1) for kind, start, end in entities(found)] == get_entities(found)
    assert to_iob2([found]).tags == [found]
