"""What breaks in other libraries that propagate scales: each a step that stays what it was.

Every value of the joint graph is held at a random power of two; loss and gradients are compared
with eager PyTorch's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .joint_graphs import Anywhere, assert_equal, assert_parallel, compiled, nothing, step

Given = tuple[nn.Module, tuple[Any, ...]]
CASES: dict[str, Callable[[], Given]] = {}
# operators that PyTorch's decompositions compute in another order than its kernels do
ROUNDED = {"many_factors", "pooling", "products"}
INF = float("inf")


class Of(nn.Module):
    """A function of parameters of these sizes, then of the inputs."""

    def __init__(self, function: Callable[..., Any], *sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        self.given = nn.ParameterList(nn.Parameter(torch.randn(size)) for size in sizes)

    def forward(self, *inputs: Any) -> Any:
        return self.function(*self.given, *inputs)


def case(build: Callable[[], Given]) -> Callable[[], Given]:
    CASES[build.__name__] = build
    return build


def function(
    name: str, of: Callable[..., Any], *sizes: tuple[int, ...], inputs: tuple[Any, ...] = ()
) -> None:
    """A case that is a function of parameters alone."""
    CASES[name] = lambda: (Of(of, *sizes), inputs)


def ids(*size: int, below: int = 12) -> torch.Tensor:
    return torch.randint(0, below, size, generator=torch.Generator().manual_seed(7))


def some(*size: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(8), dtype=torch.float64)


# --- modules at the root -------------------------------------------------------------------------


@case
def root_linear() -> Given:
    return nn.Linear(6, 4), (some(3, 6),)


@case
def root_sequential() -> Given:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), (some(3, 6),)


@case
def input_gradients() -> Given:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh()), (some(3, 6).requires_grad_(),)


# --- attention -----------------------------------------------------------------------------------

HEADS = ((2, 4, 5, 8),) * 3
SEEN = torch.ones(5, 5, dtype=torch.bool).tril()
ADDED = torch.zeros(5, 5, dtype=torch.float64).masked_fill(~SEEN, -INF)


def attention(**options: Any) -> Callable[..., torch.Tensor]:
    return lambda q, k, v, **more: F.scaled_dot_product_attention(q * 2, k, v + 1, **options)


for _name, _options in {
    "plain": {}, "scale": {"scale": 0.3}, "causal": {"is_causal": True},
    "bool_mask": {"attn_mask": SEEN}, "infinite_mask": {"attn_mask": ADDED},
    "causal_scale": {"is_causal": True, "scale": 0.25},
    "batched_mask": {"attn_mask": SEEN.expand(2, 1, 5, 5), "scale": 0.5},
}.items():
    function(f"attention_{_name}", attention(**_options), *HEADS)
GROUPED = ((2, 4, 5, 8), (2, 2, 5, 8), (2, 2, 5, 8))
function("attention_gqa", attention(enable_gqa=True), *GROUPED)
function("attention_gqa_causal_scale",
         attention(enable_gqa=True, is_causal=True, scale=0.2), *GROUPED)
function("attention_dropout", attention(dropout_p=0.25), *HEADS)
CASES["attention_layer"] = lambda: (nn.MultiheadAttention(8, 2), (some(5, 2, 8),) * 3)
function("attention_learned_bias",
         lambda q, k, v, b: F.scaled_dot_product_attention(q, k, v, attn_mask=b), *HEADS,
         (4, 5, 5))
function("attention_rows_fully_masked",
         lambda q, k, v: F.scaled_dot_product_attention(
             q, k, v, attn_mask=SEEN & (torch.arange(5)[:, None] > 0)), *HEADS)


def by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = q @ k.mT / 8**0.5
    scores = scores + ADDED  # no residual
    return scores.softmax(-1) @ v + q


def clamped_mask(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    mask = (1.0 - SEEN.to(q.dtype)) * torch.finfo(torch.float32).min
    return F.softmax(q @ k.mT + mask, -1) @ v


function("attention_by_hand_mask_added", by_hand, *HEADS)
function("attention_by_hand_lowest_added", clamped_mask, *HEADS)
function("attention_by_hand_filled",
         lambda q, k, v: (q @ k.mT).masked_fill(~SEEN, -INF).softmax(-1) @ v, *HEADS)


# --- sums ----------------------------------------------------------------------------------------

function("plain_sum", lambda x, y: (x + y) @ (x - y).mT + 1, (3, 4), (3, 4))
function("sum_with_alpha", lambda x, y: torch.add(x, y, alpha=3).relu(), (3, 4), (3, 4))
function("broadcast_sum", lambda x, b: (x + b) * b, (5, 3, 4), (4,))
function("sum_of_numbers", lambda x: (2 - x) * (x + 1.5) / (x * x + 3), (3, 4))
function("sums_in_place", lambda x, y: (x * 1).add_(y).mul_(2).sub_(1).div_(3), (3, 4), (3, 4))


@case
def integer_sums_to_embedding() -> Given:
    def run(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        places = torch.arange(5) + 1
        relative = (places[:, None] - places[None, :]).clamp(-2, 2) + 2 + x[:, None] * 0
        buckets = (relative.float().abs() * 1.5).long() % 12
        return F.embedding(relative, w).sum(-1) + F.embedding(buckets, w).exp().sum(-1)

    return Of(run, (12, 4)), (ids(5),)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8, padding_idx=0)
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.embed(x)
        y = y + self.body(y)
        return F.cross_entropy(self.head(y).flatten(0, 1), x.roll(1, 1).flatten())


@case
def tied_embeddings() -> Given:
    return Tied(), (ids(2, 6),)


class TwoHeads(nn.Module):
    """The trunk's gradient comes from both losses."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 8), nn.GELU())
        self.left, self.right = nn.Linear(8, 5), nn.Linear(8, 1)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        shared = self.trunk(x)
        return F.cross_entropy(self.left(shared), y) + 0.1 * F.mse_loss(
            self.right(shared)[:, 0], x.sum(-1))


@case
def two_heads() -> Given:
    return TwoHeads(), (some(4, 6), ids(4, below=5))


@case
def two_heads_two_outputs() -> Given:
    both = TwoHeads()
    both.forward = lambda x: (both.left(both.trunk(x)), both.right(both.trunk(x)))  # type: ignore[method-assign]
    return both, (some(4, 6),)


class Checkpointed(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.dropout = nn.Dropout(dropout)

    def block(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.dropout(F.silu(self.second(F.gelu(self.first(x)))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            x = checkpoint(self.block, x, use_reentrant=False)  # type: ignore[assignment]
        return x


@case
def checkpointed() -> Given:
    return Checkpointed(), (some(3, 6),)


@case
def checkpointed_dropout() -> Given:
    return Checkpointed(0.5), (some(3, 6),)


# --- losses --------------------------------------------------------------------------------------

IGNORED = torch.where(torch.arange(6) < 4, -100, ids(6, below=5))
WEIGHTS = torch.tensor([0.3, 2.0, 1.0, 0.0, 5.0], dtype=torch.float64)
for _name, _options in {
    "ignored": {}, "smoothed": {"label_smoothing": 0.1}, "weighted": {"weight": WEIGHTS},
    "summed": {"reduction": "sum"}, "each": {"reduction": "none"},
    "weighted_smoothed": {"weight": WEIGHTS, "label_smoothing": 0.2},
    "ignored_too": {"ignore_index": -100, "reduction": "sum", "weight": WEIGHTS},
}.items():
    function(f"cross_entropy_{_name}",
             lambda x, y, given=_options: F.cross_entropy(x * 3, y, **given), (6, 5),
             inputs=(IGNORED,))
function("cross_entropy_of_probabilities",
         lambda x, y: F.cross_entropy(x, y.softmax(-1)), (6, 5), (6, 5))
function("cross_entropy_of_pictures",
         lambda x, y: F.cross_entropy(x, y), (2, 5, 3, 3), inputs=(ids(2, 3, 3, below=5),))
function("binary_cross_entropy",
         lambda x, y: F.binary_cross_entropy_with_logits(x, y, pos_weight=WEIGHTS), (6, 5),
         inputs=(some(6, 5).sigmoid(),))
function("mean_squares", lambda x, y: F.mse_loss(x, y) + F.smooth_l1_loss(x, y)
         + F.l1_loss(x, y) + F.huber_loss(x, y), (6, 5), (6, 5))
function("divergence", lambda x, y: F.kl_div(
    x.log_softmax(-1), y.softmax(-1), reduction="batchmean"), (6, 5), (6, 5))
function("log_softmax", lambda x: x.log_softmax(0) * (x.log_softmax(1) + 1), (6, 5))
function("logsumexp", lambda x: x.logsumexp(-1) + x.masked_fill(x > 1, -INF).logsumexp(0).sum(),
         (6, 5))


# --- activations ---------------------------------------------------------------------------------


def gelu_by_hand(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * torch.pow(x, 3))))


function("tanh_gelu_by_hand", gelu_by_hand, (3, 4))
function("tanh_gelu", lambda x: F.gelu(x * 2, approximate="tanh"), (3, 4))
function("activations_in_place", lambda x: F.leaky_relu(F.silu(F.relu(x * 2, inplace=True) - 1,
                                                               inplace=True), inplace=True), (3, 4))
function("more_activations", lambda x: F.hardswish(x) + F.softplus(x) + F.elu(x) + F.mish(x)
         + F.hardtanh(x) + F.relu6(x * 4) + F.glu(x).repeat(1, 2) + F.logsigmoid(x) + F.selu(x)
         + F.hardsigmoid(x) + F.celu(x, 0.7) + F.threshold(x, 0.1, 2.0) + F.softsign(x)
         + F.tanhshrink(x) + F.softshrink(x, 0.2) + F.hardshrink(x, 0.3), (3, 4))
function("prelu", lambda x, w: F.prelu(x, w), (3, 4), (4,))
function("exp_of_zeros", lambda x: torch.zeros(3, 4, dtype=x.dtype).exp() * x + (x * 0).exp()
         + torch.zeros_like(x).cosh() + x.new_zeros(4).sigmoid(), (3, 4))
function("relu_then_sum", lambda x: x.relu().sum(-1) / (x.relu().sum() + 1), (3, 4))
function("long_powers", lambda x: x.pow(4).pow(3) + x**20 + x**-3 + (x * x) ** 0.5, (3, 4))
function("many_factors", lambda x: torch.stack([x] * 30).prod(0) + x.cumprod(0), (3, 4))


# --- movement and places -------------------------------------------------------------------------

function("cat", lambda x, y: torch.cat([x, y * 3, torch.zeros(3, 2), torch.ones(3, 1)], 1), (3, 4),
         (3, 4))
function("cat_with_integers", lambda x: torch.cat([x, torch.arange(4)[None]]), (3, 4))
function("stack_and_split", lambda x, y: [part.exp() for part in torch.stack([x, y]).unbind(1)],
         (3, 4), (3, 4))
function("where_of_numbers", lambda x: torch.where(x > 0.2, x, 0.2) + torch.where(x > 0, 1.0, -2.0)
         + torch.where(x < 0, x, -INF).exp() + torch.where(x > 0, 3, x), (3, 4))
function("gather", lambda x: x.gather(1, torch.tensor([[0, 0, 2], [3, 1, 1], [2, 2, 2]])), (3, 4))
function("index", lambda x: x[torch.tensor([0, 0, 2])] * x[:, torch.tensor([1])], (3, 4))


def put(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    z = x * 2
    z[torch.tensor([0, 2])] = y
    z[:, 1] = 0
    z[1, 2:] += 1
    places = (torch.tensor([0, 0]), torch.tensor([1, 1]))
    return z.index_put(places, y[:, 0], accumulate=True) * z


function("index_put", put, (3, 4), (2, 4))


def scattered(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    places = torch.tensor([[0, 1, 1, 2], [2, 2, 0, 1]])
    one = torch.zeros_like(x).scatter(0, places, y) + x.scatter_add(0, places, y)
    two = x.scatter(0, places, 1.5) + x.index_add(0, torch.tensor([1, 1]), y, alpha=2)
    three = x.scatter_reduce(0, places, y, "amax", include_self=True)
    return one + two + three + x.masked_scatter(x > 0, y.repeat(2, 1))


function("scatter", scattered, (3, 4), (2, 4))
function("one_hot", lambda x: F.one_hot(torch.tensor([0, 3, 1]), 4) * x + F.one_hot(
    torch.tensor([0, 3, 1]), 4).to(x.dtype) @ x.mT.repeat(1, 2)[:, :4], (3, 4))
function("padding", lambda x: F.pad(x, (1, 1)) + F.pad(x, (1, 1), value=2.0), (3, 4))
for _mode in ("reflect", "replicate", "circular"):
    CASES[f"conv1d_{_mode}"] = lambda mode=_mode: (
        nn.Conv1d(3, 4, 3, padding=2, padding_mode=mode), (some(2, 3, 8).requires_grad_(),))


@case
def conv2d_strided() -> Given:
    layers = nn.Sequential(nn.Conv2d(2, 4, 3, 2, 1, dilation=2, groups=2), nn.BatchNorm2d(4),
                           nn.ReLU(inplace=True), nn.AvgPool2d(2), nn.ConvTranspose2d(4, 2, 3))
    return layers, (some(2, 2, 16, 16).requires_grad_(),)


@case
def batch_norm_evaluated() -> Given:
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)).eval(), (some(2, 2, 8, 8),)


@case
def norms() -> Given:
    layers = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.RMSNorm(8), nn.Unflatten(1, (4, 2)),
                           nn.GroupNorm(2, 4), nn.InstanceNorm1d(4, affine=True), nn.Flatten(),
                           nn.BatchNorm1d(8))
    return layers, (some(6, 8).requires_grad_(),)


@case
def pooling() -> Given:
    def run(x: torch.Tensor) -> Any:
        return (F.max_pool2d(x, 2), F.adaptive_avg_pool2d(x, 3), F.avg_pool2d(x, 3, 2, 1),
                F.interpolate(x, scale_factor=2, mode="nearest"), F.adaptive_max_pool2d(x, 2),
                F.interpolate(x, size=5, mode="bilinear"), F.interpolate(x, size=9, mode="bicubic"),
                F.pixel_shuffle(x, 2), F.unfold(x, 2), F.normalize(x), F.lp_pool2d(x.abs(), 2, 2))

    return Of(run, (2, 4, 8, 8)), ()


@case
def embedding_with_padding() -> Given:
    layers = nn.Sequential(nn.Embedding(12, 4, padding_idx=3), nn.Linear(4, 4))
    return layers, (torch.tensor([[3, 3, 1], [0, 3, 11]]),)


function("embedding_scaled_by_frequency",
         lambda w, x: F.embedding(x % 4, w, scale_grad_by_freq=True), (12, 4), inputs=(ids(9),))
function("embedding_bag", lambda w, x: F.embedding_bag(x, w, mode="mean"), (12, 4),
         inputs=(ids(3, 4),))


# --- reductions ----------------------------------------------------------------------------------

TIES = torch.tensor([[1.0, 2, 2, 0], [3, 3, 3, 3], [0, -1, 0, -1]], dtype=torch.float64)
function("deviations", lambda x: (x.std(0), x.var(1, correction=0), x.var(), x.std(),
                                  torch.var_mean(x, 0), torch.std_mean(x, 1)), (3, 4))
function("deviation_of_equal", lambda x: (x * 0 + 3).std(1) + x.mean(1), (3, 4))
function("cumulative", lambda x: (x.cumsum(0), x.logcumsumexp(1), x.cummax(0)[0], x.flip(0),
                                  x.diff(dim=1), x.roll(1, 0), x.tril(), x.triu(1)), (3, 4))
function("ordered", lambda x: (x.sort(1)[0], x.sort(0, descending=True)[0], x.topk(2)[0],
                               x.kthvalue(2)[0], x.median(1)[0], x.median(), x.argsort(1)), (3, 4))
function("extremes_with_ties", lambda x: [y for z in (x * 2 + TIES - 2 * x, x * 0 + TIES) for y in (
    z.max(1)[0], z.min(1)[0], z.amax(0), z.amin(1), z.max(), z.min(), z.aminmax(dim=1),
    torch.maximum(z, x * 0 + 3), torch.minimum(z, z), z.clamp(min=2), z.clamp(0, 3))], (3, 4))
function("norms_of_vectors", lambda x: (x.norm(), x.norm(1, 0), x.norm(INF, 1), x.norm(3, 1),
                                        x.norm(0.5), torch.linalg.vector_norm(x, 0, 1) + x.sum(1),
                                        torch.cdist(x, x + 1), F.cosine_similarity(x, x + 1)),
         (3, 4))
function("sums_and_means", lambda x: (x.sum(0), x.mean((0, 1)), x.sum(), (x > 0).sum() * x,
                                      x.nansum(), x.prod(1), x.prod(), (x > 0).double().mean() * x,
                                      x.nanmean()), (3, 4))
function("dropout", lambda x: F.dropout(x, 0.4) + F.dropout(x, 0.0) + F.dropout1d(x, 0.5)
         + F.alpha_dropout(x, 0.3, training=True), (3, 4))
function("randomness", lambda x: x * torch.rand_like(x)
         + torch.randn(3, 4) * (torch.rand(3, 4) > 0.5) + x, (3, 4))
function("products", lambda x, y: (torch.einsum("ij,kj->ik", x, y), torch.outer(x[0], y[0]),
                                   x[0] @ y[0], x @ y[0], torch.addmm(x[:, :3], x, y.mT, beta=0.5,
                                                                      alpha=2),
                                   torch.baddbmm(x[None, :, :3], x[None], y.mT[None]),
                                   F.bilinear(x, y, torch.ones(2, 4, 4, dtype=x.dtype)),
                                   torch.kron(x, y), torch.cross(x[:, :3], y[:, :3], dim=1)),
         (3, 4), (3, 4))
function("more_functions", lambda x: (x.abs().sqrt(), (x.abs() + 1).log(), x.erf(), x.sin(),
                                      x.atan(), x.abs().rsqrt(), x.floor() * x, x.sign() * x,
                                      x.remainder(0.7), x.fmod(0.7), x.frac(), x.abs().log1p(),
                                      torch.lerp(x, x * x, 0.3), torch.addcmul(x, x, x, value=2),
                                      torch.addcdiv(x, x, x.abs() + 1), x.abs().pow(x), 2.0**x,
                                      torch.atan2(x, x + 1), torch.hypot(x, x + 1), x.sinc(),
                                      torch.logaddexp(x, x + 1), torch.copysign(x, x + 1),
                                      torch.nan_to_num(x), torch.special.xlogy(x.abs(), x.abs())),
         (3, 4))


# -------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def build(name: str) -> Given:
    torch.manual_seed(0)
    model, inputs = CASES[name]()
    return model.double(), inputs


@pytest.mark.parametrize("name", CASES)
def test_random_exponents_leave_the_step(name: str):
    model, inputs = build(name)
    anywhere = Anywhere()
    expected = step(model, *inputs)
    got = step(compiled(model, anywhere, fullgraph=True), *inputs)
    assert len(anywhere.carried) == 1 and anywhere.carried[0].rescales
    if name in ROUNDED:
        assert_parallel(got, expected)
        torch._dynamo.reset()
        expected = step(compiled(model, nothing, fullgraph=True), *inputs)
    assert_equal(got, expected)


@pytest.mark.parametrize("seed", range(2, 5))
@pytest.mark.parametrize("name", ["long_powers", "norms_of_vectors", "extremes_with_ties"])
def test_other_random_exponents_leave_the_step(name: str, seed: int):
    model, inputs = build(name)
    expected = step(model, *inputs)
    assert_equal(step(compiled(model, Anywhere(seed)), *inputs), expected)


def test_exponents_that_add_up_to_more_than_a_factor_can_say():
    torch.manual_seed(0)
    model = Of(lambda x, y: (x * y, x / y, torch.addmm(x, x, y).square(), (x @ y).relu()), (4, 4),
               (4, 4)).double()
    expected = step(model)
    assert_equal(step(compiled(model, Anywhere(1, -90, 90))), expected)


@pytest.mark.parametrize(
    ("dtype", "low", "high"), [(torch.float32, -6, 6), (torch.float16, 0, 4)], ids=str)
def test_large_negative_numbers_are_no_scale(dtype: torch.dtype, low: int, high: int):
    """−6e4 stands for −∞; in float16 it cannot be held at a negative exponent."""

    def run(x: torch.Tensor, y: torch.Tensor) -> Any:
        scores = torch.where(SEEN, x @ x.mT, -6e4)
        filled = (x @ x.mT).masked_fill(~SEEN, torch.finfo(x.dtype).min)
        return scores.softmax(-1).to(x.dtype) @ y + filled.softmax(-1) @ y.relu()

    torch.manual_seed(0)
    model = Of(run, (5, 8), (5, 8)).to(dtype)
    expected = step(model)
    got = step(compiled(model, Anywhere(1, low, high)))
    if dtype == torch.float16:  # small gradients underflow
        assert_parallel(got, expected, 1e-3, 1e-3)
    else:
        assert_equal(got, expected)
    assert max(float(x.abs().max()) for x in expected) < 100


# tied embeddings are compiled in test_dynamo_exact
@pytest.mark.parametrize("name", ["attention_gqa_causal_scale", "two_heads",
                                  "cross_entropy_weighted_smoothed"])
def test_random_exponents_leave_the_step_in_inductor(name: str):
    model, inputs = build(name)
    expected = step(model, *inputs)
    assert_parallel(step(compiled(model, Anywhere(), "inductor"), *inputs), expected)
