"""SQuAD's own nested JSON, flattened to one record per question."""

from __future__ import annotations

from typing import Any


def is_squad(document: Any) -> bool:
    """Whether a JSON document is ``{"data": [{"paragraphs": [...]}, ...]}``, as SQuAD and CUAD are published."""
    if not isinstance(document, dict):
        return False
    articles = document.get("data")
    return (
        isinstance(articles, list)
        and bool(articles)
        and all(isinstance(article, dict) and isinstance(article.get("paragraphs"), list) for article in articles)
    )


def squad_records(document: dict[str, Any]) -> list[dict[str, Any]]:
    """``id``, ``title``, ``context``, ``question`` and ``answers`` ({text, answer_start}) of every question.

    Answers of questions that are marked impossible are empty; their ``plausible_answers`` are left out.

    Raises:
        ValueError: A paragraph or question lacks one of its entries; the sentence says where.
    """
    records = []
    for number, article in enumerate(document["data"], 1):
        for position, paragraph in enumerate(article["paragraphs"], 1):
            place = f"paragraph {position} of article {number}"
            try:
                for question in paragraph["qas"]:
                    answers = [] if question.get("is_impossible") else question["answers"]
                    records.append(
                        {
                            "id": str(question["id"]) if "id" in question else None,
                            "title": str(article.get("title", "")),
                            "context": paragraph["context"],
                            "question": question["question"],
                            "answers": {
                                "text": [answer["text"] for answer in answers],
                                "answer_start": [answer["answer_start"] for answer in answers],
                            },
                        }
                    )
            except KeyError as error:
                raise ValueError(f"{place} lacks {error.args[0]!r}") from None
            except (TypeError, AttributeError):
                raise ValueError(f"{place} is not of SQuAD's form") from None
    return records
