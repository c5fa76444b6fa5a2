"""The ledger, which is the truth, and MLflow, which shows it."""

from peftsearch.tracking.ledger import Ledger, LedgerCell, hide_password

__all__ = ["Ledger", "LedgerCell", "hide_password"]
