"""``transformers.Trainer.hyperparameter_search`` with Optuna, over a ``model_init`` that makes a LoRA model.

    trainer_contender.py FOLDER RECORDS --threads N [--search-seed N --deadline SECONDS]

The Trainer is told to train the same batches with the same learning rates and the same random numbers, and to write no
checkpoints. With ``--search-seed`` it does not run the list but searches with TPE and the median pruner, both Optuna's
defaults, until the deadline (seconds since 1970).
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main() -> None:
    """Run the list, or search."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("records", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--search-seed", type=int)
    parser.add_argument("--deadline", type=float)
    options = parser.parse_args()
    # Before torch is imported: OpenMP reads it once.
    os.environ["OMP_NUM_THREADS"] = str(options.threads)

    import optuna
    import torch
    from bare_loop import BareLoop, by_length, collate, parameter_groups
    from segment_records import write_record
    from torch.utils.data import DataLoader
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from trial_list import SEARCHED_RANKS, SEARCHED_RATES

    loop = BareLoop(options.folder, options.threads)
    work, budget = loop.work, loop.work.budget
    searching = options.search_seed is not None

    def space(trial: optuna.Trial) -> dict[str, Any]:
        if searching:
            trial.suggest_int("rank", *SEARCHED_RANKS, log=True)
            return {"learning_rate": trial.suggest_float("learning_rate", *SEARCHED_RATES, log=True)}
        trial.suggest_categorical("rank", grid["rank"])
        return {"learning_rate": trial.suggest_categorical("learning_rate", grid["learning_rate"])}

    def model_init(trial: optuna.Trial | None) -> Any:
        if trial is None:
            # Trainer makes a model as it is made itself, and throws it away.
            return loop.model(work.trials[0].rank)
        space(trial)
        return loop.model(trial.params["rank"])

    def loader(split: str, batches: Sequence[Sequence[int]]) -> Any:
        # With a generator of its own: a loader without one draws from the stream that dropout draws from.
        return DataLoader(
            range(len(loop.data[split]["labels"])),  # type: ignore[arg-type]
            batch_sampler=batches,  # type: ignore[arg-type]
            collate_fn=lambda rows: collate(loop.data[split], rows, work.pad_token_id),
            generator=torch.Generator(),
        )

    class SameWork(Trainer):
        """A Trainer that is told which batches to train on, and in what schedule."""

        def get_train_dataloader(self) -> Any:
            return loader("train", work.batches)

        def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
            rows, size = by_length(loop.data["validation"]), work.evaluation_batch_size
            return loader("validation", [rows[start : start + size] for start in range(0, len(rows), size)])

        def create_optimizer(self, model: Any = None) -> Any:
            if self.optimizer is None:
                groups = parameter_groups(self.model, work.weight_decay)
                self.optimizer = torch.optim.AdamW(groups, lr=self.args.learning_rate, fused=True)
            return self.optimizer

        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            if self.lr_scheduler is None:
                self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, work.learning_rate_factor)
            return self.lr_scheduler

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            computed = super().compute_loss(model, inputs, *args, **kwargs)
            if model.training:
                loss = computed[0] if isinstance(computed, tuple) else computed
                clock.add(loss.detach(), len(inputs["labels"]))
            return computed

    class Clock(TrainerCallback):
        """Records a trial's evaluations."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.began, self.examples, self.stretch = time.perf_counter(), 0, 0
            self.total = torch.zeros((), dtype=torch.float64)
            loop.seed_dropout()

        def add(self, loss: torch.Tensor, examples: int) -> None:
            self.total += loss.double() * examples
            self.examples, self.stretch = self.examples + examples, self.stretch + examples

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
            trial = trainer._trial
            write_record(
                options.records,
                trial=trial.number,
                rank=trial.params["rank"],
                learning_rate=trial.params["learning_rate"],
                step=state.global_step,
                final=state.global_step == budget.steps,
                examples=self.examples,
                train_loss=self.total.item() / self.stretch,
                loss=metrics["eval_loss"],
                accuracy=metrics["eval_accuracy"],
                parameters=sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
                seconds=time.perf_counter() - self.began,
            )
            self.began, self.stretch, self.total = time.perf_counter(), 0, torch.zeros_like(self.total)

    clock = Clock()
    trainer = SameWork(
        model_init=model_init,
        args=TrainingArguments(
            output_dir=str(options.records.parent / "trainer"),
            max_steps=budget.steps,
            per_device_train_batch_size=budget.batch_size,
            per_device_eval_batch_size=work.evaluation_batch_size,
            max_grad_norm=work.max_grad_norm,
            eval_strategy="steps",
            eval_steps=budget.steps // budget.evaluations,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            bf16=budget.precision == "bf16",
            use_cpu=True,
            seed=budget.seed,
        ),
        train_dataset=loop.data["train"]["labels"],
        eval_dataset=loop.data["validation"]["labels"],
        compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())},
        callbacks=[clock],
    )
    how: dict[str, Any]
    if searching:
        how = {
            "n_trials": 1_000_000,
            "timeout": max(1.0, options.deadline - time.time()),
            "sampler": optuna.samplers.TPESampler(seed=options.search_seed),
            "pruner": optuna.pruners.MedianPruner(),
        }
    else:
        grid = {
            "rank": sorted({trial.rank for trial in work.trials}),
            "learning_rate": sorted({trial.learning_rate for trial in work.trials}),
        }
        sampler = optuna.samplers.GridSampler(grid, seed=budget.seed)
        how = {"n_trials": len(work.trials), "sampler": sampler, "pruner": optuna.pruners.NopPruner()}
    trainer.hyperparameter_search(
        hp_space=space,
        compute_objective=lambda metrics: metrics["eval_accuracy"],
        direction="maximize",
        backend="optuna",
        **how,
    )


if __name__ == "__main__":
    main()
