"""Sweeps of a tiny model: what is trained, kept, resumed, shared between processes and refused."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import sqlite3
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import scaleprop
from scaleprop.errors import BackendUnavailable, ConfigError, ScalePropError
from scaleprop.recipes.training import TrainingRecipe
from scaleprop.sweeps import Sweep, linear_gemms, overhead, running
from scaleprop.sweeps.runs import Outcome, Task, perform
from scaleprop.sweeps.settings import Settings
from scaleprop.sweeps.store import Store
from tests.sweep import tiny
from tests.sweep.tiny import BASE, outcomes_in, run

ROOT = Path(__file__).parents[2]
TINY = "tests.sweep.tiny"

@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Sweep]:
    path = tmp_path_factory.mktemp("sweep") / "runs.sqlite"
    return path, run(path, seeds=2, validation=tiny.held_out)


def test_every_combination_is_trained_for_every_seed(found: tuple[Path, Sweep]):
    path, sweep = found
    assert [tuple(point.axes.values()) for point in sweep.points] == [
        ("mxfp8", "none"), ("mxfp8", "head"), ("mxfp4", "none"), ("mxfp4", "head")]
    assert sweep.baseline is not None and sweep.baseline.recipe.name == "bf16"
    for point in (sweep.baseline, *sweep.points):
        assert sorted(point.outcomes) == [0, 1] and point.status(sweep.seeds) == "2 of 2"
        for outcome in point.outcomes.values():
            assert len(outcome.losses) == 4 and outcome.loss == outcome.validation
            assert outcome.seconds_per_step is not None and outcome.seconds_per_step > 0
    assert sweep == Sweep.load(path)


def test_means_and_gaps_are_those_of_the_runs(found: tuple[Path, Sweep]):
    _, sweep = found
    assert sweep.baseline is not None
    base = [sweep.baseline.outcomes[seed].loss for seed in (0, 1)]
    for point in sweep.points:
        losses = [point.outcomes[seed].loss for seed in (0, 1)]
        gaps = [loss - other for loss, other in zip(losses, base, strict=True)]
        assert point.loss.value == pytest.approx(statistics.fmean(losses))
        assert point.loss.error == pytest.approx(abs(losses[0] - losses[1]) / 2)
        assert point.gap.value == pytest.approx(statistics.fmean(gaps))
        assert point.gap.error == pytest.approx(abs(gaps[0] - gaps[1]) / 2)
        assert point.percent == pytest.approx(100 * statistics.fmean(gaps) / statistics.fmean(base))
    assert sweep.baseline.gap.value == 0 and sweep.baseline.cost == 1


def test_a_run_is_the_training_that_it_says(found: tuple[Path, Sweep]):
    """The same loop, written out, with the baseline."""
    _, sweep = found
    torch.manual_seed(1)
    model = tiny.factory()
    scaleprop.prepare_training(model, "bf16", inner="eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _, batch in zip(range(4), tiny.data(1), strict=False):
        optimizer.zero_grad()
        loss = model(*batch)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sweep.baseline is not None
    assert sweep.baseline.outcomes[1].losses == pytest.approx(tuple(losses), rel=1e-6)


def test_finished_runs_are_not_run_again(found: tuple[Path, Sweep], monkeypatch: Any):
    path, sweep = found

    def never(*_: object) -> Outcome:
        raise AssertionError("run again")

    monkeypatch.setattr(running, "perform", never)
    assert run(path, seeds=2, validation=tiny.held_out) == sweep
    # by another name, in another order, fewer of them: still the same runs
    fewer = run(path, seeds=[1], validation=f"{TINY}:held_out", factory=f"{TINY}:factory",
                recipe=BASE.replace(name="other"), axes=dict(reversed(tiny.AXES.items())))
    assert [point.outcomes[1].loss for point in fewer.ranked()] == sorted(
        point.outcomes[1].loss for point in sweep.points)


def test_the_file_is_plain_sqlite_with_a_row_per_run(found: tuple[Path, Sweep]):
    path, _ = found
    run(path, seeds=2, validation=tiny.held_out)
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    rows = connection.execute("SELECT axes, recipe, seed, status, losses FROM runs").fetchall()
    connection.close()
    assert len(rows) == 10 and {row[3] for row in rows} == {"done"}
    for axes, recipe, _, _, losses in rows:
        loaded = TrainingRecipe.from_dict(json.loads(recipe))
        if axes := json.loads(axes):
            assert {each.format for each in loaded.operands.values()} == {axes["*.format"]}
        assert len(json.loads(losses)) == 4


def test_more_seeds_and_values_only_add_runs(tmp_path: Path, monkeypatch: Any):
    path = tmp_path / "runs.sqlite"
    run(path, axes={"*.format": ["mxfp8"]})
    done: list[Task] = []
    perform = running.perform
    monkeypatch.setattr(running, "perform", lambda settings, task, listener=None: (
        done.append(task), perform(settings, task, listener))[1])
    run(path, axes={"*.format": ["mxfp8", "mxfp4"]})
    assert [task.axes for task in done] == [{"*.format": "mxfp4"}]
    run(path, axes={"*.format": ["mxfp8"]}, fresh=True)
    assert len(done) == 3


def test_combinations_that_mean_the_same_are_run_once(monkeypatch: Any):
    done: list[Task] = []
    perform = running.perform
    monkeypatch.setattr(running, "perform", lambda settings, task, listener=None: (
        done.append(task), perform(settings, task, listener))[1])
    axes = {"both": {"one": {"*.format": "mxfp8"}, "two": {"*.format": "mxfp8", "high": ()}}}
    sweep = run(axes=axes, baseline=None)
    assert len(done) == 1 and len(sweep.points) == 2 and sweep.baseline is None
    assert sweep.points[0].outcomes == sweep.points[1].outcomes


def test_a_killed_sweep_loses_only_what_was_running(tmp_path: Path, monkeypatch: Any):
    """SIGKILL in the middle of the third run; the next start does it and the two that are left."""
    path, marks = tmp_path / "runs.sqlite", tmp_path / "marks"
    marks.mkdir()
    monkeypatch.setenv("SWEEP_MARKS", str(marks))
    code = ("from tests.sweep import tiny\n"
            f"tiny.run({str(path)!r}, data=tiny.killed)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          check=False)
    assert done.returncode == -9, done.stderr
    partly = Sweep.load(path)
    kinds = [each.status for point in (partly.baseline, *partly.points) if point
             for each in point.outcomes.values()]
    assert kinds == ["done", "done"]
    assert [point.status([0]) for point in partly.points] == [
        "1 of 1", *["0 of 1, 1 missing"] * 3]
    before = {key: each for key, each in outcomes_in(path).items() if each.status == "done"}
    sweep = run(path, data="tests.sweep.tiny:killed")
    assert {point.status([0]) for point in sweep.points} == {"1 of 1"}
    assert len(list(marks.iterdir())) == 1 + 3 + 1 + 3
    after = outcomes_in(path)
    assert len(after) == 5 and all(after[key] == each for key, each in before.items())
    whole = run(data=tiny.data)
    for point, other in zip(sweep.points, whole.points, strict=True):
        assert point.outcomes[0].losses == other.outcomes[0].losses


def test_an_interruption_gives_back_what_was_claimed(tmp_path: Path, monkeypatch: Any):
    path = tmp_path / "runs.sqlite"
    perform, count = running.perform, iter(range(100))

    def interrupted(settings: Any, task: Task, listener: Any = None) -> Outcome:
        if next(count) == 2:
            raise KeyboardInterrupt
        return perform(settings, task, listener)

    monkeypatch.setattr(running, "perform", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(path)
    assert [each.status for each in outcomes_in(path).values()] == ["done", "done"]
    assert len(run(path).points[-1].outcomes) == 1 and next(count) == 6


def test_failed_runs_are_kept_with_their_error_and_tried_again(tmp_path: Path, monkeypatch: Any):
    path = tmp_path / "runs.sqlite"
    sweep = run(path, optimizer=tiny.broken, axes={})
    (first, second) = sweep.errors()
    assert "RuntimeError: no optimizer today" in first[2] and "in broken" in second[2]
    assert math.isnan(sweep.points[0].gap.value)
    assert sweep.points[0].status([0]) == "0 of 1, 1 failed"
    monkeypatch.setattr(tiny, "broken", lambda model: torch.optim.SGD(model.parameters(), lr=0.1))
    again = run(path, optimizer="tests.sweep.tiny:broken", axes={})
    assert again.errors() == [] and again.points[0].status([0]) == "1 of 1"


def test_training_that_diverges_is_told_apart():
    sweep = run(optimizer=tiny.explosive, axes={})
    assert sweep.points[0].status([0]) == "0 of 1, 1 diverged"
    assert sweep.points[0].loss.value == math.inf and sweep.pareto() == []
    assert "diverged" in sweep.table()


def test_loss_data_optimizer_and_clip_are_the_users():
    plain = run(axes={}, baseline=None)
    twice = run(axes={}, baseline=None, loss=tiny.squared, data=tiny.short)
    first, doubled = plain.points[0].outcomes[0].losses, twice.points[0].outcomes[0].losses
    assert doubled[0] == pytest.approx(2 * first[0]) and len(doubled) == 4
    still = run(axes={}, baseline=None, optimizer=tiny.scheduled).points[0].outcomes[0].losses
    assert still[1] != first[1]
    (held,) = run(axes={}, baseline=None, optimizer=tiny.explosive, clip=1e-33).points
    assert held.outcomes[0].status == "done"
    partial = functools.partial(tiny.sized, 64)
    named = run(axes={}, baseline=None, factory=partial)
    assert named.settings["factory"] == f"{TINY}:sized(64)"


def test_costs_may_be_of_other_shapes():
    shapes = [(4096, 1024, 2048), (4096, 2048, 1024)]
    (point,) = run(axes={}, baseline=None, shapes=shapes).points
    gemms = [gemm for place, shape in enumerate(shapes)
             for gemm in linear_gemms(*shape, f"layer {place}")]
    assert point.overhead == overhead(BASE, gemms)
    (own,) = run(axes={}, baseline=None).points
    assert own.overhead is not None and own.cost > 1 > point.cost


def test_random_numbers_of_the_caller_stay():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run(axes={}, baseline=None)
    assert torch.equal(torch.rand(3), expected)


def test_what_is_no_recipe_is_listed(tmp_path: Path):
    path = tmp_path / "runs.sqlite"
    axes = {"wgrad.x.hadamard": [0, 16]}
    sweep = run(path, axes=axes)
    ((skipped, reason),) = sweep.skipped
    assert skipped == {"wgrad.x.hadamard": "16"} and "rotated differently" in reason
    assert reason in sweep.table() and len(sweep.points) == 1
    assert Sweep.load(path).skipped == sweep.skipped


def test_two_processes_share_the_runs(tmp_path: Path):
    path = tmp_path / "runs.sqlite"
    code = ("from tests.sweep import tiny; from scaleprop.sweeps import running\n"
            "from scaleprop.sweeps.runs import Outcome; import time; done = []\n"
            "def counted(settings, task, listener=None):\n"
            "    done.append(task.key); time.sleep(0.1)\n"
            "    return Outcome('done', (1.0,), None, 0.1)\n"
            "running.perform, running.gemms_of = counted, lambda *_: ()\n"
            f"tiny.run({str(path)!r}, axes={{}}, seeds=20)\n"
            "print(*done)")
    both = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE,
                             text=True) for _ in range(2)]
    keys = [process.communicate(timeout=100)[0].split() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert len(keys[0]) + len(keys[1]) == len({*keys[0], *keys[1]}) == 40
    assert {each.status for each in outcomes_in(path).values()} == {"done"}


def test_jobs_are_processes_that_give_the_same(found: tuple[Path, Sweep]):
    pytest.importorskip("joblib")
    apart = run(jobs=2, axes={"*.format": ["mxfp4"], "high": [()]}, validation=f"{TINY}:held_out")
    _, sweep = found
    for point, other in ((apart.baseline, sweep.baseline), (apart.points[0], sweep.points[2])):
        assert point is not None and other is not None
        assert point.recipe.operands == other.recipe.operands
        assert point.outcomes[0].losses == pytest.approx(other.outcomes[0].losses)


def test_backends_that_give_all_results_at_once_work_in_waves(tmp_path: Path, monkeypatch: Any):
    """Ray's is one of those. What a wave has done is kept, and only then the next one claimed."""
    joblib = pytest.importorskip("joblib")

    class Together(joblib.parallel.BACKENDS["loky"]):
        supports_return_generator = False

    joblib.register_parallel_backend("together", Together)
    stored: list[list[str]] = []
    claim = Store.claim

    def claimed(self: Store, task: Task) -> bool:
        stored.append(sorted(each.status for each in self.outcomes().values()))
        return claim(self, task)

    monkeypatch.setattr(Store, "claim", claimed)
    try:
        with joblib.parallel_config("together"):
            sweep = run(tmp_path / "x.sqlite", jobs=2, axes={"*.format": ["mxfp4"]}, seeds=2)
    finally:
        joblib.parallel.BACKENDS.pop("together")
    assert [point.status(sweep.seeds) for point in sweep.points] == ["2 of 2"]
    assert stored[:4] == [[], ["running"], ["done"] * 2, ["done", "done", "running"]]


def test_a_process_has_its_share_of_threads(monkeypatch: Any):
    given: list[int] = []
    monkeypatch.setattr("scaleprop._torch_compat.use_threads", given.append)
    settings = Settings(factory=tiny.factory, data=tiny.data, steps=1, options=tiny.FAST)
    for threads, expected in ((None, []), (3, [3])):
        task = Task("k", {}, BASE, 0, threads)
        assert perform(settings, task).status == "done" and given == expected


def test_what_a_model_prints_in_a_process_is_not_in_the_output(capsys: Any):
    def talking() -> torch.nn.Module:
        print("made")  # noqa: T201
        return tiny.factory()

    settings = Settings(factory=talking, data=tiny.data, steps=1, options=tiny.FAST)
    _, outcome = running._performed(settings, Task("k", {}, BASE, 0))
    assert outcome.status == "done" and capsys.readouterr() == ("", "made\n")


def test_threads_and_nonsense_are_no_processes(monkeypatch: Any):
    joblib = pytest.importorskip("joblib")
    with joblib.parallel_config("threading"), pytest.raises(ConfigError, match="runs threads"):
        run(jobs=2)
    for jobs in (0, "two", 1.5):
        with pytest.raises(ConfigError, match="a number of processes"):
            run(jobs=jobs)
    monkeypatch.setattr(joblib, "cpu_count", lambda: 12)
    monkeypatch.setattr(joblib, "effective_n_jobs", lambda jobs: jobs)
    assert running._threads(5) == 2 and running._threads(20) == 1 and running._threads(1) is None


def test_without_joblib_several_processes_are_refused(monkeypatch: Any):
    monkeypatch.setitem(sys.modules, "joblib", None)
    with pytest.raises(BackendUnavailable, match=r'pip install "scaleprop\[sweep\]", or jobs=1'):
        run(jobs=2)


def test_a_process_that_dies_has_a_name(monkeypatch: Any):
    pytest.importorskip("joblib")
    from concurrent.futures import BrokenExecutor

    class Parallel:
        def __init__(self, **_: object) -> None: ...

        def __call__(self, tasks: Any) -> Any:
            next(iter(tasks))
            raise BrokenExecutor("killed")

    monkeypatch.setattr("joblib.Parallel", Parallel)
    with pytest.raises(ScalePropError, match=r"a process of the sweep died: killed.*fewer jobs"):
        run(jobs=2)


@pytest.mark.parametrize(("changes", "message"), [
    ({"seeds": 0}, "seeds=0"), ({"seeds": [1, 1]}, "seeds="), ({"seeds": "x"}, "seeds="),
    ({"steps": 0}, "steps=0"), ({"learning_rate": -1.0}, "learning_rate"),
    ({"learning_rate": "x"}, "learning_rate"), ({"clip": 0}, "clip=0"),
    ({"factory": 3}, "factory=3 is no function"), ({"factory": None}, "a sweep needs factory"),
    ({"factory": "tests.sweep.tiny.factory"}, "expected module:function"),
    ({"factory": "tests.sweep.tiny:nothing"}, "'tests.sweep.tiny' has no 'nothing'"),
    ({"factory": "no_such:thing"}, "cannot import 'no_such'"),
    ({"factory": "tests.sweep.tiny:AXES"}, "dict is no function"),
    ({"factory": lambda: 3}, "returned int, not a torch.nn.Module"),
    ({"data": lambda seed: 3}, "returned int; it takes a seed"),
    ({"data": lambda seed: iter(())}, "data ended after 0 of 4 batches"),
    ({"loss": lambda model, batch: batch[0]}, "the loss is a tensor of .*, not one number"),
    ({"recipe": "nvfp5"}, "unknown training recipe 'nvfp5'"),
    ({"baseline": "bf61"}, "unknown training recipe 'bf61'"),
    ({"axes": {"fprop.q": [1]}}, "nothing of a recipe is called"), ({"axes": [1]}, "axes="),
    ({"options": {"inner": {1}}}, "options="), ({"shapes": [(1, 2)]}, r"\(1, 2\) is not"),
    ({"options": {"innr": "eager"}}, r"'innr'.*known: inner, exponents, seed, dynamic, fullgraph"),
    ({"options": {"recipe": "fp8"}}, "prepare_training takes; known: inner"),
    ({"options": "eager"}, "options='eager'"), ({"seeds": 1.5}, "seeds=1.5"),
    ({"shapes": [(0, 1, 1)]}, "at least 1"), ({"shapes": [3]}, "shapes: 3 is not"),
    ({"shapes": 3}, "shapes: 3 is not a list"),
    ({"factory": "tests.sweep.tiny:unmade"}, "RuntimeError: no model today. Remedy"),
    ({"data": lambda seed: [(torch.zeros(2, 3), torch.zeros(2, 3))]}, "no step can be made"),
])
def test_arguments_that_make_no_sense(changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        run(**changes)


def test_functions_without_a_name_cannot_be_resumed(tmp_path: Path):
    def inner() -> torch.nn.Module:
        return tiny.factory()

    for nameless in (inner, lambda: tiny.factory(), functools.partial(tiny.sized, object()),
                     tiny.Model().children):
        with pytest.raises(ConfigError, match="Remedy"):
            run(tmp_path / "runs.sqlite", factory=nameless)
    assert len(run(axes={}, factory=inner).points) == 1


@pytest.mark.parametrize(("command", "name"), [
    (["model.py"], "model:factory"), (["-m", "package.model"], "package.model:factory")])
def test_scripts_are_called_by_their_names(command: list[str], name: str, tmp_path: Path):
    code = ("from scaleprop.sweeps.settings import name_of\ndef factory(): ...\n"
            "print(name_of(factory, 'factory'))")
    (tmp_path / "package").mkdir()
    for path in ("model.py", "package/model.py"):
        (tmp_path / path).write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True,
                          check=True, env=environment)
    assert done.stdout.strip() == name


def test_data_that_end_fail_the_run():
    sweep = run(axes={}, baseline=None, data=tiny.ended)
    assert "data ended after 2 of 4 batches" in sweep.errors()[0][2]
    sweep = run(axes={}, baseline=None, validation=list)
    assert "validation returned no batch" in sweep.errors()[0][2]


def test_validation_is_of_the_trained_model_without_its_dropout():
    """Of a learning rate of zero, the loss of the first weights; dropout would make it another."""
    sweep = run(axes={}, baseline=None, recipe="fp32", factory=tiny.dropping,
                optimizer=tiny.standing, validation=tiny.held_out)
    torch.manual_seed(0)
    model = tiny.dropping().eval()
    expected = statistics.fmean(float(model(*batch).detach()) for batch in tiny.held_out())
    assert sweep.points[0].loss.value == pytest.approx(expected, rel=1e-6)


def test_settings_are_frozen():
    assert dataclasses.is_dataclass(Sweep) and Sweep.__hash__ is not None
