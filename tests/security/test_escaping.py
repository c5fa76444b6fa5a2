"""Labels, texts, names and parameters are shown as they are: none becomes an element, an attribute, a script, a link,
a table's cell, a formula, a line of YAML or a command to the terminal."""

from __future__ import annotations

import csv
import html.parser
import io
import json
import re
from collections import Counter
from pathlib import Path

import pytest
import yaml
from browser import CHROMIUM, chromium
from card_code import code_of

from peftsearch.spec import DomainFacts, ModelFacts, StudyFacts, TrialRecord, TrialState

PAYLOADS = [
    "<script>document.title='OWNED'</script>",
    "</script><script>document.title='OWNED'</script>",
    "</title></style><img src=x onerror=\"document.title='OWNED'\">",
    "\"><svg onload=document.title='OWNED'>",
    "' onmouseover='document.title=`OWNED`",
    "[click](javascript:document.title='OWNED')",
    "![x](http://example.invalid/x.png)",
    "`code` **bold** _it_ ~~no~~ $x$",
    "| a | b |\n|---|---|\n| c | d |",
    "<!-- --> <![CDATA[ ]]> &lt;b&gt; &#x3c;b>",
    "=cmd|' /C calc'!A1",
    "@SUM(1+1)",
    "---\nlicense: mit\n---",
    "key: value # no\n- item",
    "{{7*7}} {% raw %} ${7*7} %s {0} {title}",
    "1. first\n\n# heading\n\n    code",
    "\x1b]0;OWNED\x07\x1b[31mred",
    "[bold red]markup[/nothing] [link=http://x]y[/link]",
    "🙂 é ‮txt‬ \u2028 \u0000",
]
EVERYTHING = " ".join(PAYLOADS)
PAGES = ["front", "report"]


def facts_with(payload: str) -> StudyFacts:
    """A study in which every text that a user or a data set can choose is the payload."""
    import frontier_study

    plain = frontier_study.make_facts()
    (model,) = plain.models.values()
    domains = {
        name: domain.model_copy(
            update={
                "labels": (payload, "b", "c"),
                "source": payload,
                "warnings": (payload, payload),
                "fingerprint": payload,
                "baselines": {
                    payload: {
                        key: baseline.model_copy(update={"title": f"{payload} {key}", "detail": payload})
                        for key, baseline in domain.baselines["package:tiny/model"].items()
                    }
                },
            }
        )
        for name, domain in plain.domains.items()
    }
    assert all(isinstance(domain, DomainFacts) for domain in domains.values())
    changed: ModelFacts = model.model_copy(
        update={"location": payload, "revision": payload, "commit": payload, "fingerprint": payload}
    )
    return plain.model_copy(
        update={
            "description": payload,
            "domains": domains,
            "models": {payload: changed},
            "provenance": {payload: payload, "platform": payload},
        }
    )


def records_with(payload: str) -> list[TrialRecord]:
    import frontier_study

    found = []
    for record in frontier_study.make_study(4):
        rungs = [rung.model_copy(update={"scores": {**rung.scores, f"f1/{payload}": 0.5}}) for rung in record.rungs]
        error = payload if record.state is TrialState.FAILED else None
        parameters = {**record.hyperparameters, "init_text": payload}
        update = {"model": payload, "rungs": rungs, "error": error, "hyperparameters": parameters}
        found.append(record.model_copy(update=update))
    return found


def plain_like(text: str) -> str:
    """As long and as many words as the payload, and harmless."""
    return re.sub(r"[^\s]", "x", "".join(c if c.isprintable() else " " for c in text))


class Elements(html.parser.HTMLParser):
    """Counts elements with the names of their attributes, and collects what could act."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.found: Counter[tuple[str, tuple[str, ...]]] = Counter()
        self.acting: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found[tag, tuple(sorted(name for name, _ in attrs))] += 1
        for name, value in attrs:
            ours = ("#", "data:,", "/peftsearch/studies/", "get-artifact?path=front.png&run_uuid=0")
            if name.startswith("on") or (name in ("href", "src") and not (value or "").startswith(ours)):
                self.acting.append(f"<{tag} {name}={value}>")


def elements(text: str) -> Elements:
    parser = Elements()
    parser.feed(text)
    parser.close()
    return parser


def page_of(kind: str, payload: str, folder: Path) -> dict[str, bytes]:
    """A page of a study full of the payload, and the files beside it."""
    from frontier_study import make_spec

    from peftsearch.frontier import front_html
    from peftsearch.frontier.report import write_report

    records, facts = records_with(payload), facts_with(payload)
    if kind == "front":
        return {"front.html": front_html(records, facts).encode()}
    spec = make_spec(facts)
    files = write_report(folder / "report", records, facts, spec, folder, "finished", len(records))
    return {str(file.relative_to(folder)): file.read_bytes() for file in files if file.suffix != ".png"}


@pytest.mark.parametrize("kind", PAGES)
def test_pages_hold_no_element_of_the_data(kind: str, tmp_path: Path) -> None:
    """The page of a hostile study has the very elements of the page of a harmless one of the same shape."""
    hostile = page_of(kind, EVERYTHING, tmp_path / "hostile")
    harmless = page_of(kind, plain_like(EVERYTHING), tmp_path / "harmless")
    pages = [name for name in hostile if name.endswith(".html")]
    assert pages
    for name in pages:
        found, expected = elements(hostile[name].decode()), elements(harmless[name].decode())
        assert found.acting == []
        # Words with "=" stand in a span of their own; pictures draw some glyphs more than once.
        drawn = {"span", "use", "path", "g", "defs", "text", "br", "clippath", "rect"}
        kept = {key: count for key, count in found.found.items() if key[0] not in drawn}
        assert kept == {key: count for key, count in expected.found.items() if key[0] not in drawn}


@pytest.mark.parametrize("payload", PAYLOADS, ids=range(len(PAYLOADS)))
def test_scripts_of_a_page_are_ours(payload: str, tmp_path: Path) -> None:
    """What stands in a script cannot end it: the number of scripts does not depend on the data, and nothing of the data
    stands in one that runs."""
    page = page_of("front", payload, tmp_path)["front.html"].decode()
    harmless = page_of("front", "x", tmp_path)["front.html"].decode()
    assert len(re.findall(r"<script", page, re.IGNORECASE)) == len(re.findall(r"<script", harmless, re.IGNORECASE)) == 3
    run, expected = (re.findall(r"<script>(.*?)</script>", text, re.DOTALL) for text in (page, harmless))
    assert run == expected
    assert len(run) == 1


def rendered(markdown: str) -> Elements:
    """Markdown as MLflow, GitHub and the Hub read it: tables, strike-through, HTML passed through."""
    from markdown_it import MarkdownIt

    return elements(MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(markdown))


def structure(markdown: str) -> Counter[str]:
    found: Counter[str] = Counter()
    for (tag, _), count in rendered(markdown).found.items():
        found[tag] += count
    return found


@pytest.mark.parametrize("payload", [*PAYLOADS, EVERYTHING], ids=range(len(PAYLOADS) + 1))
def test_markdown_of_mlflow_and_of_the_report(payload: str, tmp_path: Path) -> None:
    from peftsearch.frontier import domain_report
    from peftsearch.frontier.report.document import Document, Heading, Points, Table, Text
    from peftsearch.frontier.report.markdown import markdown

    note = domain_report(records_with(payload), facts_with(payload), "clinical").note
    expected = domain_report(records_with("x"), facts_with("x"), "clinical").note
    assert structure(note) == structure(expected)
    assert rendered(note).acting == []

    def report(text: str) -> str:
        table = Table(text, [text, text], [[text, text]] * 2, notes=[text], best=frozenset({(0, 0)}))
        document = Document(text, [Heading(2, text), Text(text), Points([(text, text), ("", text)]), table])
        return markdown(document)

    assert structure(report(payload)) == structure(report("x"))
    assert rendered(report(payload)).acting == []


@pytest.mark.parametrize("payload", PAYLOADS, ids=range(len(PAYLOADS)))
def test_a_description_in_mlflow_makes_no_element(payload: str) -> None:
    from peftsearch.tracking.names import description_note

    found = structure(description_note(payload))
    assert set(found) <= {"p", "em", "strong", "code", "ul", "ol", "li", "h1", "h2", "pre", "hr", "table", "thead"} | {
        "tbody", "tr", "th", "td", "s", "br", "blockquote",
    }  # fmt: skip
    assert rendered(description_note(payload)).acting == []


@pytest.mark.parametrize("payload", PAYLOADS, ids=range(len(PAYLOADS)))
def test_cells_of_csv_files_are_no_formulas(payload: str, tmp_path: Path) -> None:
    from peftsearch.frontier import trials_csv
    from peftsearch.frontier.report.document import csv_bytes

    files = [trials_csv(records_with(payload)), csv_bytes([{"of": payload, payload: payload, "n": -0.5}])]
    for data in files:
        text = data.decode()
        rows = list(csv.reader(io.StringIO(text, newline="")))
        assert len({len(row) for row in rows}) == 1
        for cell in (cell for row in rows for cell in row):
            if cell[:1] in tuple("=+-@\t\r\n"):
                float(cell)


@pytest.mark.parametrize("payload", PAYLOADS, ids=range(len(PAYLOADS)))
def test_model_cards(payload: str, tmp_path: Path) -> None:
    """One front matter, that says what it should; the same elements as a harmless card; code that is code."""
    import ast

    def card(text: str) -> str:
        from frontier_study import make_spec

        from peftsearch.domains import get_task
        from peftsearch.export.card import CardFacts, model_card
        from peftsearch.export.usage import Use

        facts = facts_with(text)
        record = records_with(text)[0]
        spec = make_spec(facts)
        use = Use(get_task("classification"), facts.domains[record.domain], "encoder", False)
        place = tmp_path / text.replace("/", "").replace("\0", "")[:40]
        return model_card(
            CardFacts(
                spec, facts, record, place, text, text, "AutoModelForSequenceClassification", use, True, 0, None, True
            )
        )

    text, expected = card(payload), card("x")
    _, front, body = re.split(r"^---$", text, maxsplit=2, flags=re.MULTILINE)
    matter = yaml.safe_load(front)
    harmless = yaml.safe_load(re.split(r"^---$", expected, maxsplit=2, flags=re.MULTILINE)[1])
    assert matter.keys() == harmless.keys()
    assert "license" not in matter
    assert structure(body) == structure(expected.split("---\n", 2)[2])
    ast.parse(code_of(body))


@pytest.mark.parametrize("payload", [*PAYLOADS, EVERYTHING], ids=range(len(PAYLOADS) + 1))
def test_the_terminal_shows_and_does_not_obey(payload: str) -> None:
    from rich.console import Console

    from peftsearch.cli.fitting import Fitted
    from peftsearch.frontier import front_renderables, trials_table
    from peftsearch.spec import StudyError

    records, facts = records_with(payload), facts_with(payload)
    out = io.StringIO()
    console = Console(file=out, highlight=False, soft_wrap=True, force_terminal=False, width=200)
    for renderable in [trials_table(records), *front_renderables(records, facts, list(facts.domains))]:
        console.print(Fitted(renderable))
    shown = out.getvalue()
    assert "\x1b" not in shown
    assert "\x07" not in shown
    message = str(StudyError(f"no {payload}"))
    assert "\x1b" not in message
    assert "\0" not in message


def test_json_is_json() -> None:
    from peftsearch.frontier import frontier_json, trials_json

    records, facts = records_with(EVERYTHING), facts_with(EVERYTHING)
    for value in (frontier_json(records, facts), trials_json(records, facts.study)):
        assert json.loads(json.dumps(value)) == value


def titles(files: list[Path]) -> list[str]:
    """The titles that the pages have once all of their scripts have run."""
    found = []
    with chromium() as page:
        for file in files:
            page.open(file.as_uri())
            page.evaluate("new Promise(done => setTimeout(done, 1000))")
            found.append(page.evaluate("document.title"))
    return found


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_no_script_of_the_data_runs_in_a_browser(tmp_path: Path) -> None:
    trap = tmp_path / "trap.html"
    trap.write_text("<title>x</title><script>document.title='OWNED'</script>")
    # A lone surrogate cannot be written to a file at all; what becomes of it is seen above.
    pages = [trap]
    for kind in PAGES:
        for name, data in page_of(kind, EVERYTHING, tmp_path / kind).items():
            if name.endswith(".html"):
                pages.append(tmp_path / f"{kind}.html")
                pages[-1].write_bytes(data)
    found = titles(pages)
    assert found[0] == "OWNED"
    assert len(found) == 3
    assert "OWNED" not in found[1:]
