"""smooth, fold-norms and rotate: what they do to architectures that nobody has named."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import scaleprop
from scaleprop.errors import CalibrationError, ConfigError
from scaleprop.passes.assign import AssignFormats
from scaleprop.passes.base import PassManager, check_same_function, widened
from scaleprop.passes.canonicalise import Canonicalise
from scaleprop.passes.capture import capture
from scaleprop.passes.cleanup import CleanUp
from scaleprop.passes.methods.fold_norms import FoldNorms
from scaleprop.passes.methods.rotate import RotateChannels
from scaleprop.passes.methods.smooth import Smooth
from scaleprop.recipes import named_recipe
from tests.passes.transforms.toys import TOYS, shuffled


def compiled(name, *passes, recipe="int8-token", model=None):
    make, inputs = TOYS[name]
    return scaleprop.compile(
        model or shuffled(make()), inputs, recipe=recipe, backend="reference",
        calibration=[inputs] * 2, passes=passes, verify=True)  # fmt: skip


def applied(made):
    return [record for record in made.program.transforms if record.refused is None]


@pytest.mark.parametrize("name", TOYS)
def test_smoothing_and_rotating_keep_the_function(name):
    made = compiled(name, "smooth", "fold-norms", "rotate")
    assert {record.by for record in applied(made)} >= {"smooth", "rotate"}
    assert made.fidelity.cosine > 0.99


def test_smooth_divides_by_what_the_paper_says():
    torch.manual_seed(0)
    norm, reader = torch.nn.LayerNorm(8), torch.nn.Linear(8, 4)
    x = torch.randn(3, 8)
    model = torch.nn.Sequential(norm, reader).eval()
    made = scaleprop.compile(model, x, recipe="int8-token", backend="reference", calibration=[x],
                             passes=["smooth{alpha=0.7}"])  # fmt: skip
    seen, weight = norm(x).abs().amax(0), reader.weight.abs().amax(0)
    expected = seen.pow(0.7) / weight.pow(0.3)
    gain = dict(made.program.module.named_buffers())["0.weight"]
    assert torch.allclose(gain, 1 / expected, rtol=1e-5)


def test_smoothing_helps_where_channels_stand_out():
    make, _inputs = TOYS["before"]
    model = shuffled(make())
    with torch.no_grad():
        model.ln1.weight[3] *= 60
        model.qkv.weight[:, 3] /= 60
    errors = [compiled("before", *passes, model=model).fidelity.format_error
              for passes in ((), ("smooth",))]  # fmt: skip
    assert errors[1] < errors[0] / 3


def test_folding_and_rotating_help_where_channels_stand_out():
    make, _ = TOYS["untied"]
    model = shuffled(make())
    with torch.no_grad():
        for norm, readers in ((model.n1, (model.ask, model.both)), (model.n2, (model.gu,))):
            norm.gain[3] *= 80
            for reader in readers:
                reader.weight[:, 3] /= 80
    errors = [compiled("untied", *passes, model=model, recipe="int4-int4").fidelity.format_error
              for passes in ((), ("fold-norms", "rotate"))]  # fmt: skip
    assert errors[1] < errors[0] / 2


def test_folded_norms_have_nothing_left_to_fold():
    made = compiled("untied", "fold-norms").program
    norms = [node for node in made.module.graph.nodes if "rms_norm" in str(node.target)]
    assert len(norms) == 3 and all(node.args[2] is None for node in norms)
    before = compiled("before", "fold-norms").program
    assert not any("layer_norm" in str(node.target) for node in before.module.graph.nodes)


def test_a_gain_of_zero_is_folded():
    make, _ = TOYS["untied"]
    model = shuffled(make())
    with torch.no_grad():
        model.n1.gain[4] = 0.0
        model.n2.gain[2] *= -1
    made = compiled("untied", "fold-norms", model=model)
    assert len(applied(made)) == 3


def test_what_is_refused_says_why():
    made = compiled("after", "fold-norms", "rotate{online=false}", "smooth{runtime=false}")
    refused = [record for record in made.program.transforms if record.refused]
    reasons = " ".join(record.refused for record in refused)
    assert "smooth" in {record.by for record in refused}
    assert "returns it" in reasons or "weighs its inputs" in reasons or "not homogeneous" in reasons
    assert any("toys.py" in record.source for record in refused)


def test_online_rotations_serve_the_quantized_readers_only():
    made = compiled("after", "rotate{residual=false, values=false}")
    names = [str(node.target) for node in made.program.module.graph.nodes]
    assert sum("hadamard" in name for name in names) == len(applied(made)) > 3
    assert all(record.runtime for record in applied(made))


@pytest.mark.parametrize("step", [FoldNorms, RotateChannels])
def test_methods_leave_the_given_program_alone(step):
    make, inputs = TOYS["untied"]
    recipe = named_recipe("int8-token")
    steps = [CleanUp(), Canonicalise(), AssignFormats(recipe=recipe)]
    program = PassManager(steps).run(capture(shuffled(make()), inputs, {}, None))
    before = widened(program)
    code = before.module.code
    result = step().run(before)
    assert before.module.code == code and result.modified
    check_same_function("test", before, result.program, rtol=1e-10)


def test_bad_options_and_missing_calibration():
    with pytest.raises(ConfigError, match="alpha=2"):
        Smooth(alpha=2)
    with pytest.raises(ConfigError, match="cuts=-1"):
        RotateChannels(cuts=-1)
    make, inputs = TOYS["after"]
    with pytest.raises(CalibrationError, match="smooth"):
        scaleprop.compile(make().eval(), inputs, recipe="int8-token", backend="reference",
                          passes=["smooth"])


def test_a_method_of_ones_own_as_the_document_writes_it():
    text = (Path(__file__).parents[3] / "docs" / "transforms.md").read_text()
    code = next(block for block in re.findall(r"```python\n(.*?)```", text, re.S)
                if "class Halve" in block)
    make, inputs = TOYS["before"]
    names = {"model": shuffled(make()), "inputs": inputs}
    exec(code.replace("passes=[Halve()]", "passes=[Halve()], backend='reference', verify=True")
         .replace("scaleprop.compile(", "made = scaleprop.compile("), names)
    gain = dict(names["made"].program.module.named_buffers())["ln1.weight"]
    assert torch.equal(gain, names["model"].ln1.weight / 2)


def test_layers_of_few_rows_are_not_learned_from():
    make, inputs = TOYS["before"]
    made = scaleprop.compile(shuffled(make()), inputs, recipe="int4-int4", backend="reference",
                             calibration=[inputs], passes=["learn-rotation{steps=2}"])
    assert any("2 rows" in str(record.refused) for record in made.program.transforms)
    assert sum(record.refused is None for record in made.program.transforms) > 1


def test_gains_that_are_written_as_one_plus_a_parameter_are_folded():
    class Plus(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.delta = torch.nn.Parameter(torch.randn(8))
            self.first, self.last = torch.nn.Linear(5, 8), torch.nn.Linear(8, 4, bias=False)

        def forward(self, x):
            x = self.first(x)
            normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
            return self.last(normed * (1 + self.delta))

    passes = ["fold-norms", "rotate{online=false}"]
    made = scaleprop.compile(Plus().eval(), torch.randn(3, 5), recipe="int8-token",
                             backend="reference", passes=passes, verify=True)
    assert [record.refused for record in made.program.transforms] == [None, None]
    assert all(not record.runtime for record in made.program.transforms)
