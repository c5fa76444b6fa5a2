"""What a model card shows of using a model: for each task a function over `model` and `tokenizer`, and a call of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from peftsearch.domains import Task
from peftsearch.domains.models import Architecture
from peftsearch.domains.tasks import Tokenization
from peftsearch.domains.tasks.classification import BETWEEN
from peftsearch.export.purpose import markers_of, marking
from peftsearch.spec import DomainFacts


@dataclass(frozen=True)
class Use:
    """What the code of a card depends on besides loading.

    Attributes:
        task: The domain's task, with its options.
        facts: The domain as it was prepared.
        architecture: Kind of the base model.
        pair: Whether the data has two texts for each example.
    """

    task: Task
    facts: DomainFacts
    architecture: Architecture
    pair: bool


def usage(use: Use) -> list[str]:
    """Lines of Python that define and call a function for the task; [] for a task whose use takes more than a card
    can show (``peftsearch evaluate`` scores it)."""
    make = _USAGE.get(use.task.name)
    return make(use) if make is not None else []


def examples_of(use: Use) -> tuple[list[str], list[str]]:
    """Texts to show the use with, as Python writes them; and what goes with each, where the data has pairs."""
    markers = markers_of(use.task)
    first = ['"A first text."', '"Another one."'][: 1 if use.pair else 2]
    if markers:
        first = [repr(f"A text with {' and '.join(markers)}.")]
    return first, ['"What goes with it."'] if use.pair else []


def reads_first_piece(use: Use) -> bool:
    """Whether a word's tag is that of its first piece, rather than of its last."""
    return (use.task.options.piece or ("last" if use.architecture == "decoder" else "first")) == "first"


def _generation(use: Use) -> list[str]:
    """Arguments of ``generate`` with which the study's texts were written."""
    task: Any = use.task
    options, settings = task.options, task.options.generation
    arguments = [f"max_new_tokens={settings.max_tokens or options.target_length}", f"num_beams={settings.beams}"]
    arguments += [f"min_new_tokens={settings.min_tokens}"] if settings.min_tokens else []
    # What a checkpoint's generation_config.json says is overruled here, too.
    arguments += [] if settings.min_tokens else ["min_length=0"]
    arguments += [f"length_penalty={settings.length_penalty:g}", "early_stopping=False"] if settings.beams > 1 else []
    arguments += [f"no_repeat_ngram_size={settings.no_repeat_ngram}", "repetition_penalty=1.0"]
    arguments.append(f"do_sample={settings.sample}")
    arguments += [f"temperature={settings.temperature:g}", "top_k=0", "top_p=1.0"] if settings.sample else []
    return arguments


def between(use: Use, second: str) -> str:
    """The second text of a pair as the model reads it, in Python (see `apart`)."""
    return f"{BETWEEN!r} + {second}" if use.architecture == "decoder" else second


def _logits(use: Use) -> list[str]:
    others = f"[{between(use, 'text')} for text in other_texts]" if use.architecture == "decoder" else "other_texts"
    texts = f"texts, {others}" if use.pair else "texts"
    length = use.facts.max_length
    return [
        f"    inputs = tokenizer({texts}, truncation=True, max_length={length}, padding=True, return_tensors='pt')",
        "    with torch.no_grad():",
        "        logits = model(**inputs).logits",
    ]


def _about_texts(use: Use, name: str, result: str, before: Sequence[str] = ()) -> list[str]:
    texts = "texts, other_texts" if use.pair else "texts"
    example = ", ".join(f"[{', '.join(column)}]" for column in examples_of(use) if column)
    markers = markers_of(use.task)
    about = [f"# Texts hold {marking(markers)}."] if markers else []
    return [
        f"def {name}({texts}):",
        *_logits(use),
        *before,
        f"    return {result}",
        "",
        "",
        *about,
        f"print({name}({example}))",
    ]


def _classification(use: Use) -> list[str]:
    return _about_texts(use, "classify", "[labels[number] for number in logits.argmax(dim=-1).tolist()]")


def _multi_label(use: Use) -> list[str]:
    threshold = use.task.options.threshold
    return _about_texts(
        use,
        "classify",
        "[[label for label, there in zip(labels, row) if there] for row in chosen]",
        [f"    chosen = (logits.sigmoid() >= {threshold:g}).tolist()"],
    )


def _similarity(use: Use) -> list[str]:
    from peftsearch.domains.tasks.similarity import scale_of

    if use.task.options.encoding == "separate":
        low, high = use.task.options.range
        return [
            "def rate(texts, other_texts):",
            f"    inputs = tokenizer([*texts, *other_texts], truncation=True, max_length={use.facts.max_length}, "
            "padding=True, return_tensors='pt')",
            '    mask = inputs["attention_mask"].unsqueeze(-1)',
            "    with torch.no_grad():",
            "        hidden = model(**inputs).last_hidden_state[:, -mask.shape[1]:]",
            "    first, second = ((hidden * mask).sum(1) / mask.sum(1)).chunk(2)",
            "    cosines = torch.nn.functional.cosine_similarity(first, second).clamp(0.0, 1.0)",
            f"    return [{low:g} + {high - low:g} * cosine for cosine in cosines.tolist()]",
            "",
            "",
            'print(rate(["A first text."], ["What goes with it."]))',
        ]
    mean, deviation = scale_of(use.facts.labels)
    rated = f"{mean!r} + {deviation!r} * value"
    if use.task.options.range is not None:
        low, high = use.task.options.range
        rated = f"min(max({rated}, {low:g}), {high:g})"
    return _about_texts(use, "rate", f"[{rated} for value in logits[:, 0].tolist()]")


def _token_classification(use: Use) -> list[str]:
    last = not reads_first_piece(use)
    return [
        "def tag(words):",
        f"    inputs = tokenizer([' '.join(words)], truncation=True, max_length={use.facts.max_length}, "
        "return_offsets_mapping=True, return_tensors='pt')",
        '    offsets = inputs.pop("offset_mapping")[0].tolist()',
        "    with torch.no_grad():",
        "        found = model(**inputs).logits[0, -len(offsets):].argmax(dim=-1).tolist()",
        "    word_at = [number for number, word in enumerate(words) for _ in (*word, ' ')]",
        "    pieces = [(word_at[end - 1], labels[tag]) for (start, end), tag in zip(offsets, found) if end > start]",
        f"    tags = dict({'pieces' if last else 'reversed(pieces)'})  # a word's {'last' if last else 'first'} piece",
        "    return [(word, tags.get(number, 'O')) for number, word in enumerate(words)]",
        "",
        "",
        'print(tag(["A", "sentence", "in", "words", "."]))',
    ]


def _multiple_choice(use: Use) -> list[str]:
    second = between(use, '(f"{question} {choice}" if context else choice)')
    return [
        'def choose(question, choices, context=""):',
        f"    pairs = [(context or question, {second}) for choice in choices]",
        f"    inputs = tokenizer(*map(list, zip(*pairs)), truncation=True, max_length={use.facts.max_length}, "
        "padding=True, return_tensors='pt')",
        "    with torch.no_grad():",
        "        scores = model(**inputs).logits[:, 0]",
        "    return choices[int(scores.argmax())]",
        "",
        "",
        'print(choose("What is it?", ["One thing.", "Another one."]))',
    ]


def _language_modeling(use: Use) -> list[str]:
    if use.architecture != "decoder":
        return []
    return [
        "def perplexity(text):  # with its end; of a long text its first window",
        "    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]",
        '    ids = tokenizer(text)["input_ids"]',
        f"    ids = torch.tensor([(ids if ids[-1:] == end else ids + end)[:{use.facts.max_length}]])",
        "    with torch.no_grad():",
        "        logits = model(input_ids=ids).logits[:, -ids.shape[1]:]",
        "    return torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:]).exp().item()",
        "",
        "",
        'print(perplexity("A text of the domain."))',
    ]


def _writing(use: Use) -> list[str]:
    task: Any = use.task
    options = task.options
    template = task.template(Tokenization(None, use.facts.max_length, use.architecture), use.pair)
    texts = "text, text_pair" if use.pair else "text"
    decoder = use.architecture == "decoder"
    lines = [
        "ends = model.generation_config.eos_token_id",
        "ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}",
        "generation = dict(",
        f"    {', '.join(_generation(use))},",
        "    eos_token_id=sorted(ends),",
        "    pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,",
        ")",
    ]
    if decoder and options.generation.no_repeat_ngram:
        lines.append("# In the study no_repeat_ngram_size was for the answer alone; here the prompt counts, too.")
    lines += ["", "", f"def prompt_of({texts}):", f"    return {_joined(template)}", "", "", f"def tokens_of({texts}):"]
    prompt, special = f"prompt_of({texts})", ""
    if options.chat:
        lines += [
            f'    message = [{{"role": "user", "content": {prompt}}}]',
            "    prompt = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)",
        ]
        prompt, special = "prompt", ", add_special_tokens=False"
    lines.append(f"    inputs = tokenizer([{prompt}], return_tensors='pt'{special})")
    if decoder and not options.chat:
        lines += [
            '    if inputs["input_ids"][0, -1] == tokenizer.eos_token_id:  # the answer is still to come',
            "        inputs = {name: value[:, :-1] for name, value in inputs.items()}",
        ]
    lines += [
        "    return inputs",
        "",
        "",
        "def shorter(text, excess):  # by so many tokens, about",
        '    tokens = max(1, len(tokenizer(text)["input_ids"]))',
        "    return text[: min(len(text) - 1, len(text) * max(0, tokens - excess) // tokens)]",
        "",
        "",
        f"def write({texts}):",
        f"    inputs = tokens_of({texts})",
        f"    while {'(text or text_pair)' if use.pair else 'text'} and "
        f'(excess := inputs["input_ids"].shape[1] - {use.facts.max_length}) > 0:',
    ]
    if use.pair:
        lines += [
            "        if len(text) > len(text_pair):  # the longer text is cut, not what stands around it",
            "            text = shorter(text, excess)",
            "        else:",
            "            text_pair = shorter(text_pair, excess)",
        ]
    else:
        lines.append("        text = shorter(text, excess)  # the text is cut, not what stands around it")
    lines += [
        f"        inputs = tokens_of({texts})",
        "    with torch.no_grad():",
        '        ids = model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], '
        "**generation)",
        "    return tokenizer.decode(ids[0"
        + (', inputs["input_ids"].shape[1]:' if decoder else "")
        + "], skip_special_tokens=True).strip()",
        "",
        "",
        f'print(write("A text."{", " + repr("What goes with it.") if use.pair else ""}))',
    ]
    return lines


def _joined(template: str) -> str:
    """A template as Python adds it up: braces in it, or in the texts, mean nothing."""
    parts = re.split(r"\{(text|text_pair)\}", template)
    words = [part if number % 2 else repr(part) for number, part in enumerate(parts) if part]
    return " + ".join(words)


def _question_answering(use: Use) -> list[str]:
    if use.architecture != "encoder":
        return []
    task: Any = use.task
    return [
        "def answer(question, context):  # of a context that fits into one window",
        "    inputs = tokenizer([question], [context], truncation='only_second', "
        f"max_length={use.facts.max_length}, return_offsets_mapping=True, return_tensors='pt')",
        '    offsets = inputs.pop("offset_mapping")[0].tolist()',
        "    with torch.no_grad():",
        "        output = model(**inputs)",
        "    first, last = (x[0, -len(offsets):] for x in (output.start_logits, output.end_logits))",
        "    passage = [n for n, part in enumerate(inputs.sequence_ids()) if part == 1]",
        f"    spans = [(first[i] + last[j], i, j) for i in passage for j in passage if i <= j < i + "
        f"{task.options.max_answer_length}]",
        "    score, i, j = max(spans)",
        f"    if first[0] + last[0] > score + {task.threshold:g}:",
        '        return ""  # no answer',
        "    return context[offsets[i][0] : offsets[j][1]]",
        "",
        "",
        'print(answer("What is it?", "It is a context that may hold the answer."))',
    ]


_USAGE: dict[str, Callable[[Use], list[str]]] = {
    "classification": _classification,
    "relation": _classification,
    "multi_label": _multi_label,
    "similarity": _similarity,
    "token_classification": _token_classification,
    "question_answering": _question_answering,
    "multiple_choice": _multiple_choice,
    "language_modeling": _language_modeling,
    "summarization": _writing,
    "instruction": _writing,
}
