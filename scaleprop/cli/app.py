"""The commands. Heavy imports happen inside them, so that ``--help`` is immediate."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from scaleprop.cli.graph import draw, drawing
from scaleprop.cli.options import (
    RECIPE,
    calibration_of,
    check_suffix,
    common,
    compile_subject,
    data_options,
    decisions,
    finish,
    inputs_option,
    model_options,
    recipe_options,
    report_option,
)
from scaleprop.cli.report import report_group
from scaleprop.errors import ConfigError, ScalePropError

REFUSED = 2  # exit status of an error with a reason
INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status. Never raises for a refused request."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        result = app.main(given, prog_name="scaleprop", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:  # what click makes of KeyboardInterrupt
        click.echo("interrupted", err=True)
        return INTERRUPTED
    except ScalePropError as error:
        if "--debug" in given:
            raise
        click.echo(f"error: {error}", err=True)
        return REFUSED
    except BrokenPipeError:  # the reader has left, as in `scaleprop formats | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="scaleprop")
def app() -> None:
    """Rewrite PyTorch models to low-precision numbers, and see what that did.

    MODEL is package.module:factory, where the factory returns a module or
    (module, example_inputs), a .pt2 file from torch.export.save, or a folder that
    save_pretrained of transformers wrote.
    """


app.add_command(report_group)


@app.command("compile")
@click.argument("model", metavar="[MODEL]", required=False)
@data_options
@click.option("--target", help="With --recipe auto: whose formats.")
@click.option("--recipe", "recipes", multiple=True, default=(RECIPE,), show_default=True,
              help="A name from `scaleprop recipes`, a .toml or .json file, or auto. Repeatable: "
                   "several are compared.")
@decisions
@click.option("--from-safetensors", "source", metavar="DIR",
              type=click.Path(path_type=Path),
              help="Parameters come from these files, a layer at a time: for models larger than "
                   "memory. MODEL makes the module; without it, DIR's config.json does.")
@click.option("--ignore", multiple=True, metavar="PATTERN",
              help="Tensors that DIR may have and the model has not; repeatable.")
@click.option("--out", type=click.Path(path_type=Path),
              help="A folder for scaleprop.load, or a .onnx file.")
@click.option("--format", "kind", type=click.Choice(["scaleprop", "onnx", "compressed-tensors"]),
              help="What to write; compressed-tensors: a folder for transformers and vLLM. "
                   "Default: by the name of --out.")
@click.option("--seconds", default=5.0, show_default=True,
              help="With several recipes: how long to time them; 0: not at all.")
@click.option("--loss", metavar="MODULE:FUNCTION",
              help="With --report: show values through depth backward too; as for analyze.")
@report_option
@common
@click.pass_context
def compile_command(
    context: click.Context, report: Path | None, emit: Any, **options: Any
) -> None:
    """Compile MODEL, and report on every tensor; or by several recipes, side by side.

    A folder whose weights are quantized already is taken as it is, without a recipe.
    """
    from scaleprop.cli.compiling import compile_and_report

    check_suffix(report)
    options["calibration"] = calibration_of(options["calibration"])
    given = [name for name in options if context.get_parameter_source(name) is
             click.core.ParameterSource.COMMANDLINE]  # fmt: skip
    measure = report is not None or emit is not None
    found, files = compile_and_report(given=given, measure=measure, **options)
    finish(found, files, report, emit)


@app.command("export")
@model_options
@recipe_options
@decisions
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The .onnx file.")
@report_option
@common
def export_command(out: Path, report: Path | None, emit: Any, **options: Any) -> None:
    """Compile MODEL to an ONNX file, checked against the reference."""
    check_suffix(report)
    if out.suffix != ".onnx":
        raise ConfigError(f"--out {str(out)!r}: an export is a .onnx file")
    _, compiled = compile_subject(**options)
    finish(compiled.report, [compiled.export(out)], report, emit)


@app.command("analyze")
@model_options
@click.option("--loss", metavar="MODULE:FUNCTION",
              help="Look at a training step: takes MODEL's output, returns the loss; or `output`, "
                   "where MODEL returns it.")
@click.option("--source", is_flag=True,
              help="With --loss: print the model's source with the scales that its lines make.")
@click.option("-p", "--pass", "passes", multiple=True, metavar="NAME{OPTION=VALUE}",
              help="Without --loss: how much easier it makes the activations; repeatable.")
@report_option
@common
def analyze_command(
    model: str, inputs: str | None, calibration: str | None, loss: str | None, source: bool,
    passes: tuple[str, ...], report: Path | None, emit: Any,
) -> None:
    """Say what each format would cost MODEL, and where its outliers are. Nothing is changed."""
    from scaleprop.analysis import analyze
    from scaleprop.cli.models import load_subject, resolve

    check_suffix(report)
    if source and loss is None:
        raise ConfigError("--source shows a training step: add --loss MODULE:FUNCTION")
    subject = load_subject(model, inputs)
    if loss is None:
        found = analyze(subject.model, subject.inputs, calibration=calibration_of(calibration),
                        passes=passes)
        finish(found, [], report, emit)
        return
    if passes:
        raise ConfigError("--pass has no use with --loss: passes are measured on inference")
    if calibration is not None:
        raise ConfigError("--calibration has no use with --loss: one step is measured")
    loss_fn: Any = loss if loss == "output" else resolve(loss, "loss")
    scales: Any = analyze(subject.model, subject.inputs, loss_fn=loss_fn)  # type: ignore[arg-type]
    if source and not emit:
        if report is not None:
            scales.save(report)
        click.echo(scales.annotated_source(), nl=False)
        return
    finish(scales, [], report, emit)


@app.command("graph")
@model_options
@recipe_options
@decisions
@drawing
@common
def graph_command(emit: Any, **options: Any) -> None:
    """Draw one block of MODEL, with scales on its edges."""
    draw(emit=emit, compile_model=compile_subject, **options)


@app.command("bench")
@model_options
@click.option("--recipe", "recipes", multiple=True, default=(RECIPE,), show_default=True,
              help="Repeatable.")
@decisions
@click.option("--seconds", default=5.0, show_default=True, help="How long to measure.")
@common
def bench_command(
    model: str, inputs: str | None, calibration: str | None, recipes: tuple[str, ...],
    seconds: float, emit: Any, **options: Any,
) -> None:
    """Time recipes against float32 on MODEL's example inputs: interleaved medians."""
    import dataclasses

    from scaleprop.cli.bench import bench
    from scaleprop.cli.models import load_subject
    from scaleprop.cli.output import print_table
    from scaleprop.report.text import megabytes

    options["calibration"] = calibration_of(calibration)
    rows = bench(load_subject(model, inputs), recipes, seconds=seconds, **options)
    if emit:
        emit({"rows": [dataclasses.asdict(row) for row in rows]})
        return
    print_table(
        ("what", "ms", "speed", "parameters", "size", "cosine"),
        [(row.name, f"{row.milliseconds:.3f}", f"{row.speedup:.2f}×", megabytes(row.nbytes),
          f"{row.size_ratio:.3f}×", f"{row.cosine:.5f}") for row in rows],
        numbers=("ms", "speed", "parameters", "size", "cosine"),
    )


@app.command("sweep")
@click.argument("config", metavar="[CONFIG.toml]", required=False,
                type=click.Path(path_type=Path))
@click.option("--show", "shown", type=click.Path(path_type=Path), metavar="SWEEP.sqlite",
              help="Report on the runs that a file has; run nothing.")
@click.option("--path", type=click.Path(path_type=Path),
              help="Where runs are kept; else what CONFIG says.")
@click.option("--jobs", type=int, help="Processes; -1 for as many as there are cores.")
@click.option("--fresh/--resume", default=False, show_default=True,
              help="Forget the runs that the file has, or go on from them.")
@click.option("--csv", "csv_path", type=click.Path(path_type=Path), help="Also write the table.")
@click.option("--plot", type=click.Path(path_type=Path),
              help="Also draw gaps over costs: .svg, .png, or .html with the table.")
@click.option("--markdown", type=click.Path(path_type=Path), help="Also write the table there.")
@common
def sweep_command(emit: Any, **options: Any) -> int:
    """Train by every combination of changes to a recipe; compare losses and costs.

    CONFIG says factory, data, recipe and axes, as scaleprop.sweep takes them.
    Exit status 1 where runs failed.
    """
    from scaleprop.cli.sweep import run_sweep

    return run_sweep(emit=emit, **options)


@app.command("formats")
@click.argument("names", nargs=-1, metavar="[FORMAT]...")
@common
def formats_command(names: tuple[str, ...], emit: Any) -> None:
    """List the named formats, or describe the given ones."""
    from scaleprop.cli.listing import formats

    rows = formats(names)
    if emit:
        emit({"formats": rows})
        return
    from scaleprop.cli.output import print_table

    print_table(
        ("name", "in full", "bits", "max", "shares a scale", "scale", "rule", "bytes per value"),
        [(row["name"], row["in_full"], str(row["bits"]), f"{row['max']:g}", row["shares_a_scale"],
          row["scale"], row["rule"], f"{row['bytes_per_value']:g}") for row in rows],
        numbers=("bits", "max", "bytes per value"),
    )
    click.echo("Any combination works: element[tensor|row|channel|1x32|16x16]*scale(*f32)(+zp)"
               "(:rule), e.g. int4[1x64]*f16+zp")


@app.command("recipes")
@click.argument("name", required=False)
@click.option("--training", is_flag=True, help="Those of scaleprop.prepare_training.")
@common
def recipes_command(name: str | None, training: bool, emit: Any) -> None:
    """List the recipes, or one by NAME or file."""
    from scaleprop.cli.listing import recipes, role_text, training_recipes, training_table

    rows = [row for row in training_recipes() if name in (None, row["name"])] if training \
        else recipes(name)
    if training and not rows:
        from scaleprop.recipes.training_named import training_recipe

        training_recipe(str(name))  # says which there are
    if emit:
        emit({"recipes": rows})
        return
    from scaleprop.cli.output import print_table

    if training:
        print_table(*training_table(rows))
        return

    roles = list(dict.fromkeys(role for row in rows for role in row["roles"]))
    print_table(
        ("name", *roles, "description"),
        [(row["name"], *(role_text(row["roles"].get(role)) for role in roles), row["description"])
         for row in rows],
    )


@app.command("passes")
@common
def passes_command(emit: Any) -> None:
    """List the passes with their options."""
    from scaleprop.cli.listing import passes

    rows = passes()
    if emit:
        emit({"passes": rows})
        return
    from scaleprop.cli.output import print_table

    print_table(
        ("name", "options", "keeps the function", "what it does"),
        [(row["name"],
          "\n".join(f"{name}: {kind} = {usual}" for name, kind, usual in row["options"]),
          "yes" if row["preserves_function"] else "", row["summary"]) for row in rows],
    )


@app.command("rules")
@click.argument("model", metavar="[MODEL]", required=False)
@inputs_option
@click.option("--missing", is_flag=True, help="Only operators without a rule.")
@click.option("--markdown", type=click.Path(path_type=Path), help="Also write the table there.")
@common
def rules_command(
    model: str | None, inputs: str | None, missing: bool, markdown: Path | None, emit: Any
) -> None:
    """List what is known of each operator: of core ATen, or of those that MODEL calls."""
    from scaleprop.cli.listing import rule_table, rules, rules_markdown
    from scaleprop.cli.models import load_subject
    from scaleprop.cli.output import print_table
    from scaleprop.report.files import write_text

    if model is None and inputs is not None:
        raise ConfigError(f"--inputs {inputs!r}: there is no MODEL that they are for")
    every = rules(load_subject(model, inputs) if model else None)
    without = [row for row in every if row["family"] is None]
    rows = without if missing else every
    if markdown is not None:
        write_text(markdown, rules_markdown(rows, model))
    if emit:
        emit({"rules": rows})
        return
    if rows:
        print_table(*rule_table(rows), numbers=("calls",))
    click.echo(f"{len(without)} of {len(every)} operators have no rule: they are left in float")
    if markdown is not None:
        click.echo(f"wrote {markdown}")


@app.command("doctor")
@common
def doctor_command(emit: Any) -> int:
    """Show versions, CPU features and optional packages, and try every backend.

    Exit status 1 where a backend that is installed fails.
    """
    from scaleprop.cli.doctor import examine, show

    found = examine()
    if emit:
        emit(found)
    else:
        show(found)
    return int(any(test["status"] == "failed" for test in found["self_test"]))
