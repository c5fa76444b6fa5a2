"""The ledger of a study, opened by who reads it and by the driver, which is its only writer."""

from __future__ import annotations

import socket
import uuid
from dataclasses import replace
from typing import TYPE_CHECKING

from peftsearch.files import persist
from peftsearch.handle import StudyHandle
from peftsearch.holder import Lease
from peftsearch.storage import damaged, read_json, write_json
from peftsearch.tracking.ledger import CLAIMS, Ledger, LedgerCell, Owner

if TYPE_CHECKING:
    from peftsearch.search.plan import StudyPlan

LEDGER_PATIENCE = 600.0
"""Seconds that a running study waits for its ledger's database: long enough for a server to be moved elsewhere."""


def open_ledger(study: StudyHandle, lease: Lease | None = None) -> Ledger:
    """The ledger to read trials from; a lease's holder may also note the MLflow runs of those that there are."""
    return Ledger(study.ledger_url, study.name, owner=_owner(study), guard=lease.check if lease else None)


def driver_ledger(study: StudyHandle, plan: StudyPlan, lease: Lease | None = None) -> Ledger:
    """The ledger for the study's driver, with all cells of the plan.

    Raises:
        StudyError: It cannot be opened; or another study, or a copy of this one's storage, has it.
    """
    cells = [
        LedgerCell(
            key=item.cell.key,
            model=item.cell.model,
            domain=item.cell.domain,
            method=item.cell.method,
            metric=plan.domains[item.cell.domain].metric,
            direction=plan.domains[item.cell.domain].direction,
        )
        for item in plan.cells
    ]
    owner = _claim(study)
    ledger = Ledger(
        study.ledger_url,
        study.name,
        cells,
        owner=owner,
        patience=LEDGER_PATIENCE,
        guard=lease.check if lease else None,
    )
    if owner.claim is not None:
        _write_claims(study, owner.claim)
    return ledger


def _owner(study: StudyHandle) -> Owner:
    return Owner(study.id, f"{socket.gethostname()}:{study.folder.storage}")


def _claim(study: StudyHandle) -> Owner:
    """This run, told from runs in copies of the storage that share its ledger: each leaves a word of its own in
    both places, and a copy's word is not in this storage.

    The word is in the storage first, and the former ones stay until it is in the ledger: whenever a driver dies,
    the ledger holds one of them.
    """
    owner = _owner(study)
    if study.spec.tracking.ledger == "auto":
        # The ledger is in the storage, and copied with it.
        return owner
    found = read_json(study.folder.path / CLAIMS)
    earlier = None
    if found is not None:
        if not isinstance(found.get("claims"), list):
            raise damaged(study.folder.path / CLAIMS, "it holds no list of claims")
        earlier = tuple(map(str, found["claims"]))
    claim = str(uuid.uuid4())
    _write_claims(study, claim, *(earlier or ()))
    return replace(owner, claim=claim, earlier=earlier)


def _write_claims(study: StudyHandle, *claims: str) -> None:
    place = study.folder.path / CLAIMS
    persist(place, lambda: write_json(place, {"claims": claims}))
