"""The model card: the Hub's metadata, what the model scored, and code that loads it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from peftsearch.export.convert import Form
from peftsearch.export.hub import HubRepo
from peftsearch.export.pipelines import pipeline_code
from peftsearch.export.published import published_base, without_folders
from peftsearch.export.usage import Use, usage
from peftsearch.files import Place, is_local
from peftsearch.frontier import escape_markdown
from peftsearch.methods import METHODS
from peftsearch.spec import DomainFacts, DomainSpec, ModelFacts, StudyFacts, StudySpec, TrialRecord
from peftsearch.spec.locations import PACKAGE_PREFIX

if TYPE_CHECKING:
    from peftsearch.export.speed import Speed

SPLIT = "validation"
"""The split that trials are compared on, and exports are verified on."""

_PIPELINE_TAGS = {
    "classification": "text-classification",
    "relation": "text-classification",
    "multi_label": "text-classification",
    "similarity": "sentence-similarity",
    "token_classification": "token-classification",
    "question_answering": "question-answering",
    "multiple_choice": "multiple-choice",
    "language_modeling": "text-generation",
    "summarization": "summarization",
    "instruction": "text-generation",
}
_HUB_METRICS: dict[str, tuple[str, dict[str, str]]] = {"macro_f1": ("f1", {"average": "macro"})}
"""Where the Hub calls a metric otherwise: its name there, and its arguments."""

OWN_METHODS = frozenset({"adapter", "hybrid", "prompt", "p_tuning", "prefix", "p_tuning_v2", "bitfit"})
"""Methods that PEFT does not have by itself, or not for every task."""
_REPLACE = "  # replace it by the folder where you have the base model"
_SOFT_TOKENS = frozenset({"prompt", "p_tuning"})
"""Methods whose soft tokens stand in front of a model's output, too."""


@dataclass(frozen=True)
class CardFacts:
    """What a card is made of.

    Attributes:
        spec: The study.
        facts: What is known of it beside the trials.
        record: The trial.
        folder: Where the exported folder will be: here, in an object store, or in a repository of the Hub.
        location: Where the base model is loaded from: a folder or a Hub id; in a published card, what
            `peftsearch.export.published.published_base` calls it.
        revision: Hub revision of the base: the commit where that is known.
        auto_model: The class of `transformers` that has the head.
        use: What is done with it.
        base_has_head: Whether the base brings a head of its own, which must be left behind.
        pad_token_id: What the base has to be told about padding, where its own configuration is silent.
        quantization: Arguments of `transformers.BitsAndBytesConfig` for the base, or None.
        trust_remote_code: Whether the base needs code that it brings along.
        form: What becomes of the adapter.
        on_front: Whether it is on its domain's front, and not on that of its method's trials alone.
    """

    spec: StudySpec
    facts: StudyFacts
    record: TrialRecord
    folder: Place | HubRepo
    location: str
    revision: str | None
    auto_model: str
    use: Use
    base_has_head: bool
    pad_token_id: int | None
    quantization: Mapping[str, Any] | None = None
    trust_remote_code: bool = False
    form: Form = "adapter"
    on_front: bool = True

    @property
    def domain(self) -> DomainFacts:
        """The domain as it was prepared."""
        return self.facts.domains[self.record.domain]

    @property
    def domain_spec(self) -> DomainSpec:
        """The domain as the study file says."""
        return self.spec.domains[self.record.domain]

    @property
    def model(self) -> ModelFacts:
        """The base model."""
        return self.facts.models[self.record.model]

    @property
    def complete(self) -> bool:
        """Whether the folder holds a complete model rather than an adapter."""
        return METHODS[self.record.method].trains_copy or self.form == "merged"

    @property
    def own_method(self) -> bool:
        """Whether it takes this package to load it."""
        return self.record.method in OWN_METHODS and not self.complete

    @property
    def base_on_hub(self) -> bool:
        """Whether the base is a Hub id."""
        return not Path(self.location).is_dir() and not self.location.startswith(("./", PACKAGE_PREFIX))


def published_card(card: CardFacts, repo: HubRepo) -> CardFacts:
    """A card for others to see: the folder is in the repository, and no text names a folder of this machine."""
    model, domain = without_folders(card.record.model), card.domain
    baselines = {model: domain.baselines[card.record.model]} if card.record.model in domain.baselines else {}
    shown = {"source": without_folders(domain.source), "warnings": without_folders(domain.warnings)}
    facts = {
        "description": without_folders(card.facts.description),
        # Of two folders of one name, the other one is not this card's.
        "models": {model: card.model},
        "domains": {card.record.domain: domain.model_copy(update={**shown, "baselines": baselines})},
    }
    return replace(
        card,
        facts=card.facts.model_copy(update=facts),
        record=card.record.model_copy(update={"model": model}),
        folder=repo,
        location=published_base(card.location, card.record.model),
    )


def model_card(card: CardFacts) -> str:
    """The README.md of an exported folder."""
    record = card.record
    title = METHODS[record.method].title
    kind = "A complete model" if card.complete else "An adapter"
    base = escape_markdown(record.model)
    parts = [
        f"---\n{_metadata(card)}\n---",
        f"# {escape_markdown(record.domain)}: {title} of {base}",
        f"{kind} made by {title} ({METHODS[record.method].source}): trial {record.number} of the peftsearch study "
        f"{escape_markdown(card.facts.study)}, on the Pareto front of {escape_markdown(card.domain.metric)} against "
        f"trainable parameters in its domain{_among(card)}. It trains {record.trainable_parameters:,} parameters, "
        f"{100 * record.trainable_parameters / max(1, card.model.total_parameters):.3g} % of the base model's "
        f"{card.model.total_parameters:,}, the task head included.",
        *_form(card),
        *([escape_markdown(card.facts.description)] if card.facts.description else []),
        "## How to load it",
        *_loading_notes(card),
        f"```python\n{loading_code(card)}```",
        *_further_ways(card),
        "## Scores",
        f"On the {card.domain.rows.get(SPLIT, 0):,} examples of the {SPLIT} split, which the study's trials were "
        f"compared on; {escape_markdown(card.domain.metric)} decided.",
        _scores_table(card),
        *_confirmation(card),
        *_label_table(record.scores),
        "## Training",
        _training_table(card),
        "Everything else is in `provenance.json`: the trial as the ledger has it, the study's specification, "
        "fingerprints of data and base model, package versions.",
        _origin(card),
        *_limits(card),
    ]
    return "\n\n".join(parts) + "\n"


def _among(card: CardFacts) -> str:
    if card.on_front:
        return ""
    return (
        f", among the trials of {METHODS[card.record.method].title} (one of another method is no worse, with no more "
        "parameters)"
    )


def loading_code(card: CardFacts) -> str:
    """Python that loads the model and shows its use, with `transformers` and `peft` (and, for methods that are not
    PEFT's own, ``import peftsearch``) alone.
    """
    package, _, inside = card.record.model.removeprefix(PACKAGE_PREFIX).partition("/")
    in_package = card.record.model.startswith(PACKAGE_PREFIX) and not card.complete
    labels, quantised = bool(card.domain.labels), card.quantization is not None

    imports = ["import json"] if labels else []
    imports += ["from importlib.util import find_spec"] if in_package else []
    remote = not isinstance(card.folder, HubRepo) and not is_local(card.folder)
    imports += ["from pathlib import Path", ""] if labels or in_package or remote else []
    imports += ["import peftsearch  # makes its methods known to PEFT"] if card.own_method else []
    imports += ["import torch", *_fetch_import(card), *(["from peft import PeftModel"] if not card.complete else [])]
    names = [card.auto_model, "AutoTokenizer", *(["BitsAndBytesConfig"] if quantised else [])]
    imports += [f"from transformers import {', '.join(names)}", ""]

    lines = _fetch(card)
    if not card.complete:
        if in_package:
            place = f"find_spec({package!r}).submodule_search_locations[0]"
            lines.append(f"base = str(Path({place}, {inside!r}))")
        else:
            elsewhere = "" if card.base_on_hub or not isinstance(card.folder, HubRepo) else _REPLACE
            lines.append(f"base = {card.location!r}{elsewhere}")
    if labels:
        lines.append('labels = json.loads(Path(folder, "labels.json").read_text(encoding="utf-8"))')
    lines += ["", "tokenizer = AutoTokenizer.from_pretrained(folder)"]
    if card.complete:
        trusted = ", trust_remote_code=True" if card.trust_remote_code else ""
        lines.append(f"model = {card.auto_model}.from_pretrained(folder{trusted}).eval()")
    else:
        arguments = ["base", *([f"revision={card.revision!r}"] if card.revision and card.base_on_hub else [])]
        arguments += _head_arguments(card)
        if card.quantization is not None:
            settings = ", ".join(f"{name}={value!r}" for name, value in card.quantization.items())
            lines.append(f"quantization = BitsAndBytesConfig({settings})")
            arguments.append("quantization_config=quantization")
        lines.append(f"model = {card.auto_model}.from_pretrained({', '.join(arguments)})")
        if card.quantization is not None and card.quantization.get("load_in_4bit"):
            # See `settle` in training/quantised.py.
            lines += [
                "for layer in model.modules():  # bitsandbytes 0.50 repacks 4-bit weights on some CPUs",
                '    if hasattr(layer, "support_avx512bf16_for_cpu"):',
                "        layer.support_avx512bf16_for_cpu = False",
            ]
        if card.pad_token_id is not None:
            lines.append(f"model.config.pad_token_id = {card.pad_token_id}")
        lines.append("model = PeftModel.from_pretrained(model, folder).eval()")
    shown = usage(card.use)
    return "\n".join([*imports, *lines, *(["", "", *shown] if shown else [])]) + "\n"


def _head_arguments(card: CardFacts) -> list[str]:
    """What ``from_pretrained`` of a base has to be told about the head and its labels."""
    known = card.use.task.config_kwargs(card.domain.labels)
    arguments = [f"num_labels={known['num_labels']}"] if "num_labels" in known else []
    if known.get("id2label") == dict(enumerate(card.domain.labels)):
        arguments.append("id2label=dict(enumerate(labels))")
    arguments += ["ignore_mismatched_sizes=True"] if card.base_has_head and "num_labels" in known else []
    return [*arguments, *(["trust_remote_code=True"] if card.trust_remote_code else [])]


def _further_ways(card: CardFacts) -> list[str]:
    """Other ways to load and use the model, each a sentence and code that goes on from `loading_code`."""
    trusted = ", trust_remote_code=True" if card.trust_remote_code else ""
    model = f"model=folder{trusted}" if card.complete else "model=model, tokenizer=tokenizer"
    lines = pipeline_code(card.use, model, lengthens=not card.complete and card.record.method in _SOFT_TOKENS)
    ways = []
    if lines:
        by_itself = ", which loads the folder by itself" if card.complete else ""
        ways += [f"The same with `transformers`' pipeline{by_itself}:", _block(lines)]
    auto = f"AutoPeft{card.auto_model.removeprefix('Auto')}"
    if card.auto_model == "AutoModel":
        auto += "ForFeatureExtraction"
    head = card.use.task.heads[card.use.architecture]
    # Without a task's name PEFT knows no class for it, and the path of a base on this machine is of no use elsewhere.
    reachable = card.base_on_hub or isinstance(card.folder, Path)
    if not card.complete and card.quantization is None and head.peft_task_type is not None and reachable:
        lines = ["import peftsearch  # makes its methods known to PEFT"] if card.own_method else []
        lines += [
            f"from peft import {auto}",
            "",
            f"model = {auto}.from_pretrained({', '.join(['folder', *_head_arguments(card)])}).eval()",
        ]
        if card.pad_token_id is not None:
            lines.append(f"model.config.pad_token_id = {card.pad_token_id}")
        base = "" if card.base_on_hub else " (from where `adapter_config.json` says that it is)"
        told = ", once they are told about the head" if _head_arguments(card) else ""
        ways += [f"PEFT's `AutoPeftModel` classes load base{base} and adapter at once{told}:", _block(lines)]
    return ways


def _block(lines: list[str]) -> str:
    return "```python\n" + "\n".join(lines) + "\n```"


def speed_section(speed: Speed) -> str:
    """The card's words about what was measured."""
    return f"## Speed\n\nMeasured after the export: {escape_markdown(speed.sentence())}.\n"


def _form(card: CardFacts) -> list[str]:
    if card.form == "merged" and not METHODS[card.record.method].trains_copy:
        return ["The adapter is merged into its base: this is a complete model, which `transformers` loads by itself."]
    if card.form == "lora":
        return ["It was converted into a plain LoRA (`peft.convert_to_lora`): its scale is in its weights."]
    return []


def _fetch_import(card: CardFacts) -> list[str]:
    if isinstance(card.folder, HubRepo):
        return ["from huggingface_hub import snapshot_download"]
    return [] if is_local(card.folder) else ["from pyarrow import fs"]


def _fetch(card: CardFacts) -> list[str]:
    """Lines after which the files are in ``folder``."""
    if isinstance(card.folder, HubRepo):
        return [f"folder = snapshot_download({card.folder.id!r})"]
    if is_local(card.folder):
        return [f"folder = {str(card.folder)!r}  # or huggingface_hub.snapshot_download(ID)"]
    return [
        f"folder = {card.folder.name!r}",
        "Path(folder).mkdir(exist_ok=True)",
        f"fs.copy_files({str(card.folder)!r}, folder)",
    ]


def _metadata(card: CardFacts) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    record, source = card.record, card.domain_spec.data.source or ""
    pipeline = _PIPELINE_TAGS.get(card.domain.task)
    if card.domain.task == "language_modeling" and card.use.architecture == "encoder":
        pipeline = "fill-mask"
    hub_data = source.removeprefix("hub:") if source.startswith("hub:") else None
    results = [
        EvalResult(
            task_type=pipeline or card.domain.task,
            # The Hub takes an id here, or what looks like one.
            dataset_type=hub_data or _slug(record.domain) or "data",
            dataset_name=record.domain,
            dataset_split=SPLIT,
            metric_type=_HUB_METRICS.get(name, (name, {}))[0],
            metric_name=name,
            metric_args=_HUB_METRICS.get(name, (name, {}))[1] or None,
            metric_value=value,
        )
        for name, value in record.scores.items()
        if "/" not in name and math.isfinite(value)
    ]
    data = ModelCardData(
        # The Hub refuses a base that is none of its own; the card's text names it.
        base_model=card.location if card.base_on_hub else None,
        # The Hub's words; see https://huggingface.co/docs/hub/model-cards#specifying-a-base-model
        base_model_relation=("finetune" if card.complete else "adapter") if card.base_on_hub else None,
        datasets=[hub_data] if hub_data else None,
        library_name="transformers" if card.complete else "peft",
        pipeline_tag=pipeline,
        tags=["peftsearch", _slug(METHODS[record.method].title), record.domain],
        metrics=list(dict.fromkeys(result.metric_type for result in results)) or None,
        model_name=f"{card.facts.study}-{record.domain}-{record.number}-{record.method}",
        eval_results=results or None,
    )
    text: str = data.to_yaml()
    return text


def _loading_notes(card: CardFacts) -> list[str]:
    needs = ["transformers", *([] if card.complete else ["peft"])]
    needs += ["bitsandbytes"] if card.quantization is not None else []
    needs += ["peftsearch"] if card.own_method else []
    notes = [f"It needs torch, {', '.join(needs[:-1]) + ' and ' if needs[:-1] else ''}{needs[-1]}."]
    if not card.complete and card.record.model.startswith(PACKAGE_PREFIX):
        package = card.record.model.removeprefix(PACKAGE_PREFIX).partition("/")[0]
        notes[0] += f" The base model comes inside the Python package `{package}`."
    elif not card.complete and not card.base_on_hub and isinstance(card.folder, HubRepo):
        name = escape_markdown(card.location.removeprefix("./"))
        notes[0] += (
            f" **The base model is not in this repository, nor on the Hub**: it was a folder called {name} where the "
            "adapter was trained. Replace `base` in the code by the folder where you have it; for `peftsearch predict` "
            "write it as `base_model_name_or_path` into `adapter_config.json`."
        )
    elif not card.complete and not card.base_on_hub:
        notes[0] += (
            " The base model is in a folder: whoever loads the adapter elsewhere has to change `base` (and, for PEFT's "
            "`AutoPeftModel` classes, `base_model_name_or_path` in `adapter_config.json`)."
        )
    if card.trust_remote_code:
        notes.append(
            "**Loading it runs Python code that comes with the base model** (`trust_remote_code=True`): read that code "
            "first."
        )
    if not card.complete:
        notes[0] += " `transformers` will say that the base's task head is missing: the adapter brings it."
    return notes


def _scores_table(card: CardFacts) -> str:
    record = card.record
    baselines = card.domain.baselines.get(record.model, {})
    header = ["score", "this model", *(escape_markdown(baseline.title) for baseline in baselines.values())]
    rows = [
        [
            escape_markdown(name),
            f"{value:.4f}",
            *(f"{b.scores[name]:.4f}" if name in b.scores else "" for b in baselines.values()),
        ]
        for name, value in record.scores.items()
        if "/" not in name
    ]
    return _table(header, rows)


def _confirmation(card: CardFacts) -> list[str]:
    found = card.record.confirmed
    if found is None:
        return ["One training run; the test split has not been read for it."]
    metric = escape_markdown(card.domain.metric)
    test = ""
    if found.test_mean is not None:
        test = f" and {found.test_mean:.4f} ± {found.test_std or 0.0:.4f} on the test split"
    seeds = f"{found.seeds} further seed{'s' if found.seeds > 1 else ''}"
    lost = len(card.record.failed_confirmations)
    failed = f" {lost} further re-training{'s' if lost > 1 else ''} failed." if lost else ""
    return [
        f"The configuration, trained again with {seeds}: {metric} {found.mean:.4f} ± {found.std:.4f} on the "
        f"{SPLIT} split{test} (mean and standard deviation).{failed}"
    ]


_LABEL_SCORES = ("f1", "precision", "recall")


def _label_table(scores: Mapping[str, float]) -> list[str]:
    by_label: dict[str, dict[str, float]] = {}
    for name, value in scores.items():
        kind, slash, label = name.partition("/")
        # Of a domain that joins others, the others' metrics are named alike.
        if slash and kind in _LABEL_SCORES:
            by_label.setdefault(label, {})[kind] = value
    if not by_label:
        return []
    kinds = list(dict.fromkeys(kind for values in by_label.values() for kind in values))
    rows = [
        [escape_markdown(label), *(f"{values[kind]:.4f}" if kind in values else "" for kind in kinds)]
        for label, values in by_label.items()
    ]
    return ["By label:", _table(["label", *kinds], rows)]


def _training_table(card: CardFacts) -> str:
    record, training = card.record, card.spec.training_of(card.record.method)
    rows = [
        ["method", METHODS[record.method].title],
        *([name, str(value)] for name, value in record.hyperparameters.items() if value != ""),
        ["steps", f"{record.total_steps:,} of {training.batch}"],
        ["seed", str(record.seed)],
        ["tokens per text", str(card.domain.max_length)],
        ["data", f"{card.domain.source} ({card.domain.rows.get('train', 0):,} examples to train on)"],
        ["seconds of training", f"{record.train_seconds:.1f}"],
    ]
    return _table(["setting", "value"], [[escape_markdown(cell) for cell in row] for row in rows])


def _origin(card: CardFacts) -> str:
    """Where one sees the trial among the others."""
    study, record = card.facts.study, card.record
    place = f"front.html#{quote(record.domain, safe='')}/{record.number}"
    run = f"MLflow run `{record.mlflow_run_id}`; " if record.mlflow_run_id else ""
    return f"Among the study's other trials: {run}`peftsearch frontier {study} --html front.html`, then `{place}`."


def _limits(card: CardFacts) -> list[str]:
    if not card.domain.warnings:
        return []
    return ["What to know about the data:", "\n".join(f"- {escape_markdown(text)}" for text in card.domain.warnings)]


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, [":---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def _slug(title: Any) -> str:
    return re.sub(r"[^a-z0-9]+", "-", str(title).lower()).strip("-")
