"""Methods of post-training quantization: each says where and which transform, in a file of its own.

``METHODS`` holds every ``TransformPass`` of this folder's modules; a new file is a new method.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator

from scaleprop.passes.transforms.base import TransformPass


def _found() -> Iterator[type[TransformPass]]:
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        for _, item in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
            is_own = item.__module__ == module.name and not inspect.isabstract(item)
            if is_own and issubclass(item, TransformPass):
                yield item


METHODS: tuple[type[TransformPass], ...] = tuple(sorted(_found(), key=lambda kind: kind.name))
