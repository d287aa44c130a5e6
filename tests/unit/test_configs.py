"""The installed configs are found by name, and the demo is made of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lightning_prompts.cli import run
from lightning_prompts.cli.checks import check
from lightning_prompts.errors import UserError
from lightning_prompts.files import CONFIGS, find_config, packaged_configs
from lightning_prompts.runs.reader import Run
from lightning_prompts.runs.sweep import read_plan
from support.commands import expect_error
from support.models import TINY
from support.project import ROOT

SOFT = "antonyms/soft_prompt.yaml"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_file_goes_before_the_installed_config(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert find_config(SOFT) == CONFIGS / SOFT
    assert capsys.readouterr().err == f"{SOFT} is the installed {CONFIGS / SOFT}\n"
    (elsewhere / "antonyms").mkdir()
    (elsewhere / SOFT).write_text("model: FixedPrompt\n")
    assert find_config(SOFT) == Path(SOFT)
    assert capsys.readouterr().err == ""


def test_every_config_has_a_name_and_a_description(capsys: pytest.CaptureFixture[str]) -> None:
    experiments = ROOT / "experiments"
    names = sorted(path.relative_to(experiments).as_posix() for path in experiments.rglob("*.yaml"))
    assert packaged_configs() == names
    assert run(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == names
    descriptions = [line.split(maxsplit=1)[1] for line in lines]
    assert len(set(descriptions)) == len(names)
    assert not any(text.startswith(("#", "model:")) for text in descriptions)


def test_one_config_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["configs", SOFT]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["class_path"] == "SoftPromptTuning"
    expect_error(["configs", "antonyms/soft"], "no config is called 'antonyms/soft'; did you mean antonyms/s", capsys)


def test_options_take_names() -> None:
    path = str(CONFIGS / SOFT)
    assert check(["fit", "-c", SOFT, f"--config={SOFT}", "--trainer.max_steps", "2"]) == [
        *("fit", "-c", path, f"--config={path}", "--trainer.max_steps", "2")
    ]
    assert check(["fit", "-c", "model: FixedPrompt"]) == ["fit", "-c", "model: FixedPrompt"]
    assert check(["fit", "-c"]) == ["fit", "-c"]
    configs = {run.configs for run in read_plan(Path("sweep/antonyms.yaml")).all_runs}
    assert configs == {(str(CONFIGS / SOFT),), (str(CONFIGS / "antonyms/static.yaml"),)}


def test_an_unknown_name_has_the_closest_ones() -> None:
    with pytest.raises(UserError, match=r"^antonym/soft_prompt\.yaml does not exist; did you mean antonyms/soft_pro"):
        check(["fit", "-c", "antonym/soft_prompt.yaml"])
    with pytest.raises(UserError, match=r"^a\.yaml does not exist; `lightning-prompts configs` lists the installed"):
        check(["fit", "-c", "a.yaml"])


def test_the_demo_trains_tests_and_compares(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--model.lm.name", TINY, "--data.val_fraction", "0.01", "--data.test_fraction", "0.01"]
    quick = ["--trainer.max_steps", "2", "--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]
    assert run(["demo", *small, *quick, "--folder", "here"]) == 0
    shown = capsys.readouterr().out
    soft, static, untrained = (
        Run(elsewhere / "here" / name).metrics["test/nll"] for name in (".", "static", "untrained")
    )
    for name, value in (("static text ' antonyms'", static), ("untrained", untrained), ("trained soft prompt", soft)):
        assert any(name in line and f" {value:.2f} " in line for line in shown.splitlines())
    assert "$ lightning-prompts fit -c antonyms/soft_prompt.yaml" in shown
    assert (elsewhere / "here" / "report.html").is_file()


def test_the_demo_ends_with_the_code_of_a_failed_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(["demo", "--model.lenght", "2", "--trainer.accelerator", "cpu"])
    assert "did you mean length" in capsys.readouterr().err
