"""Sweeps: plans, runs in this process, and tables; an interrupted one is in `tests/faults`."""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_prompts.cli import commands
from lightning_prompts.errors import UserError
from lightning_prompts.runs import launcher, on_ray
from lightning_prompts.runs.launcher import RunSpec, launch, words
from lightning_prompts.runs.spaces import variants
from lightning_prompts.runs.sweep import SweepConfig, SweepPlan, make_plan, read_plan
from lightning_prompts.runs.sweep_command import _plan, _split, parser
from lightning_prompts.runs.tables import check_metric, long_table, mixture_tasks, ranked, side_by_side
from support.project import ROOT
from support.sweeps import DATA, write_methods


@pytest.fixture
def methods(tmp_path: Path) -> Path:
    """Two methods that run in a second."""
    write_methods(tmp_path)
    return tmp_path


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The commands of a sweep's runs, which write results at once and train nothing: folder, subcommand, checkpoint."""
    given: list[str] = []

    def execute(words: list[str]) -> None:
        options = dict(itertools.pairwise(words))
        folder = Path(options.get("--trainer.default_root_dir") or Path(options["-c"]).parent)
        given.append(f"{folder.parent.name}/{folder.name} {words[0]} {options.get('--ckpt_path', '')}".strip())
        folder.mkdir(parents=True, exist_ok=True)
        for subcommand, name, file in (("validate", "val", "validation"), ("test", "test", "metrics")):
            if words[0] == subcommand:
                metrics = {f"{name}/nll": len(given), f"{name}/exact_match": 0.5, f"{name}/examples": 9}
                (folder / f"{file}.json").write_text(json.dumps(metrics))

    monkeypatch.setattr(launcher, "execute_here", execute)
    return given


def plan(folder: Path, text: str) -> SweepPlan:
    path = folder / "sweep.yaml"
    path.write_text(text.replace("DIR", str(folder)) + f"\nfolder: {folder / 'runs'}\n")
    return read_plan(path)


def options(run: RunSpec) -> dict[str, str]:
    return dict(word.removeprefix("--").split("=", 1) for word in words(run.settings))


def test_methods_tasks_settings_and_seeds_are_combined(methods: Path) -> None:
    (methods / "sums.yaml").write_text("data: {class_path: Addition}\n")
    (methods / "words.yaml").write_text("data: {class_path: Antonyms}\n")
    made = plan(
        methods,
        "methods: [DIR/few.yaml, {config: DIR/soft.yaml, settings: {model.length: [1, 2], model.init: Zeros}}]\n"
        "tasks: [DIR/sums.yaml, DIR/w*.yaml]\nseeds: [5, 7]\nsettings: {data.batch_size: [8]}\n"
        "options: {trainer.max_steps: 3, data.chat: true}\nmetric: test/nll",
    )
    names = ["few-batch_size=8", "soft-batch_size=8,length=1", "soft-batch_size=8,length=2"]
    assert set(made.runs) == {(task, name) for task in ("sums", "words") for name in names}
    assert {Path(run.folder).relative_to(methods / "runs") for group in made.runs.values() for run in group} == {
        Path(task, name, f"seed-{seed}") for task in ("sums", "words") for name in names for seed in (5, 7)
    }
    run = made.runs["words", "soft-batch_size=8,length=2"][1]
    assert run.seed == 7
    assert [Path(config).name for config in run.configs] == ["soft.yaml", "words.yaml"]
    assert options(run) == {
        "trainer.max_steps": "3",
        "data.chat": "true",
        "data.batch_size": "8",
        "model.length": "2",
        "model.init": "Zeros",
        "trainer.enable_progress_bar": "false",
    }
    assert not run.validate
    assert "model.init" not in options(made.runs["sums", "few-batch_size=8"][0])


def test_draws_lie_in_their_spaces_and_stay_when_more_are_wanted(methods: Path) -> None:
    text = (
        "methods: [{config: DIR/soft.yaml, settings: {model.length: [1, 2], model.a: {loguniform: [1e-4, 1e-1]}, "
        "model.b: {uniform: [2, 3]}, model.c: {randint: [5, 9]}, model.d: {choice: [x, y]}}}]\nseeds: 0\nsamples: "
    )
    few, many = plan(methods, text + "2"), plan(methods, text + "40")
    assert set(few.runs) < set(many.runs)
    assert len(few.runs) == 4
    assert len(many.runs) == 80
    drawn = [options(group[0]) for group in many.runs.values()]
    for key, inside in (
        ("a", lambda value: 1e-4 <= float(value) <= 1e-1),
        ("b", lambda value: 2 <= float(value) <= 3),
        ("c", lambda value: int(value) in range(5, 9)),
        ("d", lambda value: value in "xy"),
    ):
        values = {each[f"model.{key}"] for each in drawn}
        assert all(map(inside, values))
        assert len(values) == {"a": 40, "b": 40, "c": 4, "d": 2}[key]
    logs = [float(each["model.a"]) < 10**-2.5 for each in drawn]
    assert 0.25 < statistics.mean(logs) < 0.75, "half of them, as on a logarithmic scale"


def test_names_differ_wherever_settings_do(methods: Path) -> None:
    settings = {
        "model.init": [{"class_path": "FromText", "init_args": {"text": text}} for text in ("a", "b")] + ["a/b", "a b"],
        "model.text": ["x" * 100, "x" * 99 + "y"],
    }
    made = plan(methods, f"methods: [{{config: DIR/soft.yaml, settings: {json.dumps(settings)}}}]\nseeds: [0]")
    assert len(made.runs) == 8
    for _, name in made.runs:
        assert len(name) < 110
        assert "/" not in name
    listed = plan(methods, "methods: DIR/soft.yaml\nsettings: [{model.length: 1}, {model.length: 2, data.seed: 3}]")
    assert [name for _, name in listed.runs] == ["soft-length=1", "soft-length=2,seed=3"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("methods: [DIR/soft.yaml]\nseedz: [0]", "unknown key 'seedz'; did you mean seeds"),
        ("seeds: [0]", "methods is missing"),
        ("methods: []", "methods must be a list of files, got []"),
        ("methods: [DIR/nowhere.yaml]", "nowhere.yaml does not exist"),
        ("methods: [DIR/*.nothing]", "*.nothing does not exist"),
        ("methods: [DIR/soft.yaml]\ntasks: [DIR/no.yaml]", "tasks: DIR/no.yaml does not exist"),
        ("methods: [DIR/task.yaml]", "task.yaml names no method"),
        ("methods: [DIR/broken.yaml]", "broken.yaml line 3 is not valid YAML"),
        ("methods: [{file: DIR/soft.yaml}]", "expected a file or {config: FILE"),
        ("methods: [{config: DIR/soft.yaml, setings: {}}]", "unknown key 'setings'; did you mean settings?"),
        ("methods: [DIR/soft.yaml, DIR/soft.yaml]", "several are called 'soft'"),
        ("methods: [{config: DIR/soft.yaml, name: a/b}]", "name 'a/b' must be one word"),
        ("methods: [DIR/soft.yaml]\nsettings: {model.length: []}", "model.length is an empty list"),
        ("methods: [DIR/soft.yaml]\nsettings: []", "settings is an empty list"),
        ("methods: [DIR/soft.yaml]\nsettings: 3", "settings must be a mapping"),
        ("methods: [DIR/soft.yaml]\nsettings: {x: {uniform: [0, 1]}}", "x is drawn; say how many times with samples"),
        ("methods: [DIR/soft.yaml]\nsamples: 2\nsettings: {x: {uniform: [1, 0]}}", "uniform needs LOW below HIGH"),
        ("methods: [DIR/soft.yaml]\nsamples: 2\nsettings: {x: {loguniform: [0, 1]}}", "and above 0"),
        ("methods: [DIR/soft.yaml]\nsamples: 2\nsettings: {x: {uniform: [1]}}", "uniform needs [LOW, HIGH]"),
        ("methods: [DIR/soft.yaml]\nsamples: 2\nsettings: {x: {uniform: [a, b]}}", "'a' is not a number"),
        ("methods: [DIR/soft.yaml]\nsettings: {x: {unifrom: [0, 1]}}", "'unifrom'; did you mean uniform?"),
        ("methods: [DIR/soft.yaml]\nseeds: [a]", "seeds must be a list of whole numbers, got 'a'"),
        ("methods: [DIR/soft.yaml]\nseeds: [1, 1]", "names a seed twice"),
        ("methods: [DIR/soft.yaml]\nmode: best", "mode: 'best' is not one of min, max"),
        ("methods: [DIR/soft.yaml]\nsamples: 0", "samples must be a whole number of at least 1, got 0"),
        ("methods: [DIR/soft.yaml]\ncpus: .nan", "cpus must be a finite number"),
        ("methods: [DIR/soft.yaml]\ntime_limit: soon", "time_limit must be a number, got 'soon'"),
        ("methods: [DIR/soft.yaml]\noptions: [a]", "options must be a mapping"),
        ("[]", "must be a mapping with the key methods"),
        ("methods: [DIR/soft.yaml]\ntasks: [DIR/task.yaml, DIR/again/task.yaml]", "would both be called task/soft;"),
        (
            "methods: [DIR/soft.yaml]\nsettings: {model.init: [{class_path: Zeros}, {class_path: a.Zeros}]}",
            "init=Zeros",
        ),
        ("methods: [DIR/soft.yaml]\nsettings: {seed_everything: [0, 1]}", "the sweep sets seed_everything itself"),
        ("methods: [DIR/soft.yaml]\noptions: {trainer.default_root_dir: x}", "the sweep sets trainer.default_root_dir"),
        ("methods: [DIR/soft.yaml]\nseeds: [-1]", "seeds: -1 must be at least 0"),
        ("methods: [DIR/soft.yaml]\nsamples: 2\nsettings: {x: {uniform: [0, .inf]}}", "inf is not finite"),
        ("methods: [DIR/soft.yaml]\nsamples: 2\nsettings: {x: {randint: [1, 1.5]}}", "randint needs LOW below HIGH"),
        ("methods: [DIR/soft.yaml]\nsettings: {x: [2020-01-01]}", "x: [datetime.date(2020, 1, 1)] is no value"),
        ("methods: [DIR/soft.yaml]\noptions: {x: 2020-01-01}", "options: x: datetime.date(2020, 1, 1) is no value"),
        ("methods: [DIR/soft.yaml]\nfolder: DIR/soft.yaml", "soft.yaml is a file; give another folder"),
    ],
)
def test_what_is_wrong_with_a_file_is_told_in_one_line(
    text: str, told: str, methods: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (methods / "task.yaml").write_text(DATA)
    (methods / "again").mkdir()
    (methods / "again" / "task.yaml").write_text(DATA)
    (methods / "broken.yaml").write_text("model:\n  a: [\n")
    path = methods / "sweep.yaml"
    path.write_text(text.replace("DIR", str(methods)))
    assert commands.run(["sweep", "-c", str(path)]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert told.replace("DIR", str(methods)) in err
    assert not (methods / "runs").exists()


def test_own_methods_are_trained_unless_they_have_nothing_to_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(
        "from lightning_prompts.methods import Ape, FewShot\n\n\n"
        "class Fixed(FewShot):\n    pass\n\n\nclass Trained(Ape):\n    pass\n\n\nclass ChainOfThought(Ape):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name, expected in (
        ("FewShot", False),
        ("lightning_prompts.methods.FewShot", False),
        ("Ape", True),
        ("mine.Fixed", False),
        ("mine.Trained", True),
        ("mine.ChainOfThought", True),
        ("mine.Nothing", True),
        ("not.there", True),
    ):
        (tmp_path / "config.yaml").write_text(f"model: {{class_path: {name}}}\n")
        assert RunSpec("x", (str(tmp_path / "config.yaml"),)).trains == expected, name
        assert RunSpec("x", settings={"model": name}).trains == expected, name


def test_no_ray_and_no_file(methods: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.run(["sweep", "-c", str(methods / "no.yaml")]) == 1
    assert capsys.readouterr().err == f"error: {methods / 'no.yaml'} does not exist\n"
    program = (
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == sys.argv[1]: raise ModuleNotFoundError('No module', name=name)\n"
        "sys.meta_path.insert(0, Missing())\n"
        "from lightning_prompts.cli import commands\n"
        "sys.exit(commands.run(['sweep', sys.argv[2], '--workers', '2', '--folder', sys.argv[3]]))\n"
    )
    for package in ("ray", "pandas"):  # the second is one that Ray itself does without, and its Tune does not
        done = subprocess.run(
            [sys.executable, "-c", program, package, str(methods / "soft.yaml"), str(methods / "runs")],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            check=False,
        )
        assert done.returncode == 1
        assert done.stderr == (
            f"error: several workers need Ray Tune: {package} is not installed; install it with: {on_ray.INSTALL}, or "
            "leave out workers and --address\n"
        )


def test_every_sweep_of_the_project_is_planned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    shown = (ROOT / "docs" / "sweeps.md").read_text().partition("```yaml\nmethods:")[2].partition("```")[0]
    (tmp_path / "shown.yaml").write_text(f"methods:{shown}")
    paths = [*(ROOT / "experiments" / "sweep").glob("*.yaml"), tmp_path / "shown.yaml"]
    assert len(paths) > 1
    for path in paths:
        made = read_plan(path, {"folder": str(tmp_path / "runs")})
        assert len(made.runs) > 2


def test_the_table_is_sorted_and_tells_of_failures() -> None:
    rest = {"test/exact_match": [0.5], "test/examples": [9.0], "seconds": [1.0], "budget/tokens": [2.0]}
    found = {
        ("b", "x"): {"test/nll": [1.0], "val/nll": [3.0], **rest},
        ("b", "y"): {"test/nll": [2.0], "val/nll": [2.0], **rest},
        ("a", "x"): {"test/nll": [9.0], "val/nll": [float("nan")], **rest},
        ("a", "z"): {"test/nll": [8.0], **rest},
        ("a", "y"): {"test/nll": [7.0], "val/nll": [1.0], **rest},
    }
    ordered = list(ranked(found, "val/nll", "min"))
    assert ordered == [("b", "y"), ("b", "x"), ("a", "y"), ("a", "x"), ("a", "z")]
    assert list(ranked(found, "test/nll", "max"))[:2] == [("b", "y"), ("b", "x")]
    with pytest.raises(UserError, match="no run has the metric 'val/nl'; did you mean val/nll"):
        check_metric(found, "val/nl")
    assert set(ranked(found, "val/nl", "min")) == set(found), "the table does without"
    lines = long_table(found, {("a", "y"): ["seed 1: a | b"]}, "val/nll")
    assert lines[0].endswith("| training tokens | val/nll |")
    assert lines[2] == "| b / x | 1.000 | 0.500 | 9 | 1 | 2 | 3.000 |"
    assert lines[-1] == "| a / y | seed 1: a \\| b |  |  |  |  |  |"
    assert {line.replace("\\|", "").count("|") for line in lines} == {8}


def test_runs_without_nll_stay_in_the_tables() -> None:
    """Free text behind a server that tells no log-probabilities."""
    rest = {"seconds": [1.0], "budget/tokens": [2.0]}
    silent = {
        "test/exact_match": [0.5],
        "test/examples": [9.0],
        "test/far/exact_match": [0.25],
        "test/far/examples": [3.0],
        **rest,
    }
    spoken = {"test/nll": [1.0], "val/nll": [2.0], "test/exact_match": [0.75], "test/examples": [9.0], **rest}
    found = {("a", "x"): silent, ("a", "y"): spoken, ("b", "x"): silent}
    ordered = ranked(found, "val/nll", "min")
    assert list(ordered) == [("a", "y"), ("a", "x"), ("b", "x")]
    assert long_table(ordered, metric="val/nll")[2:] == [
        "| a / y | 1.000 | 0.750 | 9 | 1 | 2 | 2.000 |",
        "| a / x | - | 0.500 | 9 | 1 | 2 | - |",
        "| a / x / far | - | 0.250 | 3 | 1 | 2 |  |",
        "| b / x | - | 0.500 | 9 | 1 | 2 | - |",
        "| b / x / far | - | 0.250 | 3 | 1 | 2 |  |",
    ]
    assert side_by_side(found, "nll", ())[2:] == ["| x | - | - |", "| y | 1.00 | - |"]
    assert side_by_side(found, "exact_match", ())[2:] == ["| x | 0.50 → 0.25 | 0.50 → 0.25 |", "| y | 0.75 | - |"]


def test_mixtures_are_known_by_short_and_full_names(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("short.yaml", "full.yaml", "other.yaml")]
    for path, kind in zip(paths, ("Mixture", "lightning_prompts.datamodules.Mixture", "Addition"), strict=True):
        path.write_text(f"data: {{class_path: {kind}}}\n")
    assert mixture_tasks(paths) == {"short", "full"}


def test_the_table_is_written_before_a_missing_metric_is_told(
    methods: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The default metric is one that some runs do not have."""
    text = "methods: [DIR/few.yaml]\nseeds: [0]"
    (run,) = plan(methods, text).runs["", "few"]

    def execute(words: list[str]) -> None:
        metrics, name = {"exact_match": 0.5}, "test" if words[0] == "test" else "val"
        measured = {f"{name}/{key}": value for key, value in {**metrics, "examples": 9}.items()}
        file = "metrics" if name == "test" else "validation"
        (Path(run.folder) / f"{file}.json").write_text(json.dumps(measured))

    launch(run, execute)
    assert commands.run(["sweep", "-c", str(methods / "sweep.yaml")]) == 1
    told = capsys.readouterr()
    assert "error: no run has the metric 'val/nll'; did you mean" in told.err
    assert "| few | - | 0.500 | 9 | 0 | 0 | - |" in told.out
    assert (methods / "runs" / "table.md").read_text() == told.out


def test_a_folder_of_other_runs_is_not_mistaken_for_this_sweep_s(methods: Path) -> None:
    """Whether options or a config have changed since."""
    text = "methods: [DIR/few.yaml]\nseeds: [0]\noptions: {data.batch_size: 8}"
    (run,) = plan(methods, text).runs["", "few"]

    def execute(words: list[str]) -> None:
        (Path(run.folder) / f"{'metrics' if words[0] == 'test' else 'validation'}.json").write_text("{}")

    launch(run, execute)
    plan(methods, text)
    with pytest.raises(UserError, match="seed-0 holds a run that was made with other options"):
        plan(methods, text.replace("8", "9"))
    (methods / "few.yaml").write_text((methods / "few.yaml").read_text().replace("shots: 1", "shots: 2"))
    with pytest.raises(UserError, match="another text of its configs"):
        plan(methods, text)


def test_draws_stay_the_same_between_versions() -> None:
    """Or a sweep that continues would not find its runs."""
    spaces = {
        "uniform": ([2, 3], [2.111, 2.027, 2.735]),
        "loguniform": (["1e-4", 0.1], [0.0002148, 0.0001204, 0.01605]),
        "randint": ([0, 1000], [191, 770, 619]),
        "choice": (["x", "y", "z"], ["y", "z", "x"]),
    }
    for name, (limits, expected) in spaces.items():
        drawn = variants({"model.a": {name: limits}}, None, 3, 0)
        assert [variant.options["model.a"] for variant in drawn] == expected, name


def test_the_command_line_overrides_the_file(methods: Path) -> None:
    plan(methods, "methods: DIR/so*.yaml\nseeds: 0\noptions: {data.chat: true, data.batch_size: 4}\nworkers: 2")
    (methods / "words.yaml").write_text(DATA)
    (methods / "words.txt").touch()

    def planned(*args: str) -> SweepPlan:
        own, options = _split([word.replace("DIR", str(methods)) for word in args])
        return _plan(parser().parse_intermixed_args(own), options)

    file = ["-c", "DIR/sweep.yaml"]
    made = planned(*file, "--seeds", "3", "4", "--data.batch_size", "8", "--folder", "DIR/other", "DIR/few.yaml")
    assert [run.seed for run in made.all_runs] == [3, 4]
    assert made.folder == methods / "other"
    assert {name for _, name in made.runs} == {"few"}
    assert made.config.options == {"data.chat": True, "data.batch_size": "8"}
    assert (made.config.workers, made.config.metric) == (2, "val/nll")
    assert planned(*file, "--workers", "1").config.workers == 1

    made = planned(
        "DIR/few.yaml", "DIR/soft.yaml", "--tasks", "DIR/words.yaml", "--data.files.train", "a b", "--untrained"
    )
    assert list(made.runs) == [("words", "few"), ("words", "soft-untrained"), ("words", "soft")]
    assert [run.train for run in made.all_runs] == [True] * 3 + [False] * 3 + [True] * 3
    assert made.config.metric is None
    assert not made.all_runs[0].validate
    assert options(made.all_runs[0]) == {"data.files.train": "a b", "trainer.enable_progress_bar": "false"}
    made = planned("--model.text=a b", "--tasks", "DIR/words.yaml", "--", "DIR/few.yaml")
    assert made.config.options == {"model.text": "a b"}
    assert planned("DIR/few.yaml", "--address", "auto").config.workers == 0
    assert planned(*file, "--address", "auto").config.workers == 2
    assert planned("DIR/few.yaml", "--metric", "val/nll").all_runs[0].validate


@pytest.mark.parametrize(
    ("settings", "option", "value", "key"),
    [
        ("model.length: [2, 8]", "model.length", "4", "model.length"),
        ("model.length: 2", "model.init_args.length", "4", "model.length"),
        ("model.optimizer: torch.optim.AdamW", "model.optimizer.lr", "0.1", "model.optimizer"),
        ("model.class_path: SoftPromptTuning", "model", "PrefixTuning", "model.class_path"),
        ("model.optimizer.init_args.lr: [0.1, 1]", "model.optimizer", '{"class_path": "X"}', "model.optimizer."),
        ("model.optimizer.lr: [0.1, 1]", "model.optimizer", "torch.optim.SGD", ""),
        ("model.length: [2, 8]", "model.length_penalty", "1", ""),
    ],
)
def test_options_that_settings_would_replace_are_refused(
    settings: str, option: str, value: str, key: str, methods: Path
) -> None:
    path = methods / "sweep.yaml"
    path.write_text(f"methods: [{methods}/few.yaml, {{config: {methods}/soft.yaml, settings: {{{settings}}}}}]")
    where = {"folder": str(methods / "runs")}
    if key:
        with pytest.raises(UserError, match=f"sweep.yaml: settings has {key}.*, which overrides --{option}"):
            read_plan(path, where, {option: value})
    else:
        assert options(read_plan(path, where, {option: value}).all_runs[-1])[option] == value


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        ([], 1, "nothing to run; give configs of methods, or a sweep file with -c"),
        (["few.yaml", "--data.train"], 1, "--data.train needs a value"),
        (["few.yaml", "--data.train", "--seeds", "0"], 1, "--data.train needs a value"),
        (["few.yaml", "--data.a", "1", "--data.a=2"], 1, "--data.a is given twice"),
        (["few.yaml", "--sedes", "0"], 2, "unrecognized arguments: --sedes"),
        (["few.yaml", "--seeds", "x"], 2, "invalid int value: 'x'"),
        (["few.yaml", "--seeds", "1", "1"], 1, "names a seed twice"),
        (["no.yaml"], 1, "methods: no.yaml does not exist"),
        (["few.yaml", "--trainer.default_root_dir", "x"], 1, "the sweep sets trainer.default_root_dir itself"),
        (["few.yaml", "--workers", "-1"], 1, "workers must be a whole number of at least 0, got -1"),
        (["few.yaml", "--workers", "1", "--address", "auto"], 1, "--workers 1 runs in this process, without the clu"),
        (["few.yaml", "--mode", "max"], 1, "--mode says which values of --metric are better; give --metric, too"),
    ],
)
def test_wrong_arguments_raise_one_line(
    words: list[str],
    code: int,
    told: str,
    methods: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(methods)
    try:
        found = commands.run(["sweep", *words])
    except SystemExit as error:
        found = int(error.code or 0)
    assert found == code
    err = capsys.readouterr().err
    assert told in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_every_seed_runs_once_and_the_table_has_the_spread(
    methods: Path, executed: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sweep", str(methods / "soft.yaml"), "--seeds", "0", "1", "--untrained"]
    words += ["--folder", str(methods / "runs"), "--checkpoint", "last"]
    assert commands.run(words) == 0
    told = capsys.readouterr()
    table = [line for line in told.out.splitlines() if line.startswith("| soft")]
    assert [line.split("|")[1].strip() for line in table] == ["soft-untrained", "soft"]
    assert all("±" in line for line in table)
    assert executed == [
        *(f"soft-untrained/seed-{seed} test" for seed in (0, 1)),
        *(f"soft/seed-{seed} {command}" for seed in (0, 1) for command in ("fit", "test last")),
    ]
    assert commands.run(words) == 0
    again = capsys.readouterr()
    assert again.out == told.out
    assert "4 of 4 runs are done and kept" in again.err
    assert len(executed) == 6
    assert commands.run([*words, "--metric", "val/nll", "--table"]) == 1  # before the validations that it needs
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| soft")]
    assert sorted(shown) == sorted(f"{line} - |" for line in table)


def test_methods_are_put_side_by_side_over_tasks(methods: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = "train_size: 40, val_size: 4, test_size: 4"
    (methods / "sums.yaml").write_text(
        f"data: {{class_path: Addition, init_args: {{max_digits: 2, ood_digits: [3, 4], {sizes}}}}}\n"
    )
    (methods / "words.yaml").write_text(DATA)
    for name in ("few", "soft"):
        path = methods / f"{name}.yaml"
        path.write_text(path.read_text().replace(DATA, ""))
    files = {name: str(methods / f"{name}.yaml") for name in ("sums", "words", "few", "soft")}
    words = ["sweep", "--folder", str(methods / "runs"), "--seeds", "0", "--tasks", files["sums"], files["words"]]
    words += ["--trainer.accelerator", "cpu", "--checkpoint", "last"]
    assert commands.run([*words, "--", files["few"], files["soft"]]) == 0
    told = capsys.readouterr()
    assert len([line for line in told.err.splitlines() if line.strip()]) < 4, told.err
    lines = told.out.splitlines()
    rows = [line for line in lines if line.startswith("| sums / soft")]
    names = ["sums / soft", "sums / soft / 3_digits", "sums / soft / 4_digits"]
    assert [row.split("|")[1].strip() for row in rows] == names
    assert float(rows[0].split("|")[6].split("±")[0]) > 0, "the tokens that training took"
    table = lines[lines.index("| exact_match | sums | words |") :]
    assert [row.split("|")[1].strip() for row in table[2:4]] == ["few", "soft"]
    assert all("→" in row.split("|")[2] and "→" not in row.split("|")[3] for row in table[2:4])


def test_no_further_run_starts_after_the_time_limit(
    methods: Path, executed: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    plan(methods, "methods: DIR/few.yaml\nseeds: [0, 1]\ntime_limit: 0.001")
    assert commands.run(["sweep", "-c", str(methods / "sweep.yaml")]) == 1
    assert "1 of 2 runs are not done" in capsys.readouterr().err
    assert executed == ["few/seed-0 validate", "few/seed-0 test"]


def test_a_plan_is_made_from_python(methods: Path) -> None:
    config = SweepConfig(
        [str(methods / "few.yaml")], str(methods / "runs"), settings={"model.shots": [1, 2]}, seeds=(5,)
    )
    assert [Path(run.folder).parts[-2:] for run in make_plan(config).all_runs] == [
        ("few-shots=1", "seed-5"),
        ("few-shots=2", "seed-5"),
    ]
    with pytest.raises(UserError, match="seeds: -1 must be at least 0"):
        SweepConfig(["a"], seeds=(-1,))


@pytest.mark.parametrize("name", ["run.json", "metrics.json", "validation.json", "budget.json"])
def test_a_damaged_file_of_a_run_is_named(name: str, methods: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = plan(methods, "methods: DIR/soft.yaml\nseeds: 0")
    run = made.runs["", "soft"][0]
    folder = Path(run.folder)
    folder.mkdir(parents=True)
    for each in ("metrics.json", "validation.json"):
        (folder / each).write_text("{}")
    (folder / "run.json").write_text(json.dumps(run.record))
    (folder / name).write_text('{"test/nll": 1')
    assert commands.run(["sweep", "-c", str(methods / "sweep.yaml"), "--table"]) == 1
    assert f"{folder / name} is not valid JSON" in capsys.readouterr().err


def test_a_cluster_that_is_not_there(methods: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = methods / "sweep.yaml"
    path.write_text(f"methods: [{methods}/few.yaml]\nseeds: [0]\nfolder: {methods / 'runs'}\n")
    assert commands.run(["sweep", "-c", str(path), "--address", "127.0.0.1:9"]) == 1
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "no Ray cluster at 127.0.0.1:9" in errors[0]
    assert commands.run(["sweep", "-c", str(path), "--address", "ray://127.0.0.1:9"]) == 1
    assert "must be HOST:PORT" in capfd.readouterr().err
