"""Checkpoints of other libraries: written as compressed-tensors, read from it, GPTQ and AWQ.

    compiled.save_pretrained(folder, like=model)        # for transformers and vLLM
    compiled = scaleprop.from_pretrained(folder, example_inputs)
    model = scaleprop.interchange.decoded(folder)       # the model, its weights as numbers

Tensor by tensor: ``schemes`` (a format in their words), ``layouts`` (codes in their packings),
``gptq`` (GPTQ's and AWQ's).
"""

from scaleprop.interchange.reading import decoded

__all__ = ["decoded"]
