"""The commands. Heavy imports happen inside them, so that ``--help`` is immediate."""

from __future__ import annotations

import functools
import inspect
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from scaleprop.backends.registry import BACKENDS
from scaleprop.errors import ConfigError, ScalePropError

REFUSED = 2  # exit status of an error with a reason
INTERRUPTED = 130  # 128 + SIGINT, as shells have it

_RECIPE = "int8-dynamic"


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status. Never raises for a refused request."""
    from scaleprop.cli import report  # noqa: F401  # pyright: ignore[reportUnusedImport]

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


Command = Callable[..., Any]


def common(command: Command) -> Command:
    """``--json``, ``--verbose`` and ``--debug``; stdout belongs to the result."""

    @click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout, and nothing else.")
    @click.option("-v", "--verbose", is_flag=True, help="Log what is done, on stderr.")
    @click.option("--debug", is_flag=True, help="Log everything; show tracebacks.")
    @functools.wraps(command)
    def wrapped(*args: Any, as_json: bool, verbose: bool, debug: bool, **kwargs: Any) -> Any:
        from scaleprop.cli.output import command_output

        _log_to_stderr(logging.DEBUG if debug else logging.INFO if verbose else logging.WARNING)
        with command_output(as_json) as emit:
            return command(*args, emit=emit if as_json else None, **kwargs)

    return wrapped


def _log_to_stderr(level: int) -> None:
    """scaleprop's log only: on the root logger, torch's internal traces would come along."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("scaleprop")
    logger.handlers = [handler]
    logger.setLevel(level)


_inputs = click.option(
    "--inputs", metavar="MODULE:FUNCTION", help="Returns example inputs, if MODEL has none.",
)


def _data(command: Command) -> Command:
    command = _inputs(command)
    return click.option(
        "--calibration", metavar="MODULE:FUNCTION",
        help="Returns an iterable of example inputs; or takes the model and runs it.",
    )(command)


def _model(command: Command) -> Command:
    """MODEL, and its inputs."""
    return click.argument("model", metavar="MODEL")(_data(command))


def _one_recipe(command: Command) -> Command:
    command = click.option("--target", help="With --recipe auto: whose formats.")(command)
    return click.option(
        "--recipe", default=_RECIPE, show_default=True,
        help="A name from `scaleprop recipes`, a .toml or .json file, or auto.",
    )(command)


def _decisions(command: Command) -> Command:
    """What decides how a model is compiled, besides the recipe."""
    options = (
        click.option("--backend", default=next(iter(BACKENDS)), show_default=True,
                     help=", ".join(BACKENDS)),
        click.option("--exclude", multiple=True, metavar="PATTERN",
                     help="What stays high: module path, parameter or operator; repeatable."),
        click.option("--include", multiple=True, metavar="PATTERN",
                     help="Quantize only these; repeatable."),
        click.option("-p", "--pass", "passes", multiple=True, metavar="NAME{OPTION=VALUE}",
                     help="One more pass to run, or options of a usual one; repeatable."),
        click.option("--verify", is_flag=True, help="Compare with the reference."),
    )
    for option in reversed(options):
        command = option(command)
    return command


_report = click.option(
    "--report", type=click.Path(path_type=Path), help="Save the report as .html or .json.",
)


def _compile(model: str, inputs: str | None, calibration: str | None, **options: Any) -> Any:
    """The subject that the arguments name, and ``scaleprop.compile`` of it."""
    from scaleprop.api import compile as compile_model
    from scaleprop.cli.models import load_subject

    subject = load_subject(model, inputs)
    return subject, compile_model(
        subject.model, subject.inputs, calibration=_calibration(calibration),
        progress=sys.stderr.isatty(), **options,
    )


def _calibration(spec: str | None) -> Any:
    """The function itself where it takes the model; what it returns where it takes nothing."""
    from scaleprop.cli.models import call, resolve

    if spec is None:
        return None
    function = resolve(spec, "calibration")
    required = [
        parameter for parameter in inspect.signature(function).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    return function if required else call(spec, "calibration")


def _finish(report: Any, files: Sequence[Path], report_path: Path | None, emit: Any) -> None:
    """Save the report where asked, and print it."""
    written = [str(file) for file in files]
    if report_path is not None:
        report.save(report_path)
        written.append(str(report_path))
    if emit:
        emit({"files": written, "report": report.to_dict()})
        return
    report.show()
    for file in written:
        click.echo(f"wrote {file}")


@app.command("compile")
@click.argument("model", metavar="[MODEL]", required=False)
@_data
@click.option("--target", help="With --recipe auto: whose formats.")
@click.option("--recipe", "recipes", multiple=True, default=(_RECIPE,), show_default=True,
              help="A name from `scaleprop recipes`, a .toml or .json file, or auto. Repeatable: "
                   "several are compared.")
@_decisions
@click.option("--from-safetensors", "source", metavar="DIR",
              type=click.Path(path_type=Path, exists=True, file_okay=False),
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
@_report
@common
@click.pass_context
def compile_command(
    context: click.Context, report: Path | None, emit: Any, **options: Any
) -> None:
    """Compile MODEL, and report on every tensor; or by several recipes, side by side.

    A folder whose weights are quantized already is taken as it is, without a recipe.
    """
    from scaleprop.cli.compiling import compile_and_report

    _check_suffix(report)
    options["calibration"] = _calibration(options["calibration"])
    given = [name for name in options if context.get_parameter_source(name) is
             click.core.ParameterSource.COMMANDLINE]  # fmt: skip
    measure = report is not None or emit is not None
    found, files = compile_and_report(given=given, measure=measure, **options)
    _finish(found, files, report, emit)


@app.command("export")
@_model
@_one_recipe
@_decisions
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The .onnx file.")
@_report
@common
def export_command(out: Path, report: Path | None, emit: Any, **options: Any) -> None:
    """Compile MODEL to an ONNX file, checked against the reference."""
    _check_suffix(report)
    if out.suffix != ".onnx":
        raise ConfigError(f"--out {str(out)!r}: an export is a .onnx file")
    _, compiled = _compile(**options)
    _finish(compiled.report, [compiled.export(out)], report, emit)


def _check_suffix(report: Path | None) -> None:
    """Refuse before minutes of work what would be refused after them."""
    if report is not None and report.suffix.lower() not in (".html", ".json"):
        raise ConfigError(f"--report {str(report)!r}: a report is saved as .html or .json")


@app.command("analyze")
@_model
@click.option("--loss", metavar="MODULE:FUNCTION",
              help="Look at a training step: takes MODEL's output, returns the loss; or `output`, "
                   "where MODEL returns it.")
@click.option("--source", is_flag=True,
              help="With --loss: print the model's source with the scales that its lines make.")
@click.option("-p", "--pass", "passes", multiple=True, metavar="NAME{OPTION=VALUE}",
              help="Without --loss: how much easier it makes the activations; repeatable.")
@_report
@common
def analyze_command(
    model: str, inputs: str | None, calibration: str | None, loss: str | None, source: bool,
    passes: tuple[str, ...], report: Path | None, emit: Any,
) -> None:
    """Say what each format would cost MODEL, and where its outliers are. Nothing is changed."""
    from scaleprop.analysis import analyze
    from scaleprop.cli.models import load_subject, resolve

    _check_suffix(report)
    if source and loss is None:
        raise ConfigError("--source shows a training step: add --loss MODULE:FUNCTION")
    subject = load_subject(model, inputs)
    if loss is None:
        found = analyze(subject.model, subject.inputs, calibration=_calibration(calibration),
                        passes=passes)
        _finish(found, [], report, emit)
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
    _finish(scales, [], report, emit)


@app.command("graph")
@_model
@_one_recipe
@_decisions
@click.option("--loss", metavar="MODULE:FUNCTION",
              help="Draw a training step instead: as for analyze.")
@click.option("--training", metavar="RECIPE",
              help="With --loss: what that recipe casts; else RMS of values and gradients.")
@click.option("--block", help="A module's path, or '' for all; else the most typical block.")
@click.option("--depth", type=int, help="Levels of modules drawn operator by operator.")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path),
              help="A .svg file, or .dot for GraphViz.")
@common
def graph_command(emit: Any, **options: Any) -> None:
    """Draw one block of MODEL, with scales on its edges."""
    from scaleprop.cli.graph import draw

    draw(emit=emit, compile_model=_compile, **options)


@app.command("bench")
@_model
@click.option("--recipe", "recipes", multiple=True, default=(_RECIPE,), show_default=True,
              help="Repeatable.")
@_decisions
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

    options["calibration"] = _calibration(calibration)
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
    from scaleprop.cli.listing import recipes, role_text, training_recipes

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
        _print_training_recipes(rows)
        return

    roles = list(dict.fromkeys(role for row in rows for role in row["roles"]))
    print_table(
        ("name", *roles, "description"),
        [(row["name"], *(role_text(row["roles"].get(role)) for role in roles), row["description"])
         for row in rows],
    )


def _print_training_recipes(rows: list[dict[str, Any]]) -> None:
    from scaleprop.cli.listing import operand_text
    from scaleprop.cli.output import print_table
    from scaleprop.recipes.training import OPERANDS

    roles = [role for role in OPERANDS if any(role in row["operands"] for row in rows)]
    print_table(
        ("name", *roles, "description", "source"),
        [(row["name"], *(operand_text(row["operands"].get(role)) for role in roles),
          row["description"], row["source"]) for row in rows])


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
@_inputs
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
