"""Packing: the layout that the format promises, every width, every remainder."""

import pytest
import torch

from scaleprop.formats.packing import pack, packed_size, unpack


@pytest.mark.parametrize("bits", range(1, 20))
@pytest.mark.parametrize("count", [0, 1, 2, 3, 5, 8, 13, 64])
def test_unpack_inverts_pack_in_whole_bytes(bits, count):
    codes = torch.randint(0, 1 << bits, (3, 2, count), dtype=torch.int32)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (3, 2, (count * bits + 7) // 8)
    assert packed.shape[-1] == packed_size(count, bits)
    assert torch.equal(unpack(packed, bits, count), codes)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 11, 19])
def test_layout_is_little_endian(bits):
    codes = torch.randint(0, 1 << bits, (17,), dtype=torch.int32)
    number = sum(int(code) << (bits * index) for index, code in enumerate(codes))
    expected = number.to_bytes((17 * bits + 7) // 8, "little")
    assert bytes(pack(codes, bits).tolist()) == expected


def test_low_nibble_first_and_negative_codes_in_twos_complement():
    assert pack(torch.tensor([1, 2, 3]), 4).tolist() == [0x21, 0x03]
    assert pack(torch.tensor([-1, -7], dtype=torch.int8), 4).tolist() == [0x9F]
    assert pack(torch.tensor([1, 2, 3, 0]), 2).tolist() == [0b00111001]
    assert pack(torch.tensor([63, 0, 1, 0]), 6).tolist() == [63, 16, 0]
