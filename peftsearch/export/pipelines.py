"""What a model card shows of `transformers`' pipelines: for the tasks that they serve, one that gives the real labels.

`transformers` 5 has no pipeline that answers questions from a context, chooses among answers, rates pairs of texts, or
has an encoder-decoder write.
"""

from __future__ import annotations

from collections.abc import Callable

from peftsearch.export.usage import Use, between, examples_of, reads_first_piece


def pipeline_code(use: Use, model: str, *, lengthens: bool) -> list[str]:
    """Lines of Python that follow those that load the model; [] where no pipeline does the task as it was trained.

    Args:
        use: What is done with the model.
        model: The pipeline's arguments that say which model it has.
        lengthens: Whether the model's output begins with soft tokens, which the pipeline for tagging takes for text.
    """
    make = _PIPELINES.get(use.task.name)
    lines = make(use, model, lengthens) if make is not None else []
    return ["from transformers import pipeline", "", *lines] if lines else []


def _classification(use: Use, model: str, lengthens: bool) -> list[str]:
    return [_made("text-classification", model), f"print(pipe({_texts(use)}, {_cut(use)}))"]


def _multi_label(use: Use, model: str, lengthens: bool) -> list[str]:
    return [
        _made("text-classification", model),
        f'rows = pipe({_texts(use)}, top_k=None, function_to_apply="sigmoid", {_cut(use)})',
        f'print([[found["label"] for found in row if found["score"] >= {use.task.options.threshold:g}] '
        "for row in rows])",
    ]


def _token_classification(use: Use, model: str, lengthens: bool) -> list[str]:
    if lengthens or not reads_first_piece(use):
        return []
    return [
        _made("token-classification", f'{model}, aggregation_strategy="first"'),
        f"pipe.tokenizer.model_max_length = {use.facts.max_length}",
        'print(pipe("A sentence in words ."))  # its words end at punctuation marks, too; those of `tag` were scored',
    ]


def _writing(use: Use, model: str, lengthens: bool) -> list[str]:
    if use.architecture != "decoder":
        return []
    fields = 'text="A text."' + (', text_pair="What goes with it."' if use.pair else "")
    return [
        _made("text-generation", model),
        f"prompt = prompt_of({fields})",
        *(['prompt = [{"role": "user", "content": prompt}]'] if use.task.options.chat else []),
        "written = pipe(prompt, return_full_text=False, **generation)",
        'print(written[0]["generated_text"].strip())',
    ]


def _made(tag: str, model: str) -> str:
    return f'pipe = pipeline("{tag}", {model})'


def _texts(use: Use) -> str:
    first, second = examples_of(use)
    if not use.pair:
        return f"[{', '.join(first)}]"
    pairs = (f'{{"text": {one}, "text_pair": {between(use, other)}}}' for one, other in zip(first, second, strict=True))
    return f"[{', '.join(pairs)}]"


def _cut(use: Use) -> str:
    return f"truncation=True, max_length={use.facts.max_length}"


_PIPELINES: dict[str, Callable[[Use, str, bool], list[str]]] = {
    "classification": _classification,
    "relation": _classification,
    "multi_label": _multi_label,
    "token_classification": _token_classification,
    "summarization": _writing,
    "instruction": _writing,
}
