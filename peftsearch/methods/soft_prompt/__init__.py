"""Soft tokens in front of the text (prompt tuning, P-tuning) for every model and task, as a PEFT method of our own.

PEFT's own prompt tuning serves bare models, and is used there. Elsewhere it goes wrong (0.21.2, tried):

- heads of encoders that read the first position (BERT's pooler, RoBERTa's classifier): they read the first soft token
  there, not the text's ``[CLS]`` that they, or the pooler, were pretrained on;
- heads that refuse ``inputs_embeds`` (T5 that classifies);
- heads that look for the last token in ``input_ids``, which PEFT does not pass: a decoder that classifies reads the
  padding's output;
- generation by a decoder: the positions of a padded batch are dropped, so that the distance between soft tokens and
  text, and with it the answer, depends on the other texts of the batch;
- generation by an encoder-decoder: the decoder's soft tokens are left out, and teacher forcing with
  ``decoder_input_ids`` raises;
- tasks that PEFT has no class for (masked language models), heads with names that it does not know, and embeddings
  narrower than the model (ALBERT, ELECTRA).
"""

from __future__ import annotations


def register() -> None:
    """Make PEFT know our soft prompts, so that `get_peft_model` and `PeftModel.from_pretrained` take them.

    May be called any number of times.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    from peftsearch.methods.soft_prompt.config import PEFT_TYPE, SoftPromptConfig
    from peftsearch.methods.soft_prompt.model import SoftPromptModel

    PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = SoftPromptConfig
    PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = SoftPromptModel
    PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = SoftPromptModel.prefix
