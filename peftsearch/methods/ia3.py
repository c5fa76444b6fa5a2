"""IA3: learned scales for keys, values and the feed-forward's hidden layer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from peftsearch.methods.base import AttachContext, Hyperparameter, Method, learning_rate
from peftsearch.methods.module_names import short_names

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

_KEY_OR_VALUE = re.compile(r"(^|_)(k|v|key|value)(_|$)")


class IA3(Method):
    """A vector that scales the output of each key and value projection, and one for the feed-forward's hidden layer."""

    name = "ia3"
    title = "IA3"
    source = "Liu et al. 2022, arXiv:2205.05638"
    hyperparameters: ClassVar[Mapping[str, Hyperparameter]] = {"learning_rate": learning_rate(5e-4, 5e-2)}
    priors = ({"learning_rate": 3e-3},)

    def attach(self, model: PreTrainedModel, hyperparameters: Mapping[str, Any], context: AttachContext) -> nn.Module:
        """See `Method.attach`; raises ValueError where no key, value or feed-forward layers are found."""
        from peft import IA3Config, get_peft_model

        config = IA3Config(
            task_type=context.peft_task_type, modules_to_save=list(context.modules_to_save) or None, **_targets(model)
        )
        return get_peft_model(model, config)  # type: ignore[no-any-return]


def _targets(model: PreTrainedModel) -> dict[str, list[str]]:
    """Where the vectors go, found from the model.

    PEFT's own table is not asked: by it BERT has a further vector on the attention's output, which has the same name as
    the feed-forward's, and others have one on the queries and none on the keys.
    """
    from peftsearch.methods.sublayers import find_sublayers

    sublayers = find_sublayers(model)
    attention = [path for path in sublayers.blocks if _KEY_OR_VALUE.search(path.rpartition(".")[2])]
    # Queries, keys and values from one layer are scaled together. What a layer of positions gives is none of them
    # (DeBERTa's pos_q_proj).
    fused = [path for path in sublayers.query_and_value if not path.rpartition(".")[2].startswith("pos_")]
    attention_names = short_names(model, attention or fused)
    feed_forward_names = short_names(model, sublayers.feed_forward_ends)
    if not attention_names and not feed_forward_names:
        raise ValueError(f"{type(model).__name__} cannot have IA3: no key, value or feed-forward layers were found")
    return {
        "target_modules": [*attention_names, *feed_forward_names],
        "feedforward_modules": feed_forward_names,
    }
