"""``scaleprop.sweep``: train every combination, in as many processes as are asked for."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import itertools
import os
import pickle
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from scaleprop.errors import BackendUnavailable, ConfigError, ScalePropError
from scaleprop.extras import install_command
from scaleprop.recipes.training import TrainingRecipe
from scaleprop.recipes.training_named import training_recipe
from scaleprop.sweeps.axes import Axes, Combination, combinations
from scaleprop.sweeps.overhead import Gemm, linear_gemms, overhead
from scaleprop.sweeps.progress import Watch, watching
from scaleprop.sweeps.results import Sweep
from scaleprop.sweeps.runs import Outcome, Task, perform
from scaleprop.sweeps.settings import Function, Settings, name_of
from scaleprop.sweeps.shapes import gemms_of
from scaleprop.sweeps.store import Store, key_of


def sweep(
    factory: Function,
    data: Function,
    recipe: str | TrainingRecipe,
    axes: Axes,
    *,
    baseline: str | TrainingRecipe | None = "bf16",
    seeds: int | Sequence[int] = 1,
    steps: int = 200,
    learning_rate: float = 1e-3,
    optimizer: Function | None = None,
    loss: Function | None = None,
    validation: Function | None = None,
    clip: float | None = None,
    options: Mapping[str, Any] | None = None,
    shapes: Sequence[tuple[int, int, int]] | None = None,
    path: str | os.PathLike[str] | None = "sweep.sqlite",
    fresh: bool = False,
    jobs: int | None = 1,
    progress: bool = True,
) -> Sweep:
    """Train a model by every combination of changes to a recipe, and compare them.

    Runs are kept in a file as they finish. Called again, after an interruption or with more seeds
    or values, only what is missing is run; failed runs are tried again. Several processes may run
    the same sweep at once and share the work. Runs that are in progress elsewhere are not waited
    for: they are missing from the result.

    Args:
        factory: returns a new model; functions may be given as ``"module:function"``.
        data: takes a seed, returns batches: an iterator of as many as ``steps``, or something that
            can start anew. ``model(*batch)`` is called for tuples and lists, ``model(**batch)`` for
            mappings, else ``model(batch)``.
        recipe: what is changed, or its name.
        axes: key → values, see ``scaleprop.sweeps.axes``.
        baseline: the recipe that gaps are measured from, seed by seed.
        seeds: of weights, data and rounding; how many, or which.
        learning_rate: of AdamW, unless there is an ``optimizer``.
        optimizer: takes the model, returns an optimizer, or an optimizer and a schedule that is
            stepped with it.
        loss: takes the model and a batch, returns the loss; without it the model returns it, or
            something with a ``loss``.
        validation: returns batches whose mean loss, at the end, is what is compared; without it,
            the mean of the last tenth of training.
        clip: the largest norm of all gradients.
        options: more of ``prepare_training``, such as ``{"inner": "eager"}``.
        shapes: (tokens, outputs, inputs) of linear layers that costs are counted for, such as a
            larger model's, none of which stays high; without them, those of ``factory``'s model.
        path: an SQLite file on a local disk; None keeps nothing.
        fresh: forget the runs that the file has.
        jobs: processes; more than 1, or None for what ``joblib.parallel_config`` says, needs
            joblib, whose backends may be on other machines. Each process has its share of the
            cores.
        progress: show it on standard error, if that is a terminal.

    Raises:
        ConfigError: on axes that make no sense, a file of another sweep, or one that cannot be
            written. Errors of runs are part of the result.
        BackendUnavailable: for several processes without joblib.
        ScalePropError: where a process died, as for lack of memory; finished runs are kept.
    """
    settings = Settings(
        factory=factory, data=data, validation=validation, loss=loss, optimizer=optimizer,
        steps=steps, learning_rate=learning_rate, clip=clip, options=options or {})
    identity = settings.identity() if path is not None else _nameless(settings)
    base = None if baseline is None else training_recipe(baseline)
    grid = combinations(training_recipe(recipe), axes)
    numbers = _seeds(seeds)
    threads = _threads(jobs)
    tasks = _tasks(identity, base, grid, numbers, threads)
    store = Store(path)
    try:
        gemms = (_gemms(settings, numbers[0], [task.recipe for task in tasks])
                 if shapes is None else _given(shapes))
        plan = _plan(base, grid, numbers, gemms, steps)
        store.begin(identity, plan, fresh=fresh)
        known = store.outcomes()
        waiting = sum(task.key not in known or known[task.key].status in ("running", "failed")
                      for task in tasks)
        with store.renewing(), watching(progress, waiting, steps) as watch:
            _run(store, settings, tasks, jobs, watch)
        return Sweep.of(store)
    finally:
        store.close()


def _nameless(settings: Settings) -> dict[str, Any]:
    """The identity of what is kept in memory only, where names need not tell functions apart."""
    kept = {name: name_of(given, name, strict=False)
            for name in ("factory", "data", "validation", "loss", "optimizer")
            if (given := getattr(settings, name)) is not None}
    return dataclasses.replace(settings, **kept).identity()


def _seeds(seeds: int | Sequence[int]) -> list[int]:
    found = list(range(seeds)) if isinstance(seeds, int) else (
        list(seeds) if isinstance(seeds, Sequence) else [])  # pyright: ignore[reportUnnecessaryIsInstance]
    whole = all(isinstance(seed, int) and seed >= 0 for seed in found)  # pyright: ignore[reportUnnecessaryIsInstance]
    if not found or not whole or len(set(found)) < len(found):
        raise ConfigError(f"seeds={seeds!r}: how many, at least 1, or different whole numbers")
    return found


def _tasks(
    identity: Mapping[str, Any], baseline: TrainingRecipe | None, grid: Sequence[Combination],
    seeds: Sequence[int], threads: int | None,
) -> list[Task]:
    """Every run once, the whole grid for the first seed before the next."""
    wanted: list[tuple[Mapping[str, str], TrainingRecipe]] = [
        ({}, baseline)] if baseline is not None else []
    wanted += [(each.axes, each.recipe) for each in grid if each.recipe is not None]
    found: dict[str, Task] = {}
    for seed, (axes, recipe) in itertools.product(seeds, wanted):
        key = key_of(identity, recipe, seed)
        found.setdefault(key, Task(key, axes, recipe, seed, threads))
    return list(found.values())


def _gemms(settings: Settings, seed: int, recipes: Sequence[TrainingRecipe]) -> tuple[Gemm, ...]:
    """The products of a step, read off a model that is thrown away.

    Raises:
        ConfigError: where the model or its data cannot be made, or do not fit each other.
    """
    rules = {rule for recipe in recipes for rule in recipe.high}
    try:
        with torch.random.fork_rng():
            batch = next(settings.batches(seed))
            return gemms_of(settings.model(seed), lambda model: settings.loss_of(model, batch),
                            rules)
    except ScalePropError:
        raise
    except Exception as error:
        raise ConfigError(f"no step can be made to be counted, {type(error).__name__}: {error}. "
                          "Remedy: a factory and data that train without scaleprop, too") from error


def _given(shapes: Sequence[tuple[int, int, int]]) -> list[Gemm]:
    """The products of layers of these shapes.

    Raises:
        ConfigError: for what is no shape.
    """
    found: list[Gemm] = []
    if not isinstance(shapes, Sequence):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(f"shapes: {shapes!r} is not a list of (tokens, outputs, inputs)")
    for place, shape in enumerate(shapes):
        sizes = list(shape) if isinstance(shape, Sequence) else []  # pyright: ignore[reportUnnecessaryIsInstance]
        if len(sizes) != 3 or not all(isinstance(size, int) for size in sizes):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigError(f"shapes: {shape!r} is not (tokens, outputs, inputs)")
        tokens, outputs, inputs = sizes
        found.extend(linear_gemms(tokens, outputs, inputs, f"layer {place}"))
    return found


def _plan(
    baseline: TrainingRecipe | None, grid: Sequence[Combination], seeds: Sequence[int],
    gemms: Sequence[Gemm], steps: int,
) -> dict[str, Any]:
    """The grid as plain data."""

    def entry(axes: Mapping[str, str], recipe: TrainingRecipe | None, reason: str) -> Any:
        cost = None if recipe is None or not gemms else overhead(recipe, gemms, steps=steps)
        return {"axes": dict(axes), "reason": reason,
                "recipe": None if recipe is None else recipe.to_dict(),
                "overhead": None if cost is None else dataclasses.asdict(cost)}

    return {"seeds": list(seeds),
            "baseline": None if baseline is None else entry({}, baseline, ""),
            "combinations": [entry(each.axes, each.recipe, each.reason) for each in grid]}


def _threads(jobs: int | None) -> int | None:
    """Of each process, so that all together have as many as there are cores; None in this one.

    Raises:
        ConfigError: for a number of processes that is none, or threads instead of processes.
        BackendUnavailable: without joblib.
    """
    if jobs == 1:
        return None
    if jobs == 0 or (jobs is not None and not isinstance(jobs, int)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(f"jobs={jobs!r}: a number of processes, -1 for as many as cores")
    joblib = _joblib()
    backend, _ = joblib.parallel.get_active_backend()
    if getattr(backend, "supports_sharedmem", False):
        raise ConfigError(f"joblib's backend {type(backend).__name__} runs threads, which share "
                          "torch's random numbers. Remedy: a backend of processes, such as loky")
    return max(1, joblib.cpu_count() // joblib.effective_n_jobs(jobs))


def _joblib() -> Any:
    try:
        import joblib
    except ImportError as error:
        raise BackendUnavailable(
            f"several processes need joblib: {install_command('joblib')}, or jobs=1") from error
    return joblib


def _run(
    store: Store, settings: Settings, tasks: Sequence[Task], jobs: int | None, watch: Watch
) -> None:
    """Run what nobody has; then again what others have left meanwhile."""
    tried: set[str] = set()

    def claimed() -> Iterator[Task]:
        for task in tasks:
            if task.key not in tried and store.claim(task):
                tried.add(task.key)
                yield task

    results = _here if jobs == 1 else _elsewhere(jobs)
    count = -1
    while count < len(tried):
        count = len(tried)
        for task, outcome in results(settings, claimed(), watch):
            store.finish(task.key, outcome)
            watch.finished(task, outcome)


Results = Iterator[tuple[Task, Outcome]]


def _here(settings: Settings, tasks: Iterable[Task], watch: Watch) -> Results:
    for task in tasks:
        def listen(steps: int, loss: float, task: Task = task) -> None:
            watch.step(task, steps, loss)

        yield task, perform(settings, task, listen)


def _performed(settings: Settings, task: Task) -> tuple[Task, Outcome]:
    """In another process, whose standard output is ours: no place for what models print."""
    with contextlib.redirect_stdout(sys.stderr):
        return task, perform(settings, task)


def _in_waves(joblib: Any, jobs: int | None, calls: Iterator[Any]) -> Results:
    """For backends that give all results at once, as Ray's: as many runs as there are processes,
    kept before the next are claimed."""
    with joblib.Parallel(n_jobs=jobs, batch_size=1, pre_dispatch="all") as parallel:
        while wave := list(itertools.islice(calls, joblib.effective_n_jobs(jobs))):
            yield from parallel(wave)


def _elsewhere(jobs: int | None) -> Callable[[Settings, Iterable[Task], Watch], Results]:
    joblib = _joblib()

    def results(settings: Settings, tasks: Iterable[Task], watch: Watch) -> Results:
        calls = (joblib.delayed(_performed)(settings, task) for task in tasks)
        backend, _ = joblib.parallel.get_active_backend()
        try:
            if backend.supports_return_generator:
                # as many as there are processes: what is claimed, runs
                yield from joblib.Parallel(n_jobs=jobs, return_as="generator_unordered",
                                           batch_size=1, pre_dispatch="n_jobs")(calls)
            else:
                yield from _in_waves(joblib, jobs, calls)
        except concurrent.futures.BrokenExecutor as error:
            raise ScalePropError(
                f"a process of the sweep died: {error} Finished runs are kept. Remedy: fewer jobs, "
                "if it was for lack of memory; functions that it can import, if they were not "
                "found") from error
        except pickle.PicklingError as error:
            raise ConfigError(f"cannot be sent to another process: {error}. Remedy: functions of "
                              "modules, or 'module:function'") from error

    return results
