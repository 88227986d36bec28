"""Hugging Face ``from_pretrained``: weights become codes and scales while they are loaded.

    from scaleprop import ScalepropConfig       # also tells transformers how to load what was saved
    model = AutoModel.from_pretrained(folder, quantization_config=ScalepropConfig("mxfp4"))
    model.save_pretrained("small")
    model = AutoModel.from_pretrained("small")

Linear layers, embeddings and convolutions are changed, each as ``scaleprop.compile`` would change
its operator, so outputs are those of the reference backend, bit for bit. Modules are known by
their types alone; a subclass that does something of its own with its weight stays as it is.

Speed: modules run the operators' reference kernels, which are exact and slower than the float
model, also inside ``torch.compile``. What this saves is memory. For speed, give the loaded model to
``scaleprop.compile(model, inputs, recipe, backend)``, which keeps its codes.

Sources: "Contribute new quantization method", transformers' documentation of 5.x, and its
``quantizers`` and ``core_model_loading``.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from scaleprop.adapters.base import library
from scaleprop.adapters.modules import (
    Plan,
    ScaledWeight,
    check_recipe,
    empty_parts,
    plan_for,
    restore_module,
    scale_module,
)
from scaleprop.errors import ConfigError
from scaleprop.passes.assign import check_patterns, reason_against
from scaleprop.recipes import Recipe, named_recipe

if TYPE_CHECKING:
    from transformers.core_model_loading import ConversionOps
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers import HfQuantizer
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin
else:
    library("transformers", "transformers")
    from transformers.core_model_loading import ConversionOps
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers import HfQuantizer
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

logger = logging.getLogger(__name__)

METHOD = "scaleprop"
SCHEMA_VERSION = 1
_LINEARS: Mapping[type[nn.Module], bool] = {Conv1D: True}


class ScalepropConfig(QuantizationConfigMixin):
    """How ``from_pretrained`` quantizes.

    Args:
        recipe: a name (see ``scaleprop recipes``), a path to a TOML or JSON file, a ``Recipe``, or
            what ``Recipe.to_dict`` made of one. One that needs no calibration.
        exclude, include: what stays high, or the only things quantized: patterns over module paths
            and parameter names, or operator names such as ``aten.conv2d``, as for ``compile``.

    Raises:
        ConfigError: on an unknown recipe, one that needs calibration, or another schema version.
    """

    def __init__(self, recipe: str | Recipe | Mapping[str, Any] = "mxfp4", *,
                 exclude: Sequence[str] = (), include: Sequence[str] = (),
                 quant_method: str = METHOD, schema_version: int = SCHEMA_VERSION) -> None:
        if quant_method != METHOD or schema_version != SCHEMA_VERSION:
            raise ConfigError(f"quantization_config is {quant_method!r}, schema_version "
                              f"{schema_version!r}; this version reads {METHOD!r}, "
                              f"{SCHEMA_VERSION}")
        for name, given in (("exclude", exclude), ("include", include)):
            if isinstance(given, str) or any(type(one) is not str for one in given):
                raise ConfigError(f"{name}={given!r}: give a list of patterns")
        self.recipe = (Recipe.from_dict(recipe) if isinstance(recipe, Mapping)
                       else named_recipe(recipe))
        check_recipe(self.recipe)
        self.exclude, self.include = tuple(exclude), tuple(include)
        self.quant_method: Any = METHOD

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False,
                  **kwargs: Any) -> Any:
        """The config that ``to_dict`` wrote.

        Raises:
            ConfigError: on an unknown key, and as the class does.
        """
        try:
            config = cls(**config_dict)
        except TypeError as error:
            raise ConfigError(f"not a quantization_config of scaleprop: {error}") from error
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; the recipe is written out."""
        return {"quant_method": METHOD, "schema_version": SCHEMA_VERSION,
                "recipe": self.recipe.to_dict(),
                "exclude": list(self.exclude), "include": list(self.include)}

    def __iter__(self) -> Any:
        """For ``dict(config)``."""
        return iter(self.to_dict().items())


class ScalepropQuantizer(HfQuantizer):
    """What ``from_pretrained`` calls; see ``ScalepropConfig``."""

    requires_calibration = False

    def __init__(self, quantization_config: ScalepropConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._config = quantization_config
        self._plans: dict[str, Plan] = {}  # by module path
        self._groups: dict[str, tuple[str, ...]] = {}  # weight → all weights it is tied with
        self._own: set[str] = set()  # weights that the checkpoint has

    def is_serializable(self) -> Any:
        return True

    @property
    def is_trainable(self) -> Any:
        return False

    @property
    def is_compileable(self) -> bool:
        return True

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raise ``ConfigError`` for weights that would go to disk as they are quantized."""
        places = device_map.values() if isinstance(device_map, Mapping) else ()
        if "disk" in places and not self.pre_quantized:
            raise ConfigError("weights are quantized where they stay, which cannot be on disk. "
                              "Remedy: load on the CPU, save_pretrained, and load that folder "
                              "with this device_map")

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        self._plans = _plans(model, self._config, checked=not self.pre_quantized)
        if not self._plans:
            logger.warning("recipe %r quantizes nothing of %s", self._config.recipe.name,
                           type(model).__name__)
        self._groups = _tied_weights(model, self._plans)
        _retie(model, self._groups, self._plans)
        if not self.pre_quantized:
            return
        kept = model._get_dtype_plan(model.dtype)  # names of what computes in float32
        wide = [re.compile(pattern.replace("*", ".*")) for pattern in kept]
        for path, plan in self._plans.items():
            module = model.get_submodule(path)
            if isinstance(module, ScaledWeight):
                continue  # one module under two names
            shape = tuple(module.weight.shape)
            _scale(module, plan, empty_parts(plan, shape, "meta"))
            if any(pattern.search(f"{path}.weight") for pattern in wide):
                module.weight_dtype = torch.float32
        for path, source in _twins(self._groups, self._plans):
            _make_twin(model.get_submodule(path), model.get_submodule(source), keep=False)

    def get_state_dict_and_metadata(self, model: Any) -> Any:
        """Called by ``save_pretrained``.

        Raises:
            ConfigError: where a layer was replaced by one without codes, which loading expects.
        """
        for path in self._plans:
            if not isinstance(model.get_submodule(path), ScaledWeight):
                raise ConfigError(f"{path} has no codes any more: it was replaced. Remedy: change "
                                  "the float model, save it, and load that with ScalepropConfig")
        return super().get_state_dict_and_metadata(model)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether a tensor of the checkpoint becomes codes, its own or those of one tied to it."""
        return any(_path(name) in self._plans and name.endswith(".weight")
                   for name in self._groups.get(param_name, (param_name,)))

    def get_quantize_ops(self) -> Any:
        return _Quantize(self)

    def get_new_dtype(self, converter: Any, param: Any, dtype: Any) -> Any:
        """Stored parts are never cast."""
        path, _, name = converter.target_patterns[0].rpartition(".")
        if path in self._plans and name in self._plans[path].names:
            return None
        return super().get_new_dtype(converter, param, dtype)

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Bytes an element, scales included: what devices are filled by."""
        plan = self._plans.get(_path(param_name))
        if self.pre_quantized or plan is None or not param_name.endswith(".weight"):
            return param.element_size()
        parts = empty_parts(plan, param.shape, "meta").values()
        return sum(part.nbytes for part in parts) / max(param.numel(), 1)

    def load_weight(self, model: Any, name: str, value: Tensor,
                    missing: set[str] | None) -> dict[str, Tensor]:
        """What a tensor of the checkpoint becomes: parts of its module, and of those tied to it
        that the checkpoint has no tensor for."""
        made: dict[Any, dict[str, Tensor]] = {}
        found: dict[str, Tensor] = {}
        for member in self._groups.get(name, (name,)):
            if member != name and member in self._own:
                continue
            if missing is not None:
                missing.discard(member)
            plan = self._plans.get(_path(member))
            if plan is None:
                found[member] = value
                continue
            module = model.get_submodule(_path(member))
            if not isinstance(module, ScaledWeight):
                _scale(module, plan, empty_parts(plan, module.weight.shape, "meta"))
            module.weight_dtype = value.dtype
            key = (plan.weight, plan.transposed)
            if key not in made:
                made[key] = plan.quantized(value)
            found |= {f"{_path(member)}.{part}": tensor for part, tensor in made[key].items()}
        self._own.add(name)
        return found

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for path, plan in self._plans.items():
            module = model.get_submodule(path)
            if not isinstance(module, ScaledWeight):  # the checkpoint lacks it: it is new
                _scale(module, plan, plan.quantized(module.weight))
            bias = getattr(module, "bias", None)
            if bias is not None and not (bias.is_meta or hasattr(bias, "_is_hf_initialized")):
                nn.init.zeros_(bias)
        twins = dict(_twins(self._groups, self._plans))
        for path, plan in self._plans.items():
            if self.pre_quantized and path not in twins:
                _initialize_missing(model, path, plan)
        for path, source in twins.items():
            module, other = model.get_submodule(path), model.get_submodule(source)
            if any(part.is_meta for part in (*module.parts, *other.parts)):
                continue  # offloaded, each on its own
            if self.pre_quantized or all(map(_same_bytes, module.parts, other.parts)):
                _make_twin(module, other, keep=True)
            else:
                _untie(model)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        for module in list(model.modules()):
            if isinstance(module, ScaledWeight):
                restore_module(module, dtype)
        for first, *others in set(self._groups.values()):
            alike = len({_form(name, self._plans) for name in (first, *others)}) == 1
            weight = model.get_parameter(first)
            for name in others:  # tied again, or each with numbers of its own
                module = model.get_submodule(_path(name))
                module.weight = weight if alike else nn.Parameter(module.weight.detach().clone())
            if not alike:
                _untie(model)
        _restore_ties(model)
        return model


register_quantization_config(METHOD)(ScalepropConfig)
register_quantizer(METHOD)(ScalepropQuantizer)


class _Quantize(ConversionOps):
    """Between a tensor of the checkpoint and the module that it belongs to."""

    def __init__(self, quantizer: ScalepropQuantizer) -> None:
        self._quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], source_patterns: list[str],
                target_patterns: list[str], *, model: Any = None,
                missing_keys: set[str] | None = None, **kwargs: Any) -> dict[str, Any]:
        """Called by transformers with one tensor, or with those that one tensor was split into."""
        found: dict[str, Any] = {}
        for name, given in input_dict.items():
            value = given[0] if isinstance(given, list) else given
            if self._quantizer.param_needs_quantization(model, name):
                found |= self._quantizer.load_weight(model, name, value, missing_keys)
            else:
                found[name] = value
        return found


def _plans(model: Any, config: ScalepropConfig, checked: bool) -> dict[str, Plan]:
    """What becomes of each module, by its path.

    checked: refuse patterns that match nothing. Else the folder was written by another class,
    perhaps, whose paths are shorter or longer by the name of the base model.
    """
    paths: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path)
    if checked:
        everything = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        everything += [path for several in paths.values() for path in several]
        everything += [name for module in paths
                       if (plan := plan_for(module, config.recipe, _LINEARS)) is not None
                       for name in _operator_names(plan)]
        check_patterns(config.exclude, config.include, everything)
    found: dict[str, Plan] = {}
    prefix = "" if checked else model.base_model_prefix
    for module, several in paths.items():
        plan = plan_for(module, config.recipe, _LINEARS)
        if plan is None:
            continue
        names = [name for path in several for name in _names(path, prefix)]
        reason = reason_against([*names, *_operator_names(plan)], config.exclude, config.include)
        if reason is None:
            found |= dict.fromkeys(several, plan)
        else:
            logger.info("%s stays as it is: %s", several[0], reason)
    return found


def _operator_names(plan: Plan) -> tuple[str, str]:
    return plan.operator, plan.operator.rpartition(".")[0]


def _names(path: str, prefix: str) -> list[str]:
    """Everything that a pattern may call a module by: as ``assign.node_names`` of its operator."""
    parts = path.split(".")
    names = [".".join(parts[:count]) for count in range(1, len(parts) + 1)] + [f"{path}.weight"]
    if prefix:
        names += [f"{prefix}.{name}" for name in names]
        names += [name.removeprefix(f"{prefix}.") for name in names]
    return names


def _path(name: str) -> str:
    return name.rpartition(".")[0]


def _form(name: str, plans: Mapping[str, Plan]) -> Any:
    """What tied weights must agree in to be stored once; None: as a float parameter."""
    plan = plans.get(_path(name))
    return None if plan is None else (plan.weight, plan.transposed)


def _tied_weights(model: Any, plans: Mapping[str, Plan]) -> dict[str, tuple[str, ...]]:
    """Weight → all weights it is tied with, itself included, where any of them is quantized."""
    groups: dict[str, list[str]] = {}
    for target, source in model.all_tied_weights_keys.items():
        if target.endswith(".weight"):
            groups.setdefault(source, [source]).append(target)
    return {name: tuple(members) for members in groups.values() for name in members
            if any(_form(member, plans) for member in members)}


def _retie(model: Any, groups: Mapping[str, Sequence[str]], plans: Mapping[str, Plan]) -> None:
    """Leave transformers to tie only what stays a parameter; see ``_twins`` for the rest."""
    if not groups:
        return
    ties = {target: source for target, source in model.all_tied_weights_keys.items()
            if target not in groups}
    for members in set(groups.values()):
        first, *others = [name for name in members if _form(name, plans) is None] or [""]
        ties |= dict.fromkeys(others, first)
    for path, module in model.named_modules():
        if hasattr(module, "all_tied_weights_keys"):
            start = f"{path}." if path else ""
            module.all_tied_weights_keys = module._tied_weights_keys = {
                target.removeprefix(start): source.removeprefix(start)
                for target, source in ties.items()
                if target.startswith(start) and source.startswith(start)}


def _restore_ties(model: Any) -> None:
    for module in model.modules():
        module.__dict__.pop("_tied_weights_keys", None)
    for module in model.modules():
        if hasattr(module, "all_tied_weights_keys"):
            module.all_tied_weights_keys = module.get_expanded_tied_weights_keys(all_submodels=True)


def _twins(groups: Mapping[str, Sequence[str]],
           plans: Mapping[str, Plan]) -> Iterable[tuple[str, str]]:
    """(module, the module whose parts it shares), by path."""
    for members in set(groups.values()):
        first: dict[Any, str] = {}
        for name in members:
            form, path = _form(name, plans), _path(name)
            if form is not None and first.setdefault(form, path) != path:
                yield path, first[form]


def _make_twin(module: ScaledWeight, other: ScaledWeight, keep: bool) -> None:
    """``module``'s parts are not saved; where ``keep`` says so, they are those of ``other``."""
    if module is other:
        return
    for name in module.weight_plan.names:
        part = getattr(module, name)
        delattr(module, name)
        shared = getattr(other, name).to(part.device) if keep else part
        module.register_buffer(name, shared, persistent=False)


def _initialize_missing(model: Any, path: str, plan: Plan) -> None:
    """Where the checkpoint has no codes, as of a new head, those of a weight that is new.

    Raises:
        ConfigError: where it has some parts and lacks others.
    """
    module = model.get_submodule(path)
    missing = [name for name in plan.names
               if not (getattr(module, name).is_meta
                       or hasattr(getattr(module, name), "_is_hf_initialized"))]
    if not missing:
        return
    if len(missing) < len(plan.names):
        raise ConfigError(f"the checkpoint lacks {path}.{missing[0]}, and has other parts of this "
                          "weight: it is damaged")
    with torch.no_grad():
        restore_module(module)
        module.weight.zero_()  # there is nothing but memory yet
        model._init_weights(module)
        _scale(module, plan, plan.quantized(module.weight))


def _same_bytes(left: Tensor, right: Tensor) -> bool:
    """Whether two parts of one format are equal; float8 has no comparison."""
    right = right.to(left.device)
    return left is right or torch.equal(left.reshape(-1).view(torch.uint8),
                                        right.reshape(-1).view(torch.uint8))


def _untie(model: Any) -> None:
    """What was tied no longer is; the config says so, or loading would tie it again."""
    for config in (model.config, model.config.get_text_config(decoder=True)):
        config.tie_word_embeddings = False


def _scale(module: nn.Module, plan: Plan, parts: Mapping[str, Tensor]) -> None:
    known: Any = module
    # transformers would read, and so dequantize, its weight; a subclass may have more to initialize
    known._is_hf_initialized = type(module) is plan.base
    scale_module(module, plan, parts)
