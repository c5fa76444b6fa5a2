"""ROUGE: by hand, as Google's library publishes it, and what counts as a sentence."""

from __future__ import annotations

import pytest

from peftsearch.domains.metrics.rouge import ROUGE, rouge, sentences

FOX = "The quick brown fox jumps over the lazy dog"
DOG = "The quick brown dog jumps on the log."


def test_the_example_of_the_librarys_documentation() -> None:
    """Of nine and eight words six are shared (the, quick, brown, jumps, the, dog), two pairs of eight and seven, and
    the longest common subsequence is "the quick brown jumps the"."""
    found = rouge([DOG], [FOX])
    assert found["rouge1"] == pytest.approx(2 * 6 / (9 + 8))
    assert found["rouge2"] == pytest.approx(2 * 2 / (8 + 7))
    assert found["rougeL"] == pytest.approx(2 * 5 / (9 + 8))


def test_the_sentence_of_lins_paper() -> None:
    """Lin (2004), section 3: LCS of "police killed the gunman" is 3 with S2 and 2 with S3, though both share the same
    words and pairs; both have four words."""
    reference = "police killed the gunman"
    assert rouge(["police kill the gunman"], [reference])["rougeL"] == 1.0  # the stemmer makes kill of killed
    assert rouge(["the gunman kill police"], [reference])["rougeL"] == pytest.approx(2 / 4)
    assert rouge(["the gunman police killed"], [reference])["rougeL"] == pytest.approx(2 / 4)


def test_the_summary_of_lins_paper() -> None:
    """Lin (2004), section 3.2: reference w1 w2 w3 w4 w5, candidates w1 w2 w6 w7 w8 and w1 w3 w8 w9 w5: the union of
    the common subsequences is w1 w2 w3 w5, four of five words; the candidates have ten."""
    found = rouge(["w1 w2 w6 w7 w8\nw1 w3 w8 w9 w5"], ["w1 w2 w3 w4 w5"])
    assert found["rougeLsum"] == pytest.approx(2 * (4 / 10) * (4 / 5) / (4 / 10 + 4 / 5))


def test_numbers_are_those_of_the_library_with_its_stemmer() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    pairs = [
        (
            "Patients treated early recovered faster.\nNo deaths occurred.",
            "Early treatment sped recovery.\nNobody died.",
        ),
        ("running runners ran", "the runner runs"),
        ("", "something"),
    ]
    scorer = RougeScorer(list(ROUGE), use_stemmer=True)
    theirs = [scorer.score(reference, prediction) for prediction, reference in pairs]
    ours = rouge([prediction for prediction, _ in pairs], [reference for _, reference in pairs])
    for name in ROUGE:
        assert ours[name] == pytest.approx(sum(found[name].fmeasure for found in theirs) / len(pairs)), name
    assert ours["rouge1"] > 0.2


def test_sentences_are_lines_or_end_at_full_stops() -> None:
    assert sentences("One thing. Another one! 3.5 mg helped? Yes (they did.) And e.g. this") == [
        "One thing.",
        "Another one!",
        "3.5 mg helped?",
        "Yes (they did.)",
        "And e.g. this",
    ]
    assert sentences("A b. C d.\nE f.") == ["A b. C d.", "E f."]
    assert sentences(" ") == []
    one_line, lines = "The dog ran. A cat sat.", "The dog ran.\nA cat sat."
    assert rouge([one_line], [lines])["rougeLsum"] == 1.0


def test_other_scripts_have_no_words() -> None:
    assert rouge(["これは要約です"], ["これは要約です"])["rouge1"] == 0.0


def test_nothing_cannot_be_scored() -> None:
    with pytest.raises(ValueError, match="cannot score 0 predictions against 0 references"):
        rouge([], [])
    with pytest.raises(ValueError, match="cannot score 1 predictions against 2 references"):
        rouge(["a"], ["a", "b"])
