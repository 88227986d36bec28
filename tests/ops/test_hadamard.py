"""Hadamard transforms: exact on integers, orthogonal, inverted by the transpose, at every size."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from scaleprop import ops
from scaleprop.errors import FormatError
from scaleprop.ops.hadamard import hadamard, hadamard_matrix, hadamard_sizes

SIZES = hadamard_sizes(1280)


def paley_of_integers(order):
    """The matrix of order 12, 20 or 28 as Paley (1933) defines it, entry by entry."""
    if order in (12, 20):
        prime = order - 1
        square = [pow(k, (prime - 1) // 2, prime) for k in range(prime)]  # Euler's criterion
        chi = [0 if k == 0 else 1 if square[k] == 1 else -1 for k in range(prime)]
        skew = np.zeros((order, order), dtype=int)
        skew[0, 1:], skew[1:, 0] = 1, -1
        skew[1:, 1:] = [[chi[(i - j) % prime] for j in range(prime)] for i in range(prime)]
        return np.eye(order, dtype=int) + skew
    squares = {k * k % 13 for k in range(1, 13)}
    conference = np.zeros((14, 14), dtype=int)
    conference[0, 1:] = conference[1:, 0] = 1
    conference[1:, 1:] = [[0 if i == j else 1 if (i - j) % 13 in squares else -1
                           for j in range(13)] for i in range(13)]
    return (np.kron(conference, [[1, 1], [1, -1]])
            + np.kron(np.eye(14, dtype=int), [[1, -1], [-1, -1]]))


def matrix(size):
    """H of any supported size, from scipy's Sylvester matrices and the above."""
    order = next((k for k in (12, 20, 28) if size % k == 0 and (size // k).bit_count() == 1), 1)
    sylvester = scipy.linalg.hadamard(size // order)
    return torch.from_numpy(sylvester if order == 1 else np.kron(paley_of_integers(order),
                                                                 sylvester)).double()


def test_supported_sizes():
    families = {k << m for k in (1, 12, 20, 28, 40) for m in range(11)}
    expected = sorted(size for size in families if size <= 1280)
    assert expected == SIZES


@pytest.mark.parametrize("size", SIZES)
def test_every_size_is_exact_on_integers_orthogonal_and_inverted_by_its_transpose(size):
    expected = matrix(size)
    torch.testing.assert_close(expected @ expected.t(), size * torch.eye(size).double(),
                               rtol=0, atol=0)
    x = torch.randint(-8, 9, (3, size)).double()
    signs = torch.randint(0, 2, (size,)).double() * 2 - 1
    # in float64 the root is undone exactly enough for every integer to be its own
    root = size**0.5
    assert torch.equal((hadamard(x, size, signs) * root).round(), (x * signs) @ expected)
    assert torch.equal((hadamard(x, size, signs, transpose=True) * root).round(),
                       (x @ expected.t()) * signs)
    assert torch.equal(hadamard_matrix(size, torch.float64, x.device), expected)
    for there, back in ((False, True), (True, False)):
        y = hadamard(x, size, signs, transpose=there)
        torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
        torch.testing.assert_close(hadamard(y, size, signs, transpose=back), x)


@pytest.mark.parametrize("block", [12, 28, 40, 64, 80, 448, 512])
def test_float32_is_exact_on_integers(block):
    """Sums of small integers are float32 numbers: but for the root, nothing is rounded."""
    x = torch.randint(-8, 9, (3, 2 * block)).float()
    root = torch.tensor(1.0 / np.sqrt(block), dtype=torch.float32)
    for transpose in (False, True):
        right = matrix(block).t() if transpose else matrix(block)
        expected = ((x.reshape(3, 2, block).double() @ right).float() * root).reshape(x.shape)
        assert torch.equal(ops.hadamard(x, block, None, -1, transpose), expected)
        assert torch.equal(ops.hadamard(x.t(), block, None, 0, transpose).t(), expected)


def test_transposed_with_signs_of_the_whole_axis():
    x, signs = torch.randn(3, 48), torch.randint(0, 2, (48,)) * 2 - 1
    y = ops.hadamard(x, 12, signs)
    blocks = ((x * signs).reshape(3, 4, 12).double() @ matrix(12) / 12**0.5).reshape(3, 48)
    torch.testing.assert_close(y, blocks.float())
    torch.testing.assert_close(ops.hadamard(y, 12, signs, -1, True), x)


@pytest.mark.parametrize("block", [12, 192, 256, 320])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("each", [False, True])
def test_any_axis_is_the_last_one_of_the_moved_tensor(block, transpose, each):
    """Blocks of one matrix and of two; signs of a block and of the whole axis."""
    signs = torch.randint(0, 2, (2 * block if each else block,)).double() * 2 - 1
    right = matrix(block).t() if transpose else matrix(block)
    repeated = signs if each else signs.repeat(2)
    for axis in (0, 1, 2, -2):
        shape = [2, 3, 4]
        shape[axis] = 2 * block
        x = torch.randn(shape, dtype=torch.float64)
        moved = x.movedim(axis, -1)
        rows = (moved if transpose else moved * repeated).unflatten(-1, (2, block))
        expected = (rows @ right / block**0.5).flatten(-2)
        expected = (expected * repeated if transpose else expected).movedim(-1, axis)
        torch.testing.assert_close(hadamard(x, block, signs, axis, transpose), expected)
        strided = moved.contiguous().movedim(-1, axis)
        torch.testing.assert_close(hadamard(strided, block, signs, axis, transpose), expected)


@pytest.mark.parametrize("block, transpose", [(20, False), (20, True), (24, True), (16, True)])
def test_gradient_is_the_transpose(block, transpose):
    x = torch.randn(2, 2 * block, dtype=torch.float64, requires_grad=True)
    signs = torch.randint(0, 2, (block,)).double() * 2 - 1
    assert torch.autograd.gradcheck(lambda t: ops.hadamard(t, block, signs, -1, transpose), x)
    torch.library.opcheck(ops.hadamard, (x.detach(), block, signs, -1, transpose))


@pytest.mark.parametrize("block", [20, 160])
def test_traces_and_compiles(block):
    torch._dynamo.reset()
    x, signs = torch.randn(5, 320), torch.ones(block)
    graph = make_fx(lambda t, s: hadamard(t, block, s), tracing_mode="symbolic")(x, signs)
    longer = torch.randn(7, 640)
    assert torch.equal(graph(longer, signs), hadamard(longer, block, signs))
    compiled = torch.compile(lambda t: hadamard(t, block, signs, transpose=True), fullgraph=True)
    torch.testing.assert_close(compiled(x), hadamard(x, block, signs, transpose=True))


@pytest.mark.parametrize("block", [1, 2, 4, 16, 64, 128, 256, 1024])
def test_hadamard_equals_scipy_on_integers(block):
    x = torch.randint(-8, 9, (3, 2 * block)).float()
    signs = torch.randint(0, 2, (block,)).float() * 2 - 1
    matrix = torch.from_numpy(scipy.linalg.hadamard(block)).float()
    root = torch.tensor(1.0 / np.sqrt(block), dtype=torch.float32)
    expected = ((x.reshape(3, 2, block) * signs) @ matrix) * root
    assert torch.equal(ops.hadamard(x, block, signs), expected.reshape(3, 2 * block))
    plain = (x.reshape(3, 2, block) @ matrix) * root
    assert torch.equal(ops.hadamard(x.t(), block, None, 0).t(), plain.reshape(3, 2 * block))


def test_hadamard_is_orthogonal_and_its_gradient_the_transpose():
    x = torch.randn(5, 128, dtype=torch.float64, requires_grad=True)
    signs = torch.randint(0, 2, (128,)).double() * 2 - 1
    y = ops.hadamard(x, 32, signs)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    y.backward(y.detach())  # Rᵀ(R x) = x
    torch.testing.assert_close(x.grad, x.detach())
    assert torch.autograd.gradcheck(lambda t: ops.hadamard(t, 8, signs[:8]), x[:2, :16].detach()
                                    .requires_grad_())


def test_hadamard_accumulates_in_float32():
    x = torch.randn(64, 4096)
    exact = ops.hadamard(x.double(), 4096)
    assert (ops.hadamard(x, 4096) - exact).abs().max() < 1e-6 * exact.abs().max()
    narrow = x.bfloat16()
    assert torch.equal(ops.hadamard(narrow, 4096), ops.hadamard(narrow.float(), 4096).bfloat16())


@pytest.mark.parametrize("call, message", [
    (lambda x: ops.hadamard(x, 11), "block 11 is none of .*: use 8 or 12"),
    (lambda x: ops.hadamard(x, 36), "use 32 or 40"),
    (lambda x: ops.hadamard(x, 6), "use 4 or 8"),
    (lambda x: ops.hadamard(x, 172), "use 160 or 192"),
    (lambda x: ops.hadamard(x, 0), "use 1"),
    (lambda x: ops.hadamard(x, -4), "use 1"),
    (lambda x: ops.hadamard(x, 12), "does not divide axis -1 of size 64"),
    (lambda x: ops.hadamard(x, 128), "does not divide axis -1 of size 64"),
    (lambda x: ops.hadamard(x, 16, torch.ones(3)), "signs have shape"),
    (lambda x: ops.hadamard(x.int(), 16), "not a float dtype"),
    (lambda x: ops.hadamard(x, 16, None, 2), "axis 2 is out of range"),
])
def test_bad_inputs(call, message):
    with pytest.raises(FormatError, match=message):
        call(torch.randn(4, 64))
