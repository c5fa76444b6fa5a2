"""Trials and fronts as Python holds them: tables of pandas and Arrow, and plots that show themselves in a notebook."""

from __future__ import annotations

import html
import io
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from peftsearch.frontier.front import DomainFront, domain_fronts
from peftsearch.frontier.page import front_html
from peftsearch.frontier.plots import front_figure
from peftsearch.frontier.tables import front_renderables, trials_arrow, trials_frame, trials_table
from peftsearch.spec import StudyError, StudyFacts, TrialRecord, suggest
from peftsearch.tracking.names import configuration_text

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects as go
    import pyarrow

_FRAME = "width: 100%; height: 820px; resize: vertical; border: 1px solid #8884; border-radius: 6px"
_MOST_ROWS = 40


class Trials(list[TrialRecord]):
    """Trials, by number; a list that converts itself into tables and shows itself as one."""

    def to_arrow(self) -> pyarrow.Table:
        """One row per trial; columns as `peftsearch.frontier.trials_arrow`."""
        return trials_arrow(self)

    def to_pandas(self) -> pandas.DataFrame:
        """One row per trial; columns as `peftsearch.frontier.trials_arrow`."""
        return trials_frame(self)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        columns = ["number", "domain", "method", "state", "value", "trainable_parameters", "train_seconds"]
        frame = self.to_pandas()[columns]
        frame.insert(3, "hyperparameters", [configuration_text(record.hyperparameters) for record in self])
        table = frame.to_html(index=False, border=0, escape=True, na_rep="", max_rows=_MOST_ROWS)
        return {"text/plain": _plain([trials_table(self)]), "text/html": _utf8(table)}


class Frontier(dict[str, DomainFront]):
    """The front of each domain, by its name, in the order of the study file.

    In a notebook it shows itself as the study's Pareto page (`peftsearch.frontier.front_html`).

    Args:
        records: All trials of the study.
        facts: The study.
        domain: Only this domain.
        storage: What ``--storage`` the page's commands need; the default storage where absent.

    Raises:
        StudyError: The study has no such domain.
    """

    def __init__(
        self,
        records: Iterable[TrialRecord],
        facts: StudyFacts,
        domain: str | None = None,
        *,
        storage: str | None = None,
    ) -> None:
        if domain is not None and domain not in facts.domains:
            raise StudyError(f"the study {facts.study!r} has no domain {domain!r}{suggest(domain, facts.domains)}")
        self.records = Trials(records)
        self.facts = facts
        self.storage = storage
        fronts = domain_fronts(self.records, facts, storage)
        super().__init__(fronts if domain is None else {domain: fronts[domain]})

    def to_arrow(self) -> pyarrow.Table:
        """The trials on the fronts, domain by domain; columns as `peftsearch.frontier.trials_arrow`."""
        return self._trials().to_arrow()

    def to_pandas(self) -> pandas.DataFrame:
        """The trials on the fronts, domain by domain; columns as `peftsearch.frontier.trials_arrow`."""
        return self._trials().to_pandas()

    def figure(self, domain: str | None = None) -> go.Figure:
        """A domain's front as a figure of plotly, to be changed or saved (`peftsearch.frontier.front_figure`).

        Args:
            domain: Its name; may be left out where there is only one.

        Raises:
            StudyError: There is no such domain, or there are several to choose from.
        """
        if domain is None:
            if len(self) != 1:
                raise StudyError(f"the study {self.facts.study!r} has several domains: name one of {', '.join(self)}")
            (domain,) = self
        return front_figure(self.records, domain, self.facts)

    def _trials(self) -> Trials:
        return Trials(record for front in self.values() for record in front.front)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        return display(self.records, self.facts, list(self), storage=self.storage)


def display(
    records: Iterable[TrialRecord],
    facts: StudyFacts,
    domains: Iterable[str],
    *,
    state: str | None = None,
    planned: int | None = None,
    storage: str | None = None,
) -> dict[str, str]:
    """Fronts as a notebook shows them: the Pareto page in a frame of its own, and the terminal's tables for whoever
    shows no HTML.

    The page comes whole, as text inside the frame's element: a saved notebook needs nothing else to show it. The
    frame's sandbox lets it run its scripts and neither read nor change the notebook around it.

    Args:
        records: All trials of the study.
        facts: The study.
        domains: Which of its domains.
        state, planned, storage: As for `peftsearch.frontier.front_html`.
    """
    records, domains = list(records), list(domains)
    chosen = facts.model_copy(update={"domains": {name: facts.domains[name] for name in domains}})
    page = front_html(records, chosen, state=state, planned=planned, storage=storage)
    title = html.escape(f"Pareto fronts of {facts.study}", quote=True)
    frame = (
        f'<iframe title="{title}" sandbox="allow-scripts" style="{_FRAME}" '
        f'srcdoc="{html.escape(page, quote=True)}"></iframe>'
    )
    return {"text/plain": _plain(front_renderables(records, facts, domains)), "text/html": _utf8(frame)}


def _plain(renderables: Iterable[Any]) -> str:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=160, highlight=False, color_system=None)
    for renderable in renderables:
        console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return _utf8(console.file.getvalue().rstrip())


def _utf8(text: str) -> str:
    """Without halves of surrogate pairs, which a notebook's messages cannot hold."""
    return text.encode("utf-8", "replace").decode()
