"""Files that are damaged, somebody else's or made to do harm: refused in one line, nothing run, nothing overwritten."""

from __future__ import annotations

import json
import os
import pickle
import random
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lightning_prompts.checkpoints import check_readable
from lightning_prompts.cli import run
from lightning_prompts.datamodules import QuestionAnswer
from lightning_prompts.errors import UserError
from support.models import SMALLEST

SMALL = [
    "--data",
    "Antonyms",
    "--data.max_train_examples",
    "16",
    "--trainer.max_steps",
    "2",
    "--trainer.accelerator",
    "cpu",
    "--trainer.limit_val_batches",
    "2",
    "--trainer.enable_progress_bar",
    "false",
    "--data.eval_batch_size",
    "4",
    "--model.max_new_tokens",
    "1",
    "--trainer.limit_test_batches",
    "2",
]
GIGABYTE = 1 << 30


class Harm:
    """What a file from somebody else might carry."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.system, ("touch code_was_run",))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert (
        run(
            [
                "fit",
                "--model",
                "SoftPromptTuning",
                "--model.lm.name",
                SMALLEST,
                "--model.length",
                "3",
                *SMALL,
                "--trainer.default_root_dir",
                str(folder),
            ]
        )
        == 0
    )
    return folder


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def refused(args: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    """The one error line; nothing else went wrong."""
    capfd.readouterr()
    try:
        status = run(args)
    except SystemExit as exit_:
        status = int(exit_.code or 0)
    err = capfd.readouterr().err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status in (1, 2), f"{status}: {err}"
    assert len(errors) == 1, err
    assert "Traceback" not in err
    assert "LIGHTNING_PROMPTS_DEBUG" not in errors[0], f"nobody had thought of it: {errors[0]}"
    return errors[0]


def zeros(path: Path) -> Path:
    """A gigabyte of zeros that takes no room."""
    with path.open("wb") as file:
        file.truncate(GIGABYTE)
    return path


def damaged(whole: bytes) -> Iterator[bytes]:
    """Cut off and changed at 20 places."""
    place = random.Random(0)
    for _ in range(10):
        yield whole[: place.randrange(1, len(whole) - 1)]
    for _ in range(10):
        start = place.randrange(len(whole) - 16)
        yield whole[:start] + bytes(byte ^ 0x5A for byte in whole[start : start + 16]) + whole[start + 16 :]


def test_damaged_checkpoints(finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Each is refused, or the damage was where nothing is read from (a zip file's padding), and the result is right."""
    before = contents(finished)
    whole = (finished / "checkpoints" / "best.ckpt").read_bytes()
    path = tmp_path / "damaged.ckpt"
    expected = torch.load(finished / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    count = 0
    for content in damaged(whole):
        path.write_bytes(content)
        try:
            found = torch.load(path, weights_only=True)["state_dict"]
            same = all(torch.equal(found[name], expected[name]) for name in expected)
        except Exception:  # noqa: BLE001 - what torch makes of it
            same = False
        if same and zipfile.ZipFile(path).testzip() is None:
            continue
        count += 1
        with pytest.raises(UserError, match=r"damaged"):
            check_readable(path)
        if count in (1, 11):  # one cut off and one changed: the command line checks a checkpoint before it is loaded
            refused(["test", "-c", str(finished / "config.yaml"), "--ckpt_path", str(path)], capfd)
    assert count > 14
    assert contents(finished) == before


def test_crafted_checkpoints(
    finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = contents(finished)
    good = torch.load(finished / "checkpoints" / "best.ckpt", weights_only=True)
    for place in ("rng", "callbacks", "harm"):
        torch.save({**good, place: Harm()}, tmp_path / "harm.ckpt")
        with pytest.raises(UserError, match="pickled code"):
            check_readable(tmp_path / "harm.ckpt", resume=True)
    line = refused(["fit", "-c", str(finished / "config.yaml"), "--ckpt_path", "harm.ckpt"], capfd)
    assert "pickled code" in line
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps(Harm()))
    refused(["test", "-c", str(finished / "config.yaml"), "--ckpt_path", "plain.ckpt"], capfd)
    with zipfile.ZipFile(tmp_path / "outside.ckpt", "w") as archive:
        archive.writestr("../outside", b"x")
        archive.writestr("/etc/outside", b"x")
    with pytest.raises(UserError, match="damaged"):
        check_readable(tmp_path / "outside.ckpt")
    line = refused(["test", "-c", str(finished / "config.yaml"), "--ckpt_path", str(zeros(tmp_path / "0.ckpt"))], capfd)
    assert "not a checkpoint" in line
    assert not list(tmp_path.rglob("code_was_run"))
    assert not list(tmp_path.parent.glob("outside"))
    assert contents(finished) == before


@pytest.mark.parametrize("key", ["state_dict", "optimizer_states", "loops", "lr_schedulers", "callbacks", "rng"])
def test_checkpoints_that_lack_a_part(key: str, finished: Path, tmp_path: Path) -> None:
    good = torch.load(finished / "checkpoints" / "last.ckpt", weights_only=True)
    path = tmp_path / "part.ckpt"
    for value in (None, {}, 3):
        torch.save({**good, key: value} if value is not None else {k: v for k, v in good.items() if k != key}, path)
        if value == {} and key == "callbacks":
            check_readable(path, resume=True)  # a run without callbacks has these
            continue
        with pytest.raises(UserError, match=key if key != "optimizer_states" else "optimi[sz]er"):
            check_readable(path, resume=True)


def test_a_run_does_not_resume_without_a_part(
    finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    good = torch.load(finished / "checkpoints" / "last.ckpt", weights_only=True)
    words = [
        "fit",
        "-c",
        str(finished / "config.yaml"),
        "--trainer.max_steps",
        "3",
        "--ckpt_path",
        str(tmp_path / "part.ckpt"),
        "--trainer.default_root_dir",
        str(tmp_path / "run"),
    ]
    unusable = {**good["loops"], "fit_loop": {}}  # of the right type: Lightning finds out
    for part in ({"rng": 3}, {"loops": unusable}):
        torch.save({**good, **part}, tmp_path / "part.ckpt")
        refused(words, capfd)
        assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_config_brings_no_code(
    finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a YAML tag, nor a class from anywhere, nor a model's own code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = (finished / "config.yaml").read_text()
    attacks = {
        "tag": config + '\nx: !!python/object/apply:os.system ["touch code_was_run"]\n',
        "class": config.replace("lightning_prompts.methods.SoftPromptTuning", "os.system"),
        "callback": config.replace("lightning_prompts.callbacks.PromptReadout", "subprocess.Popen"),
        "code": config.replace(
            "gradient_checkpointing: false", "gradient_checkpointing: false\n      trust_remote_code: true"
        ),
    }
    for name, text in attacks.items():
        assert text != config, name
        (tmp_path / "c.yaml").write_text(text)
        refused(["fit", "-c", "c.yaml", "--overwrite", "true"], capfd)
    assert not list(tmp_path.rglob("code_was_run"))


def test_a_model_folder_with_code_of_its_own(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(
        json.dumps(
            {
                "model_type": "own",
                "architectures": ["Own"],
                "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"},
            }
        )
    )
    (model / "own.py").write_text("import pathlib\npathlib.Path('code_was_run').touch()\n")
    refused(
        [
            "fit",
            "--model",
            "SoftPromptTuning",
            "--model.lm.name",
            str(model),
            *SMALL,
            "--trainer.default_root_dir",
            str(tmp_path / "run"),
        ],
        capfd,
    )
    assert not list(tmp_path.rglob("code_was_run"))
    assert not (tmp_path / "run").exists()


def test_damaged_configs(finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("zeros.yaml", "zeros.yml"):
        line = refused(["fit", "-c", str(zeros(tmp_path / name))], capfd)
        assert "not a text file" in line
    for text in (
        b"\xff\xfe\x00",
        b"a: [",
        b"\t- x",
        b"[]",
        b"3",
        b"a: &a [*a]",
        b"{" * 5000,
        b"model: {class_path: [1]}",
    ):
        (tmp_path / "c.yaml").write_bytes(text)
        refused(["fit", "-c", str(tmp_path / "c.yaml")], capfd)


@pytest.mark.parametrize("ending", ["json", "jsonl", "csv", "tsv", "parquet", "txt"])
def test_damaged_data(ending: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / f"rows.{ending}"
    words = [
        "fit",
        "--model",
        "SoftPromptTuning",
        "--model.lm.name",
        SMALLEST,
        "--data",
        "QuestionAnswer",
        "--data.train",
        str(path),
        "--trainer.default_root_dir",
        str(tmp_path / "run"),
    ]
    with pytest.raises(UserError, match="not"):
        QuestionAnswer(str(path)).examples("train")
    zeros(path)
    with pytest.raises(UserError):
        QuestionAnswer(str(path)).examples("train")
    for content in (
        b"",
        b"{",
        b"[[[[",
        b"[1, 2]",
        b"null",
        b'{"question": 3}',
        b"\x80\x81\x82\n",
        b"a,b\n1\n",
        b"[" * 100_000,
        b'{"question": "a", "answer": ' + b"1" * 5000 + b"}",
    ):
        path.write_bytes(content)
        with pytest.raises(UserError):
            QuestionAnswer(str(path)).examples("train")
    refused(words, capfd)
    assert not (tmp_path / "run").exists()
