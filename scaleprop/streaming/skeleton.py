"""A module whose parameters have shapes and no memory, traced as if they had."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook

from scaleprop import _torch_compat
from scaleprop.errors import BackendUnavailable, ConfigError
from scaleprop.extras import install_command


@contextmanager
def without_memory() -> Generator[None]:
    """Every parameter that a module gets in here goes to the meta device at once. Buffers are as
    ever: what is computed from a configuration is in no file."""

    def to_meta(_module: torch.nn.Module, _name: str, parameter: Any) -> Any:
        if type(parameter) is not torch.nn.Parameter or parameter.is_meta:
            return None
        return torch.nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)

    hook = register_module_parameter_registration_hook(to_meta)
    try:
        yield
    finally:
        hook.remove()


def from_factory(factory: Callable[[], Any]) -> tuple[torch.nn.Module, Any]:
    """The module that ``factory`` makes, and its example inputs where it returns both.

    Raises:
        ConfigError: where it raises, as it may on parameters without values, or makes no module.
    """
    try:
        with without_memory():
            made = factory()
    except Exception as error:
        raise ConfigError(
            f"the model's factory raised {type(error).__name__}: {error}. Its parameters have no "
            "values while it runs. Remedy: a factory that reads none and loads none"
        ) from error
    module, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(module, torch.nn.Module):
        raise ConfigError(f"the model's factory returned {type(module).__name__}; expected a "
                          "torch.nn.Module or (module, example_inputs)")
    return module, inputs


def from_config(directory: Path, dtype: torch.dtype | None) -> tuple[torch.nn.Module, Any]:
    """The transformers model that ``config.json`` describes, and the inputs it has for trying it.

    dtype: of its parameters, where the configuration names none. It keeps no cache: a compiled
    program is a function of its inputs.

    Raises:
        ConfigError: where there is no configuration, or transformers does not know its class.
        BackendUnavailable: without transformers.
    """
    path = directory / "config.json"
    try:
        names = json.loads(path.read_text(encoding="utf-8"))["architectures"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path} says no architecture: {error!r}. Remedy: pass model=, a factory "
                          "(--model package.module:factory)") from error
    try:
        import transformers
    except ImportError as error:
        raise BackendUnavailable(f"{path} describes a transformers model: "
                                 f"{install_command('transformers')}, or pass model=") from error
    kind: Any = getattr(transformers, names[0], None) if names else None
    if kind is None:
        raise ConfigError(f"{path}: transformers {transformers.__version__} has no {names}. "
                          "Remedy: pass model=, a factory")
    config = kind.config_class.from_pretrained(directory)
    config.use_cache = False
    chosen = getattr(config, "dtype", None) or dtype
    model, _ = from_factory(lambda: kind._from_config(config, dtype=chosen))
    return model, getattr(model, "dummy_inputs", None)


def fake(model: torch.nn.Module) -> None:
    """Let parameters on the meta device be fake ones on the CPU, which tracing takes for real."""
    mode = _torch_compat.symbolic_fake_mode()
    made: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        owned: dict[str, Any] = module._parameters  # pyright: ignore[reportPrivateUsage]
        for name, parameter in owned.items():
            if parameter is None or not parameter.is_meta:
                continue
            if id(parameter) not in made:
                with mode:
                    values = torch.empty(parameter.shape, dtype=parameter.dtype)
                    made[id(parameter)] = torch.nn.Parameter(values, requires_grad=False)
            owned[name] = made[id(parameter)]


def fill(module: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Let the fake parameters and the buffers of a captured module be ``tensors``, in place.

    Raises:
        ConfigError: a parameter that no file has: the model made it while it was traced.
    """
    for path, owner in module.named_modules():
        parameters: dict[str, Any] = owner._parameters  # pyright: ignore[reportPrivateUsage]
        buffers: dict[str, Any] = owner._buffers  # pyright: ignore[reportPrivateUsage]
        for held in (parameters, buffers):
            for name, value in held.items():
                full = f"{path}.{name}" if path else name
                if full in tensors:
                    held[name] = tensors[full]
                    held[name]._is_param = held is parameters  # nn.Parameter would read the values
                elif _torch_compat.is_fake(value):
                    raise ConfigError(f"{full!r} has no values: no tensor of the folder is called "
                                      "that. Remedy: a model whose parameters do not change names "
                                      "when it is traced")
