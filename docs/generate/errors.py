"""The page on troubleshooting: every error class, with an example that raises it.

Examples are run by ``tests/docs/test_troubles.py``, which compares what they raise with ``says``:
an ellipsis there stands for anything.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator, Mapping

from docs.generate.fields import listed
from docs.generate.markdown import page
from scaleprop import errors


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trouble:
    """example: code that raises the error; says: its message; remedy: what to do, in general."""

    example: str
    says: str
    remedy: str


TROUBLES: Mapping[type[errors.ScalePropError], Trouble] = {
    errors.ConfigError: Trouble(
        example="""\
import torch, scaleprop

scaleprop.compile(torch.nn.Linear(8, 8), torch.randn(2, 8), recipe="int9")
""",
        says="unknown recipe 'int9'; did you mean 'int8', 'int4', …? known: int8, …; or a path to "
             "a .toml or .json file",
        remedy="The message lists what would have been taken. `scaleprop recipes`, `scaleprop "
               "passes` and `scaleprop formats` list all names."),
    errors.FormatError: Trouble(
        example="""\
from scaleprop.formats import parse

parse("e2m1[1x32]*e8m0:exact")
""",
        says="format 'e2m1[1x32]*e8m0:exact': e8m0 holds powers of two: use one of floor, rceil, "
             "ceil, even, pow2, mse",
        remedy="[Formats](formats/index.md) says how names are made, and which rules go with which "
               "scales."),
    errors.UnsupportedOpError: Trouble(
        example="""\
import torch, scaleprop

class Bessel(torch.nn.Module):
    def forward(self, x):
        return torch.special.bessel_j0(x)

scaleprop.compile(Bessel(), torch.randn(4))
""",
        says="node 'special_bessel_j0' (aten.special_bessel_j0.default, …): no ONNX lowering; "
             "remedy: register one with scaleprop.backends.onnxruntime.registry.lowers, or use "
             "backend='inductor' or 'reference'",
        remedy="[Register a lowering](contributing.md#add-a-backend), take another backend, or "
               "spell the operator with others."),
    errors.CaptureError: Trouble(
        example="""\
import torch, scaleprop

class Branch(torch.nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x

scaleprop.compile(Branch(), torch.randn(4))
""",
        says="torch.export could not trace Branch: …Remedy: the model branches on the values of a "
             "tensor; choose with torch.where or torch.cond, or pass the decision as a Python "
             "argument.",
        remedy="The message ends with the line that could not be traced and what to do. Branches "
               "on values become `torch.where`; what `torch.export` cannot take at all can be left "
               "outside of the module that is compiled."),
    errors.CalibrationError: Trouble(
        example="""\
import torch, scaleprop

scaleprop.compile(torch.nn.Linear(8, 8), torch.randn(2, 8), recipe="int8")
""",
        says="node 'scaled_mm' (…): the scale of its input 'input_1' is static and was not "
             "calibrated. Remedy: pass calibration= (example inputs, or a function that calls the "
             "model), or choose a recipe with dynamic scales, such as 'int8-dynamic'",
        remedy="Pass a list of inputs like those that the model will see; `int8-dynamic` needs "
               "none. NaN or Inf in a batch is refused too: find the batch with "
               "`scaleprop.analyze`."),
    errors.PreconditionError: Trouble(
        example="""\
import torch
from scaleprop.passes.base import PassManager
from scaleprop.passes.capture import capture
from scaleprop.passes.quantize_weights import QuantizeWeights

program = capture(torch.nn.Linear(8, 8), (torch.randn(2, 8),))
PassManager([QuantizeWeights()]).run(program)
""",
        says="no formats are assigned; run assign-formats first",
        remedy="Only a pipeline of one's own can raise it: `scaleprop.compile` orders the passes. "
               "[Passes](passes.md) lists them in order."),
    errors.PostconditionError: Trouble(
        example="""\
import dataclasses, torch, scaleprop
from scaleprop.passes.base import Pass, PassResult
from scaleprop.passes.rewrite import Rewriter

@dataclasses.dataclass(frozen=True)
class DropGelu(Pass):
    name = "drop-gelu"
    preserves_function = True     # it does not

    def run(self, program):
        rewriter = Rewriter(program, self.name)
        for node in list(rewriter.graph.nodes):
            if node.target is torch.ops.aten.gelu.default:
                rewriter.replace(node, node.args[0])
        return PassResult(rewriter.finish(), rewriter.modified)

scaleprop.compile(torch.nn.GELU(), torch.ones(8), passes=[DropGelu()], verify=True)
""",
        says="pass 'drop-gelu' promises to keep the function, but output 0 differs by … of its "
             "largest value in float64 (bound 1e-09)",
        remedy="A bug of the pass. Of one that ships: report it, with the model; meanwhile leave "
               "the pass out."),
    errors.LoweringError: Trouble(
        example="""\
import torch, scaleprop
from scaleprop import Recipe, Role

tiles = Recipe(name="tiles", description="tiles of activations", roles={
    "fprop.w": Role(format="nvfp4"), "fprop.x": Role(format="nvfp4_2d")})
scaleprop.compile(torch.nn.Linear(64, 8), torch.randn(2, 64), recipe=tiles)
""",
        says="node 'quantize' (scaleprop.quantize.default, …): activations in nvfp4_2d: 2-D blocks "
             "of activations are not supported; use 1-D blocks, such as [1x32]; remedy: another "
             "activation format, or backend='inductor' or 'reference'",
        remedy="The backend cannot run this faithfully, and does not run something else instead. "
               "Take the format that the message names, or another backend."),
    errors.MismatchError: Trouble(
        example="""\
import torch
from scaleprop.fidelity import compare

outputs, reference, float32 = torch.ones(4), torch.full((4,), 0.5), torch.full((4,), 0.4)
compare([outputs], [reference], [float32], "a backend of mine")
""",
        says="a backend of mine: output 0 differs from the reference by 1 (relative 2-norm), more "
             "than the bound 0.5; the format's own error is 0.25",
        remedy="What was written is not what was meant, and was not kept. Report it, with the "
               "model; `exclude=[…]` of the node that the message names keeps it in float, "
               "meanwhile."),
    errors.BackendUnavailable: Trouble(
        example="""\
import sys
from scaleprop.monitors import TensorBoardWriter

sys.modules["tensorboard"] = None      # as where it is not installed
TensorBoardWriter("runs/fp8")
""",
        says="TensorBoardWriter needs the package tensorboard. Remedy: pip install "
             '"scaleprop[monitor]"',
        remedy="Type the command that the message ends with. `scaleprop doctor` shows what is "
               "installed, and tries every backend."),
}
_LEAD = """\
Everything that scaleprop refuses, it refuses with one of these classes. A message says what was
found, where (node, operator, the line of your source) and what to do; on the command line it is on
stderr, and the exit status is 2. Anything else that is raised is a bug.
"""
_QUIET = """\
## Not an error, but not what you wanted

| what you see | why, and what to do |
| --- | --- |
| a tensor stayed `high` in the report | the row says why: an operator without a rule, a role that \
the recipe has not, a size that does not fit, or `exclude` |
| the outputs are far from float32's | look at the rows of lowest SQNR; keep them in float with \
`exclude=[…]`, or try [a method](transforms.md) |
| no speed gained | `runs as` in the report names each kernel; `scaleprop doctor` the instructions \
that the processor has. FP8, FP6 and FP4 gain size first on a CPU |
| a call is refused after compiling | its sizes contradict what the model's code did with the \
example's: pass an example of another size, or `dynamic_shapes=` |
| a layer trains in high precision | `model.scale_report().show()` says why; the last layers \
before the loss stay high on purpose |
"""


def pages() -> Iterator[tuple[str, str]]:
    """The page.

    Raises:
        ValueError: where an error class has no example.
    """
    parts = [_LEAD, _tree(), _QUIET]
    for kind in leaves():
        if kind not in TROUBLES:
            raise ValueError(f"{kind.__name__} has no example: add one to TROUBLES")
        parts += _section(kind, TROUBLES[kind])
    yield "troubleshooting.md", page("Troubleshooting", *parts)


def leaves() -> Iterator[type[errors.ScalePropError]]:
    """The classes that are raised: those that no other one is made of."""
    kinds = [kind for kind in vars(errors).values()
             if inspect.isclass(kind) and issubclass(kind, errors.ScalePropError)]
    bases = {base for kind in kinds for base in kind.__bases__}
    return (kind for kind in kinds if kind not in bases)


def _tree() -> str:
    text = inspect.cleandoc(errors.__doc__ or "")
    lines = re.findall(r"^    (\W*\w+(?: \(\w+\))?)", text, re.M)
    return "```text\n" + "\n".join(lines) + "\n```"


def _section(kind: type[errors.ScalePropError], trouble: Trouble) -> list[str]:
    others = [base.__name__ for base in kind.__mro__[1:-1]
              if base.__module__ == "builtins" and base not in (Exception, BaseException)]
    caught = f" It is a `{others[0]}`, too." if others else ""
    quoted = "\n".join(f"> {line}" for line in trouble.says.splitlines())
    return [f"## {kind.__name__}", listed(inspect.cleandoc(kind.__doc__ or "")) + caught,
            f"```python\n{trouble.example}```", quoted, f"**Remedy.** {trouble.remedy}"]
