"""Options of the loss are heeded, said to do nothing somewhere, or refused; never ignored in silence."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from peftsearch.domains.tasks.base import LossOptions
from peftsearch.domains.tasks.registry import TASKS, get_task
from peftsearch.search.loss_options import check_loss_options
from peftsearch.spec import StudyError, StudySpec


def spec(tasks: dict[str, str], training: dict[str, Any], **lora: Any) -> StudySpec:
    return StudySpec.model_validate(
        {
            "name": "s",
            "model": "m",
            "domains": {name: {"task": task, "data": {"source": "d.csv"}} for name, task in tasks.items()},
            "methods": {"lora": {"training": lora}} if lora else {"lora": {}},
            "training": training,
        }
    )


@pytest.mark.parametrize(
    ("task", "training", "option"),
    [
        ("similarity", {"label_smoothing": 0.1}, "label_smoothing"),
        *((task, {"class_weights": "balanced"}, "class_weights") for task in ("similarity", "summarization")),
        *((task, {"class_weights": "balanced"}, "class_weights") for task in ("question_answering", "multiple_choice")),
    ],
)
def test_an_option_that_no_domain_heeds_is_refused(task: str, training: dict[str, Any], option: str) -> None:
    with pytest.raises(StudyError, match=rf"^{option} .* no domain's task has any \({task}\): leave it out") as caught:
        check_loss_options(spec({"d": task}, training))
    assert caught.value.loc == ("training", option)


def test_a_methods_own_option_is_refused_where_it_stands() -> None:
    with pytest.raises(StudyError, match="label_smoothing") as caught:
        check_loss_options(spec({"d": "similarity"}, {}, label_smoothing=0.1))
    assert caught.value.loc == ("methods", "lora", "training", "label_smoothing")


def test_a_study_that_was_begun_with_one_goes_on() -> None:
    (said,) = check_loss_options(spec({"d": "similarity"}, {"label_smoothing": 0.1}), begun=True)
    assert said == "training.label_smoothing does nothing in 'd': it spreads a target over classes or tokens"


def test_where_some_domains_heed_it_the_others_are_named() -> None:
    tasks = {"news": "classification", "pairs": "similarity"}
    (said,) = check_loss_options(spec(tasks, {"class_weights": "balanced"}))
    assert said == "training.class_weights does nothing in 'pairs': it weighs classes or tags"
    assert check_loss_options(spec({"news": "classification"}, {"class_weights": "balanced"})) == ()
    assert check_loss_options(spec(tasks, {"class_weights": "none", "label_smoothing": 0})) == ()


def test_every_task_but_similarity_smooths_and_those_that_weigh_have_classes() -> None:
    assert {name for name in TASKS if "label_smoothing" not in get_task(name).loss_options} == {"similarity"}
    weighing = {name for name in TASKS if "class_weights" in get_task(name).loss_options}
    assert weighing == {"classification", "relation", "multi_label", "token_classification"}


def test_similarity_has_no_use_for_either() -> None:
    """What the refusal says is true: its loss is the same with them."""
    from types import SimpleNamespace

    output = SimpleNamespace(logits=torch.tensor([[0.2], [0.9]]))
    batch = {"labels": torch.tensor([0.0, 1.0]), "mean": torch.zeros(2), "deviation": torch.ones(2)}
    task = get_task("similarity")
    plain = task.losses(output, batch, LossOptions())
    assert torch.equal(plain, task.losses(output, batch, LossOptions(0.3, torch.tensor([2.0]))))
