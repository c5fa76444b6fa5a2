"""Which trials can be trained together; plain data, asked by the dispatcher too."""

from __future__ import annotations

from collections.abc import Hashable

from peftsearch.methods import METHODS
from peftsearch.training.segment import Segment, Work, WorkerPlan


def pack_key(plan: WorkerPlan, work: Work) -> Hashable | None:
    """Equal for trials that can be in one pack, whatever their methods; None for what is done alone.

    They have one base in one form, one data set, and one size and format of a step. Everything else is each one's own.
    """
    if not isinstance(work, Segment):
        return None
    trial = work.trial
    method, training = METHODS[trial.method], plan.training[trial.method]
    quantization = method.quantization(trial.hyperparameters)
    bare = (trial.model, trial.domain) in plan.bare
    # The moments of 8-bit optimisers are rounded in blocks that depend on where a parameter lies. Batches that are
    # filled up to a number of tokens have few long texts or many short ones: beside each other both would be padded.
    if training.optimizer != "adamw" or training.tokens_per_batch is not None:
        return None
    if not method.packs(trial.hyperparameters, bare=bare):
        return None
    # On a GPU, int8 multiplies outliers apart: whole columns of all texts of a pass, as soon as one of them has one
    # there (Dettmers et al. 2022, arXiv:2208.07339; bitsandbytes' int8_vectorwise_quant). Others would change a trial.
    if quantization == "int8":
        return None
    return (
        trial.model,
        trial.domain,
        quantization,
        training.precision,
        training.batch_size,
        training.gradient_accumulation,
        training.gradient_checkpointing,
    )
