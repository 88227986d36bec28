"""Kernels run on the device, or where there is none under Triton's interpreter."""

import pytest

pytest.importorskip("triton")
