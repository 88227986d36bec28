"""``analyze``: what low precision would do to a model, without changing it.

Without a loss: what each format would cost each operand of inference. With one: how large every
value of a training step is, forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

from scaleprop.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram

    from scaleprop.passes.base import Pass
    from scaleprop.report import Report, ScaleReport

__all__ = ["analyze"]


@overload
def analyze(
    model: torch.nn.Module | ExportedProgram,
    example_inputs: Any,
    calibration: Iterable[Any] | Callable[[Any], Any] | None = None,
    *,
    loss_fn: None = None,
    dynamic_shapes: Any = None,
    passes: Sequence[str | Pass] = (),
) -> Report: ...


@overload
def analyze(
    model: torch.nn.Module,
    example_inputs: Any,
    *,
    loss_fn: Callable[[Any], torch.Tensor] | Literal["output"],
) -> ScaleReport: ...


def analyze(
    model: Any,
    example_inputs: Any,
    calibration: Iterable[Any] | Callable[[Any], Any] | None = None,
    *,
    loss_fn: Any = None,
    dynamic_shapes: Any = None,
    passes: Sequence[str | Pass] = (),
) -> Report | ScaleReport:
    """What low precision would do to a model. Nothing is changed.

    Args:
        model, example_inputs, dynamic_shapes: as for ``compile``.
        calibration: what to measure on instead of ``example_inputs``: an iterable of inputs, or
            ``f(model)`` that runs the model. Statistics are summed over all of them.
        loss_fn: looks at a training step instead: takes the model's output and returns the loss;
            or ``"output"`` where the model returns the loss, alone, first, or as ``.loss``.
        passes: transforms, as ``name{option=value}``, in this order: how much easier they would
            make the activations to quantize is measured too.

    Returns:
        Without ``loss_fn``: a report without recipe: one record per operand and candidate format
        with its SQNR and underflow, ``outliers`` (where activations, weights and attention stand
        out, kurtosis, quantization difficulty), and notes that name the tensors each format would
        hurt. With it: a scale report: every value and gradient of one step, measured and predicted,
        the source with its scales, and findings on the signal through depth.

    Raises:
        CaptureError, ConfigError: as ``compile``; ConfigError where the loss is no scalar.
        CalibrationError: where ``calibration`` is empty or a single batch, or a tensor is NaN or
            Inf, naming node and batch; with ``loss_fn``, where a parameter's gradient is.
    """
    if loss_fn is None:
        from scaleprop.analysis.formats import compare_formats

        return compare_formats(model, example_inputs, calibration, dynamic_shapes, passes)
    if passes:
        raise ConfigError("passes have no use with loss_fn: they are measured on inference")
    from scaleprop.analysis.scales import look_at_training

    return look_at_training(model, example_inputs, loss_fn, calibration, dynamic_shapes)
