"""One segment of a trial on one worker group: loop, precision, distribution, checkpoints, evaluation.

Nothing here is imported eagerly: `budget` and `segment` are used by processes that never load torch.
"""
