"""Nets of transformers, made from their configurations; all but those of a published size are shrunken."""

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from zoo_nets.net import SAMPLES, Example, Net, example, images, tokens
from zoo_nets.packages import declare_torchvision_operators

ENCODER, DECODER, BOTH = "text encoder", "language model", "text to text"
VISION, SPEECH = "vision transformer", "speech and sound"
WORDS, LENGTH, OTHER_LENGTHS = 1000, 12, (7, 19)

# Sizes under the names that most configurations use.
SMALL: Mapping[str, Any] = {
    "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256,
}  # fmt: skip
CAUSAL: Mapping[str, Any] = {"vocab_size": WORDS, "use_cache": False, "pad_token_id": 0}


def hf_net(model: str, config: Mapping[str, Any], inputs: Mapping[str, Tensor]) -> Example:
    """Return a net of transformers with random weights.

    Args:
        model: name of its class, which knows the class of its configuration.
        config: what differs from the defaults.
        inputs: its inputs.
    """
    declare_torchvision_operators()  # transformers imports torchvision where it is installed
    cls = getattr(import_module("transformers"), model)
    return example(cls(cls.config_class(**config)), **inputs)


def _sentences(model: str, words: int = WORDS, *, mask: bool = False, **config: Any) -> Example:
    inputs = {"input_ids": tokens(words, LENGTH)}
    if mask:
        inputs["attention_mask"] = torch.ones(SAMPLES, LENGTH, dtype=torch.long)
        inputs["attention_mask"][1::2, LENGTH - 3 :] = 0
    return hf_net(model, {"vocab_size": words, **config}, inputs)


def _text(name: str, family: str, model: str, words: int = WORDS, *, mask: bool = False, **config: Any) -> Net:
    axes = {"input_ids": 1, "attention_mask": 1} if mask else {"input_ids": 1}
    make = partial(_sentences, model, words, mask=mask, **config)
    return Net(name, family, make, package="transformers", lengths=OTHER_LENGTHS, length_axes=axes)


def _decoder(name: str, model: str, words: int = WORDS, **config: Any) -> Net:
    return _text(name, DECODER, model, words, **{"use_cache": False, "pad_token_id": 0, **config})


def _pixels(name: str, model: str, size: int, family: str = VISION, **config: Any) -> Net:
    return Net(name, family, lambda: hf_net(model, config, {"pixel_values": images(size)}), package="transformers")


def _t5() -> Example:
    config = {"d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 2, "num_heads": 4, **CAUSAL}
    inputs = {"input_ids": tokens(WORDS, LENGTH), "decoder_input_ids": tokens(WORDS, 9)}
    return hf_net("T5ForConditionalGeneration", config, inputs)


def _bart() -> Example:
    config = {
        "d_model": 128, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 256, "decoder_ffn_dim": 256, "max_position_embeddings": 64,
        **CAUSAL,
    }  # fmt: skip
    inputs = {"input_ids": tokens(WORDS, LENGTH), "decoder_input_ids": tokens(WORDS, 9)}
    return hf_net("BartForConditionalGeneration", config, inputs)


def _whisper() -> Example:
    config = {
        "d_model": 128, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 256, "decoder_ffn_dim": 256, "max_source_positions": 100,
        "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, **CAUSAL,
    }  # fmt: skip
    inputs = {"input_features": torch.randn(SAMPLES, 80, 200), "decoder_input_ids": tokens(WORDS, 9)}
    return hf_net("WhisperForConditionalGeneration", config, inputs)


def _waves(model: str) -> Example:
    config = {
        **SMALL, "vocab_size": 32, "conv_dim": (64, 64, 64), "conv_stride": (5, 2, 2), "conv_kernel": (10, 3, 3),
        "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
    }  # fmt: skip
    return hf_net(model, config, {"input_values": torch.randn(SAMPLES, 2000)})


def _spectrogram_transformer() -> Example:
    config = {**SMALL, "max_length": 128, "num_mel_bins": 64, "num_labels": 35}
    return hf_net("ASTForAudioClassification", config, {"input_values": torch.randn(SAMPLES, 128, 64)})


def _clip() -> Example:
    text = {**SMALL, "vocab_size": WORDS, "max_position_embeddings": 32, "eos_token_id": 2}
    vision = {**SMALL, "image_size": 64, "patch_size": 16}
    inputs = {"input_ids": tokens(WORDS, LENGTH), "pixel_values": images(64)}
    return hf_net("CLIPModel", {"text_config": text, "vision_config": vision, "projection_dim": 64}, inputs)


def _detr() -> Example:
    declare_torchvision_operators()
    transformers = import_module("transformers")
    backbone = transformers.ResNetConfig(
        embedding_size=32, hidden_sizes=[32, 64, 96, 128], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage4"],
    )  # fmt: skip
    config = {
        "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None, "backbone_config": backbone,
        "d_model": 128, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 256, "decoder_ffn_dim": 256, "num_queries": 20,
        "num_labels": 20,
    }  # fmt: skip
    return hf_net("DetrForObjectDetection", config, {"pixel_values": images(128)})


def _net(name: str, family: str, make: Callable[[], Example], lengths: tuple[int, ...] = (), **axes: int) -> Net:
    return Net(name, family, make, package="transformers", lengths=lengths, length_axes=axes)


NETS = (
    _text("MobileBERT", ENCODER, "MobileBertForSequenceClassification", 30522, mask=True),
    _text("BERT-Tiny", ENCODER, "BertForSequenceClassification", 30522, mask=True, hidden_size=128,
          num_hidden_layers=2, num_attention_heads=2, intermediate_size=512),
    _text("DistilBERT (2 layers)", ENCODER, "DistilBertForSequenceClassification", mask=True, dim=128, n_layers=2,
          n_heads=4, hidden_dim=256),
    _text("RoBERTa (2 layers)", ENCODER, "RobertaForMaskedLM", mask=True, **SMALL),
    _text("ALBERT-base", ENCODER, "AlbertForSequenceClassification", 30000, mask=True, hidden_size=768,
          num_attention_heads=12, intermediate_size=3072),
    _text("ELECTRA-small", ENCODER, "ElectraForSequenceClassification", 30522, mask=True),
    _text("SqueezeBERT (2 layers)", ENCODER, "SqueezeBertForSequenceClassification", mask=True, embedding_size=128,
          **SMALL),
    _text("DeBERTa-v2 (2 layers)", ENCODER, "DebertaV2ForSequenceClassification", mask=True, **SMALL),
    _decoder("GPT-2 (2 layers)", "GPT2LMHeadModel", n_layer=2, n_head=4, n_embd=128, n_positions=64),
    _decoder("Llama (2 layers)", "LlamaForCausalLM", **SMALL),
    _decoder("Mixtral (2 layers, 4 experts)", "MixtralForCausalLM", num_key_value_heads=2, num_local_experts=4,
             **SMALL),
    _decoder("Mistral (2 layers)", "MistralForCausalLM", num_key_value_heads=2, **SMALL),
    _decoder("Qwen2 (2 layers)", "Qwen2ForCausalLM", num_key_value_heads=2, **SMALL),
    _decoder("Qwen3 (2 layers)", "Qwen3ForCausalLM", num_key_value_heads=2, head_dim=32, **SMALL),
    _decoder("Phi (2 layers)", "PhiForCausalLM", **SMALL),
    _decoder("Gemma (2 layers)", "GemmaForCausalLM", num_key_value_heads=1, head_dim=32, **SMALL),
    _decoder("OPT (2 layers)", "OPTForCausalLM", hidden_size=128, num_hidden_layers=2, num_attention_heads=4,
             ffn_dim=256, word_embed_proj_dim=128, max_position_embeddings=64),
    _decoder("BLOOM (2 layers)", "BloomForCausalLM", hidden_size=128, n_layer=2, n_head=4),
    _decoder("Pythia-14M", "GPTNeoXForCausalLM", 50304, hidden_size=128, num_hidden_layers=6, num_attention_heads=4,
             intermediate_size=512),
    _decoder("Falcon (2 layers)", "FalconForCausalLM", hidden_size=128, num_hidden_layers=2, num_attention_heads=4),
    _decoder("Mamba (2 layers)", "MambaForCausalLM", hidden_size=128, num_hidden_layers=2, state_size=16),
    _net("T5 (2 layers)", BOTH, _t5, OTHER_LENGTHS, input_ids=1, decoder_input_ids=1),
    _net("BART (2 layers)", BOTH, _bart, OTHER_LENGTHS, input_ids=1, decoder_input_ids=1),
    _net("Whisper (2 layers)", SPEECH, _whisper, OTHER_LENGTHS, decoder_input_ids=1),
    _net("wav2vec 2.0 (2 layers)", SPEECH, partial(_waves, "Wav2Vec2ForCTC"), (1600, 2600), input_values=1),
    _net("HuBERT (2 layers)", SPEECH, partial(_waves, "HubertForCTC"), (1600, 2600), input_values=1),
    _net("Audio Spectrogram Transformer (2 layers)", SPEECH, _spectrogram_transformer),
    _net("CLIP (2 layers)", VISION, _clip, OTHER_LENGTHS, input_ids=1),
    _pixels("SegFormer-B0", "SegformerForSemanticSegmentation", 64),
    _pixels("BEiT (2 layers)", "BeitForImageClassification", 64, image_size=64, use_absolute_position_embeddings=True,
            use_relative_position_bias=True, **SMALL),
    _pixels("DINOv2 (2 layers)", "Dinov2ForImageClassification", 70, image_size=70, hidden_size=128,
            num_hidden_layers=2, num_attention_heads=4),
    _net("DETR (2 layers)", "detection and segmentation", _detr),
)  # fmt: skip
