"""Optuna searcher, front-aware ASHA and the Tune trainable: what is tried, and what goes on.

`peftsearch.search.tune` imports Ray Tune and is imported only where trials are run.
"""
