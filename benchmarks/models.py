"""Twenty-five architectures as small random-weight models: what the compiler is swept over.

``ZOO[name]()`` builds the model in eval mode, inputs to capture it with, and inputs of other sizes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn as nn
import transformers as hf

VOCABULARY = 128
Inputs = tuple[tuple[Any, ...], dict[str, Any]]


class Sample(NamedTuple):
    """A model with inputs; ``other`` are inputs of another batch and sequence size."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    other: Inputs | None


_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128,
    "use_cache": False,
}  # fmt: skip
_GROUPED: dict[str, Any] = {**_COMMON, "num_key_value_heads": 2, "head_dim": 16,
                            "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}


def token_ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random token ids of shape [batch, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


def image(batch: int, size: int, seed: int = 0) -> torch.Tensor:
    """A random image batch [batch, 3, size, size]."""
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def mask_like(ids: torch.Tensor) -> torch.Tensor:
    """An attention mask that hides the last two tokens of the first row."""
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    return mask


def _build(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


def _language_model(make: Callable[[], nn.Module], masked: bool = False) -> Sample:
    def inputs(batch: int, length: int) -> dict[str, Any]:
        ids = token_ids(batch, length)
        mask = {"attention_mask": mask_like(ids)} if masked else {}
        return {"input_ids": ids, **mask, "use_cache": False}

    return Sample(_build(make), (), inputs(2, 12), ((), inputs(3, 17)))


def _encoder(make: Callable[[], nn.Module]) -> Sample:
    def inputs(batch: int, length: int) -> dict[str, Any]:
        ids = token_ids(batch, length)
        return {"input_ids": ids, "attention_mask": mask_like(ids)}

    return Sample(_build(make), (), inputs(2, 12), ((), inputs(3, 17)))


def _vision(make: Callable[[], nn.Module], size: int) -> Sample:
    return Sample(_build(make), (image(2, size),), {}, ((image(3, size),), {}))


def _llama(**changes: Any) -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**_GROUPED, **changes}))


def _gemma2() -> nn.Module:
    return hf.Gemma2ForCausalLM(hf.Gemma2Config(
        **_GROUPED, sliding_window=8, query_pre_attn_scalar=16, attn_implementation="eager"))


def _gemma3() -> nn.Module:
    return hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(
        **_GROUPED, sliding_window=8, query_pre_attn_scalar=16))


def _gpt2() -> nn.Module:
    return hf.GPT2LMHeadModel(hf.GPT2Config(
        vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=128, use_cache=False,
        bos_token_id=1, eos_token_id=2))


def _gptneox() -> nn.Module:
    return hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_COMMON))


def _opt() -> nn.Module:
    return hf.OPTForCausalLM(hf.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=64, ffn_dim=128, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=128, word_embed_proj_dim=64,
        use_cache=False))


def _bert() -> nn.Module:
    return hf.BertModel(hf.BertConfig(**_COMMON))


def _roberta() -> nn.Module:
    return hf.RobertaModel(hf.RobertaConfig(**_COMMON, pad_token_id=1))


def _t5() -> Sample:
    def inputs(batch: int, length: int) -> dict[str, Any]:
        ids = token_ids(batch, length)
        return {"input_ids": ids, "attention_mask": mask_like(ids),
                "decoder_input_ids": token_ids(batch, length, seed=1), "use_cache": False}

    config = hf.T5Config(vocab_size=VOCABULARY, d_model=64, d_kv=16, d_ff=128, num_layers=2,
                         num_heads=4, use_cache=False, decoder_start_token_id=0)
    return Sample(_build(lambda: hf.T5ForConditionalGeneration(config)), (), inputs(2, 12),
                  ((), inputs(3, 17)))


def _mixtral() -> nn.Module:
    return hf.MixtralForCausalLM(hf.MixtralConfig(
        **_GROUPED, num_local_experts=4, num_experts_per_tok=2))


def _qwen3_moe() -> nn.Module:
    return hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(
        **_GROUPED, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64,
        decoder_sparse_step=1))


def _gpt_oss() -> nn.Module:
    return hf.GptOssForCausalLM(hf.GptOssConfig(
        **_GROUPED, num_local_experts=4, num_experts_per_tok=2, sliding_window=8,
        layer_types=["sliding_attention", "full_attention"]))


def _mamba2() -> nn.Module:
    return hf.Mamba2ForCausalLM(hf.Mamba2Config(
        vocab_size=VOCABULARY, hidden_size=64, state_size=16, num_heads=8, head_dim=16, n_groups=2,
        num_hidden_layers=2, chunk_size=8, use_cache=False))


def _vit() -> nn.Module:
    return hf.ViTModel(hf.ViTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        image_size=32, patch_size=8))


def _swin() -> nn.Module:
    return hf.SwinModel(hf.SwinConfig(
        image_size=32, patch_size=4, embed_dim=32, depths=[2, 2], num_heads=[2, 4], window_size=4))


def _clip() -> Sample:
    def inputs(batch: int, length: int) -> dict[str, Any]:
        ids = token_ids(batch, length)
        ids[:, -1] = VOCABULARY - 1
        return {"input_ids": ids, "pixel_values": image(batch, 32),
                "attention_mask": mask_like(ids)}

    text = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 32,
            "eos_token_id": VOCABULARY - 1, "bos_token_id": 1, "pad_token_id": 0}
    vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
              "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
    config = hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)
    return Sample(_build(lambda: hf.CLIPModel(config)), (), inputs(2, 12), ((), inputs(3, 17)))


def _whisper() -> Sample:
    def inputs(batch: int, length: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        return {"input_features": torch.randn(batch, 16, 64, generator=generator),
                "decoder_input_ids": token_ids(batch, length), "use_cache": False}

    config = hf.WhisperConfig(
        vocab_size=VOCABULARY, num_mel_bins=16, d_model=64, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=128,
        decoder_ffn_dim=128, max_source_positions=32, max_target_positions=64, use_cache=False,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)
    return Sample(_build(lambda: hf.WhisperForConditionalGeneration(config)), (), inputs(2, 12),
                  ((), inputs(3, 17)))


def _resnet() -> nn.Module:
    return hf.ResNetModel(hf.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 64, 64], depths=[1, 1, 1, 1],
        layer_type="bottleneck"))


def _convnext() -> nn.Module:
    return hf.ConvNextModel(hf.ConvNextConfig(hidden_sizes=[16, 32, 64, 64], depths=[1, 1, 2, 1]))


class _Causal(nn.Module):
    """``nn.Transformer`` as a model of token embeddings, with a causal target mask."""

    def __init__(self, tell: bool) -> None:
        super().__init__()
        self.transformer = nn.Transformer(64, 4, 2, 2, 128, batch_first=True)
        self.tell = tell

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        hint = {"tgt_is_causal": True} if self.tell else {}
        return self.transformer(source, target, tgt_mask=mask, **hint)


def _transformer(causal: bool) -> Sample:
    def inputs(batch: int, length: int) -> Inputs:
        generator = torch.Generator().manual_seed(0)
        source = torch.randn(batch, length, 64, generator=generator)
        return (source, torch.randn(batch, length - 3, 64, generator=generator)), {}

    args, kwargs = inputs(2, 12)
    return Sample(_build(lambda: _Causal(tell=causal)), args, kwargs, inputs(3, 17))


ZOO: dict[str, Callable[[], Sample]] = {
    "llama": lambda: _language_model(_llama),
    "llama_eager_attn": lambda: _language_model(lambda: _llama(attn_implementation="eager")),
    "llama_mask": lambda: _language_model(_llama, masked=True),
    "qwen2": lambda: _language_model(
        lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**_GROUPED))),
    "qwen3": lambda: _language_model(
        lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_GROUPED))),
    "gemma2": lambda: _language_model(_gemma2),
    "gemma3": lambda: _language_model(_gemma3),
    "gpt2": lambda: _language_model(_gpt2),
    "gptneox": lambda: _language_model(_gptneox),
    "opt": lambda: _language_model(_opt, masked=True),
    "bert": lambda: _encoder(_bert),
    "roberta": lambda: _encoder(_roberta),
    "t5": _t5,
    "mixtral": lambda: _language_model(_mixtral),
    "qwen3moe": lambda: _language_model(_qwen3_moe),
    "gptoss": lambda: _language_model(_gpt_oss),
    "mamba2": lambda: _language_model(_mamba2),
    "vit": lambda: _vision(_vit, 32),
    "swin": lambda: _vision(_swin, 32),
    "clip": _clip,
    "whisper": _whisper,
    "resnet": lambda: _vision(_resnet, 64),
    "convnext": lambda: _vision(_convnext, 64),
    "nn_transformer": lambda: _transformer(causal=False),
    "nn_transformer_causal": lambda: _transformer(causal=True),
}
