"""Passes by name, the pass manager's promises, and Hugging Face models end to end."""

from __future__ import annotations

import dataclasses
import warnings
from typing import ClassVar

import pytest
import torch
from torch.utils import _pytree as pytree

from scaleprop.errors import ConfigError, PostconditionError
from scaleprop.passes.assign import AssignFormats
from scaleprop.passes.base import Pass, PassManager, PassResult
from scaleprop.passes.calibrate import Calibrate
from scaleprop.passes.capture import capture
from scaleprop.passes.methods import METHODS
from scaleprop.passes.pipeline import build, describe_passes, parse_pass
from scaleprop.passes.quantize_weights import QuantizeWeights
from scaleprop.recipes import named_recipe


def test_parse_pass():
    assert parse_pass("clean-up").name == "clean-up"
    assert parse_pass("quantize-weights{clipping=mse, seed=3}") == QuantizeWeights("mse", seed=3)
    assert parse_pass("canonicalise{norms=false}").norms is False


BAD = {
    "quantise-weights": "unknown pass 'quantise-weights'; did you mean 'quantize-weights'",
    "quantize-weights{clip=mse}": "no option 'clip'; it has: clipping",
    "quantize-weights{clipping=best}": "clipping='best'; known:",
    "quantize-weights{mse}": "cannot read option 'mse'; use key=value",
    "canonicalise{norms=maybe}": "norms='maybe' is not bool",
    "assign-formats": "missing 1 required",
    "assign-formats{recipe=int4}": "recipe is no option here; pass it to compile(), as recipe=",
    'assign-formats{exclude=["a"]}': "pass it to compile(), as exclude=",
    'assign-formats{include=["a"]}': "pass it to compile(), as include=",
    "calibrate{data=x}": "pass it to compile(), as calibration=",
    "a b": "cannot read pass 'a b'",
}


@pytest.mark.parametrize("text", BAD)
def test_bad_passes(text):
    with pytest.raises(ConfigError) as caught:
        parse_pass(text)
    assert BAD[text] in str(caught.value)


def test_every_pass_is_described():
    infos = describe_passes()
    methods = [method.name for method in METHODS]
    manager = build(named_recipe("int8"), calibration=[],
                    extra=["solve-weights", "auto", *methods])  # fmt: skip
    assert {step.name for step in manager.passes} == {info.name for info in infos}
    assert all(info.summary for info in infos)
    canonicalise = next(info for info in infos if info.name == "canonicalise")
    assert ("norms", "bool", "True") in canonicalise.options
    assert next(info for info in infos if info.name == "assign-formats").options == ()


def test_extra_passes_replace_or_come_before_assignment():
    manager = build(named_recipe("int4"), extra=["quantize-weights{clipping=mse}", Twist()])
    names = [step.name for step in manager.passes]
    assert names.index("twist") == names.index("assign-formats") - 1
    assert QuantizeWeights("mse") in manager.passes and names.count("quantize-weights") == 1


def test_options_given_as_text_leave_the_others_as_they_are():
    data = [torch.ones(1)]
    texts = ["assign-formats", "calibrate{everything=true}", "quantize-weights{clipping=mse}",
             "quantize-weights{seed=3}"]  # fmt: skip
    manager = build(named_recipe("int8"), exclude=["a"], calibration=data, extra=texts)
    steps = {step.name: step for step in manager.passes}
    assert steps["assign-formats"] == AssignFormats(named_recipe("int8"), exclude=("a",))
    assert steps["calibrate"] == Calibrate(data, everything=True)
    assert steps["quantize-weights"] == QuantizeWeights("mse", seed=3)


@dataclasses.dataclass(frozen=True)
class Twist(Pass):
    """Claims to keep the function, and negates an output."""

    name: ClassVar[str] = "twist"
    preserves_function: ClassVar[bool] = True

    def run(self, program):
        new = program.fork()
        graph = new.module.graph
        node = next(n for n in graph.nodes if n.op == "call_function")
        with graph.inserting_after(node):
            negated = graph.call_function(torch.ops.aten.neg.default, (node,))
        negated.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(negated, delete_user_cb=lambda user: user is not negated)
        return PassResult(new, True)


def test_verify_finds_a_broken_promise(mlp):
    program = capture(mlp, (torch.randn(2, 64),))
    PassManager([Twist()]).run(program)
    with pytest.raises(PostconditionError, match="'twist' promises to keep the function") as error:
        PassManager([Twist()], verify=True).run(program)
    assert error.value.__notes__ == ["in pass 'twist', after no other pass"]


def test_notes_say_what_happened(mlp):
    program = build(named_recipe("int4")).run(capture(mlp, (torch.randn(2, 64),)))
    assert "assign-formats: 3 operators get formats from recipe 'int4'" in program.notes
    assert "quantize-weights: 3 weights quantized" in program.notes
    assert program.notes[0].startswith("input 'x' axis 1 is fixed")


def bert():
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1,
                        num_attention_heads=2, intermediate_size=64)  # fmt: skip
    return BertModel(config)


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=1,
                         intermediate_size=64, tie_word_embeddings=True)  # fmt: skip
    return LlamaForCausalLM(config)


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2, n_positions=32,
                        bos_token_id=0, eos_token_id=0)  # fmt: skip
    return GPT2LMHeadModel(config)


@pytest.mark.parametrize(("make", "linears"), [(bert, 7), (llama, 8), (gpt2, 5)],
                         ids=["bert", "llama", "gpt2"])  # fmt: skip
def test_hugging_face_models(make, linears):
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = make().eval()
    inputs = {"input_ids": torch.randint(0, 50, (1, 9))}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    program = capture(model, (), inputs)
    other = {"input_ids": torch.randint(0, 50, (3, 5))}
    other["attention_mask"] = torch.ones(3, 5, dtype=torch.int64)
    other["attention_mask"][1, 3:] = 0
    with torch.no_grad():
        want, got = model(**other), program.module(**other)
    assert type(got) is type(want) and got.keys() == want.keys()
    for left, right in zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)
    result = build(named_recipe("int8-dynamic"), verify=True).run(program)
    found = [str(n.target) for n in result.module.graph.nodes]
    assert found.count("scaleprop.scaled_mm.default") == linears
    assert "aten.linear.default" not in found and "aten.addmm.default" not in found
    assert ("aten.rms_norm.default" in found) == (make is llama)
    with torch.no_grad():
        low = result.module(**other)
    similarity = torch.cosine_similarity(low[0].flatten(), want[0].flatten(), dim=0)
    assert similarity > 0.999


@pytest.mark.parametrize("verify", [False, True])
def test_passes_warn_of_nothing(mlp, verify):
    program = capture(mlp, (torch.randn(2, 64),))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(named_recipe("int4"), verify=verify).run(program)
