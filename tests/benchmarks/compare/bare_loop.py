"""One trial in plain PyTorch, transformers and PEFT, with nothing of peftsearch's: what anybody would write.

It is the floor's loop, and what the workers of Ray's documented pattern run.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from trial_list import TARGETS, Trial, Work, read_data


@dataclass(frozen=True)
class Progress:
    """One evaluation of a trial, and the stretch of training before it.

    Attributes:
        step: Steps done.
        examples: Examples trained on so far.
        train_loss: Mean training loss since the evaluation before.
        loss: Mean validation loss.
        accuracy: Share of the validation rows that are right.
        parameters: Trainable parameters.
        seconds: Time that the stretch and the evaluation took; what comes before the first step is not in it.
    """

    step: int
    examples: int
    train_loss: float
    loss: float
    accuracy: float
    parameters: int
    seconds: float


class BareLoop:
    """The base model and the data in memory; trains one trial after another.

    Args:
        folder: What `trial_list.prepare` has written.
        threads: CPU threads.
        shuffled: Train the batches of a shuffling data loader, and not those that peftsearch trains on.
    """

    def __init__(self, folder: Path, threads: int, *, shuffled: bool = False) -> None:
        from transformers import AutoModelForSequenceClassification
        from transformers.utils import logging

        torch.set_num_threads(threads)
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.work = Work.read(folder)
        self.batches = self.work.shuffled if shuffled else self.work.batches
        self.data = read_data(folder)
        self.base = AutoModelForSequenceClassification.from_pretrained(self.work.model, num_labels=self.work.labels)

    def model(self, rank: int) -> nn.Module:
        """A LoRA model before its first step: head and adapter drawn from the seed."""
        from peft import LoraConfig, TaskType, get_peft_model

        base = copy.deepcopy(self.base)
        torch.manual_seed(self.work.budget.seed)
        nn.init.normal_(base.classifier.weight, std=base.config.initializer_range)
        nn.init.zeros_(base.classifier.bias)
        config = LoraConfig(
            task_type=TaskType.SEQ_CLS,
            r=rank,
            lora_alpha=self.work.alpha,
            target_modules=TARGETS,
            modules_to_save=["classifier"],
        )
        return get_peft_model(base, config)

    def seed_dropout(self) -> None:
        """Start the random stream that training draws from."""
        torch.manual_seed(self.work.budget.seed * 65_537 + 1)

    def train(self, trial: Trial, report: Callable[[Progress], bool]) -> nn.Module:
        """Train a trial to its end, or until ``report`` says that it does not go on."""
        work = self.work
        model = self.model(trial.rank)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        count = sum(parameter.numel() for parameter in parameters)
        optimizer = torch.optim.AdamW(parameter_groups(model, work.weight_decay), lr=trial.learning_rate, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, work.learning_rate_factor)
        self.seed_dropout()
        model.train()
        examples, stretch, total = 0, 0, torch.zeros((), dtype=torch.float64)
        began = time.perf_counter()
        for step, rows in enumerate(self.batches, start=1):
            batch = collate(self.data["train"], rows, work.pad_token_id)
            labels = batch.pop("labels")
            with autocast(work.budget.precision):
                logits = model(**batch).logits
            loss = functional.cross_entropy(logits.float(), labels)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, work.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            total += loss.detach().double() * len(rows)
            examples, stretch = examples + len(rows), stretch + len(rows)
            if step in work.budget.evaluation_steps:
                loss_now, accuracy = self.evaluate(model, final=step == work.budget.steps)
                seconds = time.perf_counter() - began
                if not report(Progress(step, examples, total.item() / stretch, loss_now, accuracy, count, seconds)):
                    break
                began, stretch, total = time.perf_counter(), 0, torch.zeros_like(total)
        return model

    @torch.no_grad()
    def evaluate(self, model: nn.Module, *, final: bool) -> tuple[float, float]:
        """Mean loss and accuracy on the validation rows; the last evaluation is in the weights' own precision."""
        data, size = self.data["validation"], self.work.evaluation_batch_size
        rows = by_length(data)
        losses, right = 0.0, 0
        model.eval()
        with nullcontext() if final else autocast(self.work.budget.precision):
            for start in range(0, len(rows), size):
                batch = collate(data, rows[start : start + size], self.work.pad_token_id)
                labels = batch.pop("labels")
                logits = model(**batch).logits.float()
                losses += functional.cross_entropy(logits, labels, reduction="sum").item()
                right += int((logits.argmax(dim=-1) == labels).sum())
        model.train()
        return losses / len(rows), right / len(rows)


def autocast(precision: str) -> AbstractContextManager[object]:
    """The context of a forward pass."""
    return torch.autocast("cpu", dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


def by_length(data: Mapping[str, Sequence[Any]]) -> list[int]:
    """Row numbers, short texts first, so that little is padded."""
    return sorted(range(len(data["labels"])), key=lambda row: len(data["input_ids"][row]))


def collate(data: Mapping[str, Sequence[Any]], rows: Sequence[int], pad_token_id: int) -> dict[str, torch.Tensor]:
    """A batch, padded on the right to its longest text."""
    width = max(len(data["input_ids"][row]) for row in rows)
    batch = {}
    for name, fill in (("input_ids", pad_token_id), ("token_type_ids", 0)):
        if name in data:
            filled = [[*data[name][row], *[fill] * (width - len(data[name][row]))] for row in rows]
            batch[name] = torch.tensor(filled)
    lengths = torch.tensor([len(data["input_ids"][row]) for row in rows])
    batch["attention_mask"] = (torch.arange(width) < lengths[:, None]).long()
    batch["labels"] = torch.tensor([data["labels"][row] for row in rows])
    return batch


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices are decayed, biases are not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in trained if parameter.ndim > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
