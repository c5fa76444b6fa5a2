"""Tiny base models of the three architectures, with real tokenizers, written into a folder without a network.

The tokenizers know some everyday words and spell every other word in pieces (``zebra`` is ``z ##e ##b ##r ##a``), so
any ASCII text can be written and read back. Text is lower-cased.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

HIDDEN = 32
LAYERS = 2
MAX_LENGTH = 128

WORDS = tuple(
    """
    yes no maybe true false good bad new old big small first last all other not very
    the a an of and or with for under any such in on at to from by is are was were be has have
    i you he she it we they this that what who where when why how does
    dog cat bird tree house city river man woman child doctor patient drug gene protein cell
    party agreement clause breach liability termination notice governing law court contract
    fever infection lesion chronic acute anemia fracture benign malignant syndrome disease
    share dividend bond yield equity hedge market price company money
    question answer context summary summarize text sentence label entity classify translate choice
    red green blue white black one two three four five run eat see go make take give find
    """.split()  # noqa: SIM905
)
"""Words that are one token each (single letters, digits and punctuation are too)."""

SAMPLES: dict[str, dict[str, Any]] = {
    "lora": {
        "rank": 4,
        "alpha": 16.0,
        "targets": "attention",
        "variant": "lora",
        "dropout": 0.0,
        "learning_rate": 5e-3,
    },
    "qlora": {
        "rank": 2,
        "alpha": 8.0,
        "targets": "all-linear",
        "variant": "lora",
        "quantization": "nf4",
        "dropout": 0.0,
        "learning_rate": 5e-3,
    },
    "adapter": {
        "bottleneck": 4,
        "activation": "gelu",
        "placement": "pfeiffer",
        "scale": 4.0,
        "quantization": "none",
        "dropout": 0.0,
        "learning_rate": 5e-3,
    },
    "hybrid": {
        "rank": 2,
        "alpha": 8.0,
        "targets": "attention",
        "bottleneck": 4,
        "activation": "gelu",
        "placement": "houlsby",
        "scale": 4.0,
        "quantization": "none",
        "dropout": 0.0,
        "learning_rate": 5e-3,
    },
    "prompt": {"tokens": 3, "init": "text", "init_text": "", "learning_rate": 5e-2},
    "prefix": {"tokens": 3, "projection": True, "hidden": 8, "learning_rate": 5e-3},
    "p_tuning": {"tokens": 3, "encoder": "mlp", "hidden": 8, "learning_rate": 5e-3},
    "p_tuning_v2": {"tokens": 3, "learning_rate": 5e-2},
    "ia3": {"learning_rate": 1e-2},
    "bitfit": {"learning_rate": 1e-2},
    "layer_norm": {"learning_rate": 1e-2},
    "full": {"learning_rate": 1e-3},
}
"""Method -> a cheap full configuration, for tests that run over all methods."""


def tiny_encoder(folder: Path) -> Path:
    """A two-layer BERT, saved as a masked language model (so that a classifier's pooler is not in the checkpoint)."""
    import torch
    from tokenizers import processors
    from transformers import BertConfig, BertForMaskedLM

    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    backend = _word_pieces(specials, unknown="[UNK]")
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    _save_tokenizer(
        backend,
        folder,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        eos_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=backend.get_vocab_size(),
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        intermediate_size=2 * HIDDEN,
        max_position_embeddings=MAX_LENGTH,
        initializer_range=0.1,
        pad_token_id=0,
    )
    BertForMaskedLM(config).save_pretrained(folder)
    return folder


def tiny_deep_headed_encoder(folder: Path) -> Path:
    """A two-layer RoBERTa, whose classification head is a network of its own, with dropout in it."""
    import torch
    from transformers import BertConfig, RobertaConfig, RobertaForMaskedLM

    written = BertConfig.from_pretrained(tiny_encoder(folder))
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    torch.manual_seed(0)
    config = RobertaConfig(
        **{name: getattr(written, name) for name in sizes},
        # Its positions begin after the padding token's number.
        max_position_embeddings=MAX_LENGTH + 1,
        type_vocab_size=2,
        initializer_range=0.1,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    RobertaForMaskedLM(config).save_pretrained(folder)
    return folder


def tiny_encoder_decoder(folder: Path) -> Path:
    """A T5 in the manner of Flan-T5 (gated, untied), with two layers on either side."""
    import torch
    from tokenizers import processors
    from transformers import T5Config, T5ForConditionalGeneration

    backend = _word_pieces(["<pad>", "</s>", "<unk>"], unknown="<unk>")
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    _save_tokenizer(
        backend,
        folder,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="</s>",
        model_input_names=["input_ids", "attention_mask"],
    )
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=backend.get_vocab_size(),
        d_model=HIDDEN,
        d_kv=HIDDEN // 4,
        d_ff=2 * HIDDEN,
        num_layers=LAYERS,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    model = T5ForConditionalGeneration(config)
    with torch.no_grad():
        # transformers draws an untied head so wide that the model is very sure of nonsense, and long to unlearn it.
        model.lm_head.weight.mul_(HIDDEN**-0.5)
    model.save_pretrained(folder)
    return folder


def tiny_decoder(folder: Path) -> Path:
    """A two-layer Llama with grouped key-value heads; the tokenizer puts ``<s>`` first."""
    import torch
    from tokenizers import processors
    from transformers import LlamaConfig, LlamaForCausalLM

    backend = _word_pieces(["<pad>", "<s>", "</s>", "<unk>"], unknown="<unk>")
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B:1", special_tokens=[("<s>", 1)]
    )
    _save_tokenizer(
        backend,
        folder,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        model_input_names=["input_ids", "attention_mask"],
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=backend.get_vocab_size(),
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2 * MAX_LENGTH,
        initializer_range=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def tiny_biased_decoder(folder: Path) -> Path:
    """A two-layer GPT-2: biases, `Conv1D` for linear layers, its embeddings as its head; and no padding token."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    backend = _word_pieces(["<|endoftext|>", "<unk>"], unknown="<unk>")
    _save_tokenizer(
        backend,
        folder,
        unk_token="<unk>",
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        model_input_names=["input_ids", "attention_mask"],
    )
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=backend.get_vocab_size(),
        n_embd=HIDDEN,
        n_layer=LAYERS,
        n_head=4,
        n_positions=2 * MAX_LENGTH,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=0,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def _word_pieces(specials: Sequence[str], unknown: str) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    characters = string.ascii_lowercase + string.digits
    tokens = dict.fromkeys(
        (*specials, *WORDS, *characters, *(f"##{character}" for character in characters), *string.punctuation)
    )
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token=unknown, max_input_chars_per_word=100))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return backend


def _save_tokenizer(backend: Tokenizer, folder: Path, **kwargs: Any) -> None:
    from transformers import PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=MAX_LENGTH, **kwargs).save_pretrained(folder)
