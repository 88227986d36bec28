"""Number formats as data: what one element is, who shares a scale, and how to get there and back.

>>> x = torch.randn(4, 256)
>>> q = quantize(x, "mxfp4")          # data, scale, nbytes
>>> q.dequantize()                    # float32 again
>>> fake_quantize(x, "nvfp4")         # the same, in one step
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
