"""Methods of adaptation: one file per family, all of the same shape."""

from peftsearch.methods.base import (
    BYTES_PER_WEIGHT,
    AttachContext,
    Hyperparameter,
    Method,
    MethodSpace,
    Quantization,
)
from peftsearch.methods.registry import METHODS, method_space

__all__ = [
    "BYTES_PER_WEIGHT",
    "METHODS",
    "AttachContext",
    "Hyperparameter",
    "Method",
    "MethodSpace",
    "Quantization",
    "method_space",
]
