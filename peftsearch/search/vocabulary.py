"""What scoring a whole vocabulary takes: at every position of a text, it can be most of all memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peftsearch.domains import PreparedDomain
    from peftsearch.domains.prepare import CheckedDomain


@dataclass(frozen=True)
class ScoredPositions:
    """At how many positions of a text a model scores every word of its vocabulary.

    Attributes:
        of_text: At most, per text.
        at_once: Those of them whose losses are computed together, for the texts of a batch; none of language modelling,
            which computes one text's after another's.
    """

    of_text: int
    at_once: int

    @classmethod
    def of(cls, domain: PreparedDomain | CheckedDomain) -> ScoredPositions | None:
        """What a domain's task asks of its model; None where the model has another head."""
        if not domain.head.auto_model.endswith("LM"):
            return None
        if not domain.task.decodes:
            return cls(domain.max_length, 0)
        target = int(domain.task.options.target_length)
        # A decoder also scores what follows each token of the prompt, which nobody asks for.
        return cls(target if domain.architecture == "encoder-decoder" else domain.max_length + target, target)

    def training_bytes(self, texts: int, vocabulary: int, compute_bytes: int) -> int:
        """Peak of a training step (`Task.losses` and its backward pass), without the model's own activations.

        Backward, the scores stand beside their gradient and a copy of it on the way to the head, in the format of the
        forward pass; or beside the log-probabilities of the positions learned from and two gradients of them, in fp32.

        Args:
            texts: Of one forward pass.
            vocabulary: Words.
            compute_bytes: Bytes per number in the forward pass.
        """
        positions = max(3 * compute_bytes * self.of_text, compute_bytes * self.of_text + 12 * self.at_once)
        return texts * vocabulary * positions

    def evaluation_bytes(self, texts: int, vocabulary: int, weight_bytes: int) -> int:
        """Peak of an evaluation: the scores, and of those that count a copy and the log-probabilities in fp32."""
        return texts * vocabulary * (weight_bytes * self.of_text + 8 * self.at_once)
