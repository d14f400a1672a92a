"""A small BERT of transformers that classifies sentences, made from its configuration: nothing is downloaded."""

from transformers import BertConfig, BertForSequenceClassification

WORDS = 128
LENGTH = 16
CLASSES = 4
PADDING = 0


def encoder() -> BertForSequenceClassification:
    """Return the encoder with random weights."""
    config = BertConfig(
        vocab_size=WORDS,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=2 * LENGTH,
        num_labels=CLASSES,
        pad_token_id=PADDING,
    )
    return BertForSequenceClassification(config)
