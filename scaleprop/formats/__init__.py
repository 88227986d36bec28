"""Number formats as data: what one element is, who shares a scale, and how to get there and back.

>>> import torch
>>> x = torch.tensor([[0.1, -1.0, 2.4, 6.0] * 8])
>>> q = quantize(x, "mxfp4")          # data, scale, nbytes
>>> q.dequantize()[0, :4]             # float32 again
tensor([ 0., -1.,  2.,  6.])
>>> fake_quantize(x, "mxfp4")[0, :4]  # the same, in one step
tensor([ 0., -1.,  2.,  6.])
"""

from scaleprop.formats.elements import ElementFormat
from scaleprop.formats.quantize import dequantize, fake_quantize, quantize
from scaleprop.formats.scaled import ScaledFormat, named_formats, parse
from scaleprop.formats.statistics import error_statistics
from scaleprop.formats.tensor import ScaledTensor, storage_layout

__all__ = [
    "ElementFormat",
    "ScaledFormat",
    "ScaledTensor",
    "dequantize",
    "error_statistics",
    "fake_quantize",
    "named_formats",
    "parse",
    "quantize",
    "storage_layout",
]
