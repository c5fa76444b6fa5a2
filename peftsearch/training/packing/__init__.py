"""Several trials trained at once over one frozen base: one forward and backward pass, and everything else each one's
own.

A `Pack` concatenates the batches of its members (`TrialSession`s) and runs a model without any adapter over them, in
which hooks add each member's change to its own slice of the batch. Parameters, gradients and moments of all members lie
in common buffers, a row for each member (`banks`), so that products are batched and an optimiser's step is one kernel.
"""

from peftsearch.training.packing.pack import MemberError, Pack
from peftsearch.training.packing.parts import NotPackableError

__all__ = ["MemberError", "NotPackableError", "Pack"]
