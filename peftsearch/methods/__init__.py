"""Methods of adaptation: one file per family, all of the same shape."""

from peftsearch.methods.base import AttachContext, Hyperparameter, Method, MethodSpace, Quantization
from peftsearch.methods.registry import METHODS, method_space

__all__ = ["METHODS", "AttachContext", "Hyperparameter", "Method", "MethodSpace", "Quantization", "method_space"]
