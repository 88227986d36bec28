"""The API's pages: what each is about, and the public names that it shows."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping

import scaleprop
from docs.generate.markdown import page

# path → title, lead, names; a name that ends in a dot shows the module's own docstring alone
_PAGES: Mapping[str, tuple[str, str, tuple[str, ...]]] = {
    "api/index": ("Compile and analyze", "What most programs need.", (
        "scaleprop.compile", "scaleprop.CompiledModel", "scaleprop.load", "scaleprop.analyze",
        "scaleprop.from_pretrained", "scaleprop.compile_from_safetensors",
        "scaleprop.interchange.decoded", "scaleprop.ScalepropConfig")),
    "api/formats": ("Formats", "Numbers as data.", (
        "scaleprop.formats.parse", "scaleprop.formats.named_formats", "scaleprop.quantize",
        "scaleprop.dequantize", "scaleprop.fake_quantize", "scaleprop.ScaledTensor",
        "scaleprop.ScaledFormat", "scaleprop.ElementFormat", "scaleprop.formats.storage_layout",
        "scaleprop.formats.error_statistics")),
    "api/recipes": ("Recipes", "Which tensor gets which format.", (
        "scaleprop.Recipe", "scaleprop.Role", "scaleprop.recipes.named_recipe",
        "scaleprop.recipes.named_recipes", "scaleprop.recipes.load_recipe",
        "scaleprop.recipes.save_recipe", "scaleprop.recipes.training.TrainingRecipe",
        "scaleprop.recipes.training.Operand", "scaleprop.recipes.training.Phase",
        "scaleprop.recipes.training_named.training_recipe",
        "scaleprop.recipes.training_named.with_tail")),
    "api/report": ("Reports", "What happened to every tensor.", (
        "scaleprop.Report", *(f"scaleprop.report.{name}" for name in (
            "TensorRecord", "ScaleProvenance", "Values", "FormatRange", "Variant", "ScaleReport",
            "TensorScale", "Finding")))),
    "api/training": ("Training", "Low precision forward and backward.", (
        "scaleprop.prepare_training", "scaleprop.scale_report", "scaleprop.training.ScaleReports",
        "scaleprop.training.training_state", "scaleprop.training.training_options",
        "scaleprop.training.deployable", "scaleprop.unit_scale", "scaleprop.parameter_groups",
        "scaleprop.qat.LearnedStep", "scaleprop.adapters.")),
    "api/optim": ("Optimizers", "State, weights and gradients of optimizers.", (
        "scaleprop.optim.", *(f"scaleprop.optim.{name}" for name in (
            "scaled_state", "ScaledState", "StateFormat", "stochastic_weights",
            "StochasticWeights", "round_stochastic", "StableClip", "Oscillation", "encode_state",
            "decode_state")))),
    "api/monitors": ("Monitors and sweeps", "What recipes do to runs.", (
        "scaleprop.Monitor", *(f"scaleprop.monitors.{name}" for name in (
            "Measurement", "OperandRecord", "GradientRecord", "Writer", "CsvWriter",
            "TensorBoardWriter", "read_csv", "plot_scales")),
        "scaleprop.sweep", "scaleprop.Sweep", *(f"scaleprop.sweeps.{name}" for name in (
            "Point", "Mean", "Effect", "Gemm", "gemms_of", "linear_gemms", "Overhead",
            "overhead")))),
    "api/passes": ("Rules, passes and backends", "What [extensions](../contributing.md) are made "
                   "of.", (
        *(f"scaleprop.rules.{name}" for name in (
            "Rule", "Homogeneity", "Contraction", "Operand", "Coverage", "register",
            "rule_for", "coverage", "core_operators", "contraction_of", "contraction_behind")),
        "scaleprop.passes.base.Pass", "scaleprop.passes.base.PassResult",
        "scaleprop.passes.base.PassManager", "scaleprop.passes.base.Program",
        "scaleprop.passes.rewrite.Rewriter", "scaleprop.passes.transforms.base.TransformPass",
        "scaleprop.passes.transforms.base.Work", "scaleprop.calibration.TensorStatistics",
        "scaleprop.backends.base.Backend", "scaleprop.backends.base.Executable",
        "scaleprop.backends.onnxruntime.registry.lowers")),
}
TITLES = {f"{path}.md": title for path, (title, _, _) in _PAGES.items()}


def pages() -> Iterator[tuple[str, str]]:
    """Paths and texts.

    Raises:
        ValueError: where a public name is on no page.
    """
    if missing := sorted(_public() - {home(name) for names in _shown() for name in names}):
        raise ValueError(f"no page of the API shows {', '.join(missing)}: add them to _PAGES")
    for path, (title, lead, names) in _PAGES.items():
        yield f"{path}.md", page(title, lead, *(_shown_as(name) for name in names))


def _shown() -> Iterator[tuple[str, ...]]:
    for _, _, names in _PAGES.values():
        yield tuple(name for name in names if not name.endswith("."))


def _public() -> set[str]:
    """Where the classes and functions that modules of the package call public are defined."""
    found: set[str] = set()
    modules = [scaleprop, *(importlib.import_module(f"scaleprop.{found.name}")
                            for found in pkgutil.iter_modules(scaleprop.__path__)
                            if not found.name.startswith("_"))]
    for module in modules:
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            if getattr(value, "__module__", "").startswith("scaleprop"):
                found.add(home(f"{module.__name__}.{name}"))
    return found


def home(name: str) -> str:
    """The full name of what ``name`` stands for: where its definition is."""
    module, _, attribute = name.rpartition(".")
    value = getattr(scaleprop if module == "scaleprop" else importlib.import_module(module),
                    attribute)
    return f"{value.__module__}.{value.__qualname__}"


def _shown_as(name: str) -> str:
    if not name.endswith("."):
        return f"::: {name}"
    return f"::: {name[:-1]}\n    options: {{members: false, show_root_heading: false}}"
