"""What adapters prepare, what they refuse, and what they say where their library is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import scaleprop
from examples.small_task import Classifier, classifier
from scaleprop import adapters
from scaleprop.adapters.base import Preparation
from scaleprop.errors import ConfigError

LIBRARIES = {"transformers": "transformers", "lightning": "pytorch_lightning",
             "accelerate": "accelerate", "pretrained": "transformers"}


def prepared(model: nn.Module) -> set[str]:
    """Names of the modules that were given to ``prepare_training``."""
    found: set[str] = set()
    for name, module in model.named_modules():
        try:
            scaleprop.scale_report(module)
        except ConfigError:
            continue
        found.add(name)
    return found


def step(model: nn.Module) -> None:
    model(torch.randn(8, 32), torch.zeros(8, dtype=torch.int64))["loss"].backward()


@pytest.mark.parametrize(("patterns", "names"), [
    ((), {""}),
    (["blocks.*"], {"blocks.0", "blocks.1"}),
    (["blocks.0.*", "last"], {"blocks.0.0", "blocks.0.1", "blocks.0.2", "blocks.0.3", "last"}),
])
def test_modules_are_chosen_by_name(patterns: list[str], names: set[str]) -> None:
    model = classifier()
    keys = list(model.state_dict())
    Preparation("fp8", "eager", patterns).apply(model)
    assert prepared(model) == names
    step(model)
    assert list(model.state_dict()) == keys
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ConfigError, match="unknown training recipe 'fp7'"):
        Preparation("fp7", "eager", ())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="inner='triton'"):
        Preparation("fp8", "triton", ())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"one string: give a list of patterns, \['blocks"):
        Preparation("fp8", "eager", "blocks.*")
    with pytest.raises(ConfigError, match=r"no module of Classifier is called 'layers\.\*'; "
                                          "there are first, blocks"):
        Preparation("fp8", "eager", ["layers.*"]).apply(classifier())
    with pytest.raises(AttributeError, match="no attribute 'keras'"):
        adapters.keras  # type: ignore[attr-defined]  # noqa: B018


def test_a_missing_library_is_named() -> None:
    code = ("import sys\n"
            f"sys.modules |= dict.fromkeys({list(LIBRARIES.values())})\n"
            "from scaleprop import adapters\n"
            "from scaleprop.errors import BackendUnavailable\n"
            f"for name in {list(LIBRARIES)}:\n"
            "    try: getattr(adapters, name)\n"
            "    except BackendUnavailable as error: print(error)")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True,
                          text=True, cwd=Path(__file__).parents[2])
    assert done.stdout.splitlines() == [
        f'this adapter needs {library}: pip install "scaleprop[adapters]"'
        for library in LIBRARIES.values()], done.stderr


# --- Accelerate ----------------------------------------------------------------------------------


@pytest.fixture
def accelerator() -> Any:
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield accelerate.Accelerator(cpu=True)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_accelerate_prepares_the_models_among_its_objects(accelerator: Any) -> None:
    model = classifier()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    ready, wrapped = adapters.accelerate.prepare(accelerator, model, optimizer, recipe="fp8",
                                                 inner="eager", modules=["blocks.*"])
    assert prepared(accelerator.unwrap_model(ready)) == {"blocks.0", "blocks.1"}
    assert wrapped.optimizer is optimizer
    alone = adapters.accelerate.prepare(accelerator, classifier(), inner="eager")
    assert prepared(alone) == {""}


def test_accelerate_refuses_what_makes_no_sense(
    accelerator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = adapters.accelerate.prepare
    with pytest.raises(ConfigError, match=r"takes an accelerate\.Accelerator first, not Classif"):
        prepare(classifier(), accelerator)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no model among the objects"):
        prepare(accelerator, torch.optim.SGD(classifier().parameters(), 0.1))
    with pytest.raises(ConfigError, match="unknown training recipe 'fp7'"):
        prepare(accelerator, classifier(), recipe="fp7")  # type: ignore[arg-type]
    monkeypatch.setattr(type(accelerator), "mixed_precision", "fp8")
    with pytest.raises(ConfigError, match="mixed_precision='fp8' casts to FP8"):
        prepare(accelerator, classifier())
    monkeypatch.undo()
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ConfigError, match="dynamo_backend='INDUCTOR'"):
        prepare(accelerate.Accelerator(cpu=True, dynamo_backend="inductor"), classifier())


# --- Transformers --------------------------------------------------------------------------------


def test_a_trainer_that_compiles_is_refused(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True,
                                               torch_compile=True, report_to="none")
    callback = adapters.transformers.Callback("fp8", inner="eager")
    with pytest.raises(ConfigError, match="leave torch_compile out"):
        callback.on_train_begin(arguments, None, None, model=classifier())


# --- Lightning -----------------------------------------------------------------------------------


class Parts(nn.Module):
    """As a LightningModule is: modules that its steps call, one of them without parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Classifier()
        self.heads = nn.ModuleDict({"a": nn.Linear(4, 2), "b": nn.Linear(4, 2)})
        self.loss = nn.CrossEntropyLoss()


def test_lightning_prepares_what_is_called_and_only_once() -> None:
    pytest.importorskip("pytorch_lightning")
    model = Parts()
    plugin = adapters.lightning.Precision("fp8", inner="eager")
    assert plugin.convert_module(model) is model
    assert prepared(model) == {"encoder", "heads.a", "heads.b"}
    step(model.encoder)
    (report,) = scaleprop.scale_report(model.encoder)
    plugin.convert_module(model)
    assert scaleprop.scale_report(model.encoder) == (report,)

    named = Parts()
    adapters.lightning.Precision("fp8", inner="eager", modules=["encoder.blocks.*"]).convert_module(
        named)
    assert prepared(named) == {"encoder.blocks.0", "encoder.blocks.1"}


def test_lightnings_twin_is_taken_where_it_is_used(tmp_path: Path) -> None:
    """``lightning.pytorch`` takes plugins of its own class alone."""
    package = tmp_path / "lightning" / "pytorch" / "plugins"
    package.mkdir(parents=True)
    for folder in (package.parents[1], package.parent):
        (folder / "__init__.py").touch()
    (package / "__init__.py").write_text("class Precision: pass\n")
    code = ("import lightning.pytorch\n"
            "from scaleprop.adapters.lightning import Precision\n"
            "print(Precision.__mro__[1].__module__)")
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True,
                          text=True, cwd=tmp_path, env={"PYTHONPATH": f"{tmp_path}:{root}"})
    assert done.stdout.strip() == "lightning.pytorch.plugins", done.stderr


@pytest.mark.parametrize("modules", [None, [3], "0"])
def test_patterns_that_are_no_list_of_names_are_named(modules: Any) -> None:
    with pytest.raises(ConfigError, match=r"modules=.*give a list of patterns"):
        Preparation("fp8", "eager", modules)


def test_lightning_refuses_a_module_of_which_it_would_prepare_nothing() -> None:
    plugin = adapters.lightning.Precision("fp8", inner="eager")
    with pytest.raises(ConfigError, match=r"Linear has parameters, but no module below.*Remedy"):
        plugin.convert_module(nn.Linear(2, 2))
    plugin.convert_module(nn.Identity())
