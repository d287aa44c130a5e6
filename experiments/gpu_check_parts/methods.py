"""Train every method in every precision for a few steps with the Trainer, and load its checkpoint."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from gpu_check_parts.base import methods_lm
from gpu_check_parts.rows import Row, Settings
from lightning_prompts import callbacks
from lightning_prompts import methods as m
from lightning_prompts.checkpoints import AtomicCheckpointIO
from lightning_prompts.datamodules import Antonyms
from lightning_prompts.datamodules.base import SourceRow, TextDataModule
from lightning_prompts.dln.layer import LanguageLayer
from lightning_prompts.dln.posterior import Posterior
from lightning_prompts.dln.proposals import (
    Crossover,
    InducedInstructions,
    LanguageModelProposals,
    Paraphrases,
    Reflection,
    RuleRewrites,
)
from lightning_prompts.estimators.baselines import LeaveOneOut, ValueHead
from lightning_prompts.estimators.reinforce import TopK
from lightning_prompts.estimators.relaxations import GumbelSoftmax, Projected, Softmax, StraightThrough
from lightning_prompts.lm import LMConfig
from lightning_prompts.objectives import BertScoreLoss
from lightning_prompts.prompts.initializers import FromText
from lightning_prompts.prompts.prefix import PrefixMLP
from lightning_prompts.prompts.soft import ResidualMLP
from lightning_prompts.refiners.networks import MLPRefiner, TransformerRefiner
from lightning_prompts.search.demonstrations import RandomDemonstrations
from lightning_prompts.search.rounding import Rounding
from lightning_prompts.search.scoring import Racing

SECONDS = 60  # for one job
NEW = 4  # generated tokens
DTYPES = ("float32", "bfloat16", "float16")
QUANTIZED = ("int8", "nf4")
MIXED = ("16-mixed", "bf16-mixed")

Make = Callable[[LMConfig], m.PromptMethod]

_MLP, _TRANSFORMER = MLPRefiner(8), TransformerRefiner(8, 2, 2)
TRAINED: dict[str, Make] = {
    "soft": lambda lm: m.SoftPromptTuning(5, lm=lm, max_new_tokens=NEW),
    "soft, reparametrised": lambda lm: m.SoftPromptTuning(
        5, reparametrization=ResidualMLP(8), lm=lm, max_new_tokens=NEW
    ),
    "latent seek": lambda lm: m.LatentSeek(5, 2, samples=2, lm=lm, max_new_tokens=NEW),
    "prefix": lambda lm: m.PrefixTuning(5, mlp=None, lm=lm, max_new_tokens=NEW),
    "prefix, MLP": lambda lm: m.PrefixTuning(5, mlp=PrefixMLP(4, 5), lm=lm, max_new_tokens=NEW),
    "distillation": lambda lm: m.PromptDistillation(5, "prefix", shots=2, lm=lm, max_new_tokens=NEW),
    "softmax": lambda lm: m.RelaxedPromptTuning(3, Softmax(), lm=lm, max_new_tokens=NEW),
    "Gumbel-softmax": lambda lm: m.RelaxedPromptTuning(3, GumbelSoftmax(), lm=lm, max_new_tokens=NEW),
    "straight-through": lambda lm: m.RelaxedPromptTuning(3, StraightThrough(), lm=lm, max_new_tokens=NEW),
    "projected": lambda lm: m.RelaxedPromptTuning(3, Projected(), lm=lm, max_new_tokens=NEW),
    "softmax, rounded": lambda lm: m.RelaxedPromptTuning(
        3, Softmax(), rounding=Rounding(1, 4, 5), lm=lm, max_new_tokens=NEW, memory_mb=10
    ),
    "search": lambda lm: m.HardPromptSearch(
        init=FromText(" ab"), candidates=8, top_k=30, n_replace=2, buffer=2, fluency=0.5, lm=lm, max_new_tokens=NEW
    ),
    "refiner": lambda lm: m.RefinerTuning(3, _MLP, cache_states=False, lm=lm, max_new_tokens=NEW),
    "refiner, transformer": lambda lm: m.RefinerTuning(3, _TRANSFORMER, cache_states=False, lm=lm, max_new_tokens=NEW),
    "refiner, Gumbel-softmax and BERTScore": lambda lm: m.RefinerTuning(
        3,
        _MLP,
        estimator=GumbelSoftmax(),
        objective=BertScoreLoss(layer=2),
        cache_states=False,
        lm=lm,
        max_new_tokens=NEW,
    ),
    "refiner, cached states": lambda lm: m.RefinerTuning(3, _TRANSFORMER, lm=lm, max_new_tokens=NEW),
    "REINFORCE": lambda lm: m.ReinforceRefiner(
        2, 4, _MLP, support=TopK(20), baseline=LeaveOneOut(), lm=lm, max_new_tokens=NEW
    ),
    "REINFORCE, value head": lambda lm: m.ReinforceRefiner(
        2, 4, _MLP, support=TopK(20), baseline=ValueHead(8), lm=lm, max_new_tokens=NEW
    ),
    "scratch": lambda lm: m.ScratchTransformer(2, 32, 4, lm=lm, max_new_tokens=NEW),
    "LoRA": lambda lm: m.LoraTuning(rank=2, lm=lm, max_new_tokens=NEW),
}
_PROPOSALS = [LanguageModelProposals(2, max_new_tokens=6, shown=1), RuleRewrites(2)]
TEXTS: dict[str, Make] = {
    "DLN, 1 layer": lambda lm: m.DeepLanguageNetwork(
        [LanguageLayer(prompt="Say.")], proposals=list(_PROPOSALS), max_prompt_tokens=60, lm=lm, max_new_tokens=NEW
    ),
    "DLN, 2 layers": lambda lm: m.DeepLanguageNetwork(
        [LanguageLayer(prompt="Think.", max_new_tokens=5), LanguageLayer(prompt="Say.")],
        proposals=list(_PROPOSALS),
        posterior=Posterior(samples=2),
        error_weight=0.5,
        max_prompt_tokens=60,
        lm=lm,
        max_new_tokens=NEW,
    ),
    "APE": lambda lm: m.Ape(
        "Say.",
        InducedInstructions(2, max_new_tokens=6),
        Paraphrases(2, 0.7, 6),
        max_prompt_tokens=60,
        lm=lm,
        max_new_tokens=NEW,
    ),
    "demonstrations": lambda lm: m.DemonstrationSearch(
        "Say.", [RandomDemonstrations(3, 2)], racing=Racing(4), lm=lm, max_new_tokens=NEW
    ),
    "GEPA": lambda lm: m.Gepa(
        [LanguageLayer(prompt="Say.")],
        reflection=Reflection(max_new_tokens=6),
        max_prompt_tokens=60,
        lm=lm,
        max_new_tokens=NEW,
    ),
    "CAPO": lambda lm: m.Capo(
        "Say.",
        InducedInstructions(2, max_new_tokens=6),
        Crossover(2, max_new_tokens=6),
        Paraphrases(2, 0.7, 6),
        population=3,
        shots=2,
        racing=Racing(4),
        lm=lm,
        max_new_tokens=NEW,
    ),
}
FIXED: dict[str, Make] = {
    "fixed prompt": lambda lm: m.FixedPrompt(" words:", lm, NEW),
    "few-shot": lambda lm: m.FewShot(2, lm=lm, max_new_tokens=NEW),
    "chain of thought": lambda lm: m.ChainOfThought(reasoning_tokens=6, lm=lm, max_new_tokens=NEW),
}
METHODS = {**TRAINED, **TEXTS, **FIXED}


@dataclass(frozen=True)
class Variant:
    """Settings of the LM of a run, and the precision of the Trainer."""

    dtype: str = "float32"
    checkpointing: bool = False
    quantization: str | None = None
    precision: str = "32-true"


def all_jobs() -> dict[str, tuple[str, Variant]]:
    """Return methods and variants by name of the job, the most important ones first."""
    found: dict[str, tuple[str, Variant]] = {}
    for dtype in DTYPES:
        found |= {f"{name} {dtype}": (name, Variant(dtype)) for name in METHODS}
    for name in ("soft", "prefix", "softmax", "refiner"):
        found |= {f"{name} {precision}": (name, Variant(precision=precision)) for precision in MIXED}
    for name in ("soft", "prefix", "refiner"):
        found |= {f"{name} {kind}": (name, Variant("bfloat16", quantization=kind)) for kind in QUANTIZED}
    for dtype in DTYPES:
        found |= {f"{name} {dtype}, checkpointing": (name, Variant(dtype, checkpointing=True)) for name in METHODS}
    # The scratch method makes its own model in float32.
    return {key: run for key, run in found.items() if run[0] != "scratch" or run[1] == Variant()}


def jobs(settings: Settings) -> list[str]:
    """List every method in every variant."""
    del settings
    return list(all_jobs())


def run(name: str, settings: Settings) -> list[Row]:
    """Check one method in one variant."""
    method, variant = all_jobs()[name]
    if reason := _not_here(variant, settings):
        return [Row("methods", name, f"not run: {reason}", ok=None)]
    config = LMConfig(
        methods_lm(settings),
        dtype=variant.dtype,
        quantization=variant.quantization,  # type: ignore[arg-type]
        gradient_checkpointing=variant.checkpointing,
    )
    folder = settings.scratch / "methods" / "".join(c if c.isalnum() else "_" for c in name)
    return [_one(name, lambda: METHODS[method](config), method, variant, folder, settings)]


def _not_here(variant: Variant, settings: Settings) -> str:
    if variant.quantization is not None:
        if importlib.util.find_spec("bitsandbytes") is None:
            return "bitsandbytes is not installed"
        return "bitsandbytes does not support the device" if settings.device == "pretend" else ""
    if variant.precision != "32-true" and settings.device == "pretend":
        return "the device has no autocast"
    if variant.precision == "16-mixed" and settings.device == "cpu":
        return "Lightning uses bf16-mixed instead on a CPU"
    return ""


# --- data and trainer -------------------------------------------------------------------------------------------------


class YesNo(TextDataModule):
    """A few questions with two classes."""

    def __init__(self, size: int = 12) -> None:
        """Keep the size of each split."""
        super().__init__(template="{prompt}\n\n{question}\n\nAnswer: {answer}\n", batch_size=4, eval_batch_size=8)
        self.size = size

    def load_rows(self) -> dict[str, list[SourceRow]]:
        """Make three splits of equal size."""
        rows = [
            SourceRow(
                {"question": f"Is {n} {'odd' if n % 3 else 'even'}?", "answer": ("yes", "no")[n % 2]},
                f"row {n}",
                labels=(("yes", "correct"), ("no",)),
            )
            for n in range(3 * self.size)
        ]
        return {split: rows[k::3] for k, split in enumerate(("train", "val", "test"))}


def small_data(settings: Settings, batches: int = 5) -> Antonyms:
    """Make a few antonyms, with a given number of training batches."""
    size, fraction = (4, 0.01) if settings.small else (8, 0.02)
    return Antonyms(batch_size=size, max_train_examples=batches * size, val_fraction=fraction, test_fraction=fraction)


def default_callbacks(method: m.PromptMethod, folder: Path) -> list[L.Callback]:
    """Make the default callbacks of ``lightning_prompts.cli``, whose import needs jsonargparse."""
    saves: dict[str, Any] = {"save_top_k": 1, "enable_version_counter": False, "save_on_train_epoch_end": False}
    monitor, mode = method.monitor
    return [
        ModelCheckpoint(folder / "checkpoints", filename="best", monitor=monitor, mode=mode, **saves),
        callbacks.GradientScaling(),
        callbacks.NonFiniteGuard(),
        callbacks.PromptReadout(),
        callbacks.PromptPath(),
        callbacks.PromptTable(),
        callbacks.SampleGenerations(),
        callbacks.Throughput(),
        callbacks.ResultFiles(),
        callbacks.ValidateAtEnd(),
        callbacks.StopOnSignal(),
        callbacks.LastCheckpoint(),
    ]


def trainer(folder: Path, device: str, **settings: Any) -> L.Trainer:
    """Make a trainer on a device, with the defaults of ``lightning_prompts.cli``."""
    place: dict[str, Any] = {"accelerator": {"cuda": "gpu"}.get(device, device)}
    if device == "pretend":
        place["strategy"] = "pretend_single"
    made = L.Trainer(
        default_root_dir=folder,
        devices=1,
        max_epochs=-1,
        gradient_clip_val=1.0,
        log_every_n_steps=2,
        num_sanity_val_steps=0,
        enable_model_summary=False,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        **{"max_steps": 1, "logger": False, "enable_checkpointing": False, **place, **settings},
    )
    if type(made.strategy.checkpoint_io) is TorchCheckpointIO:
        made.strategy.checkpoint_io = AtomicCheckpointIO()
    return made


class Watch(L.Callback):
    """Records the initial state of a run, its losses and its devices."""

    def __init__(self) -> None:
        """Start without records."""
        self.start: dict[str, Any] = {}
        self.weights: dict[str, Tensor] = {}
        self.losses: list[Tensor] = []
        self.devices: set[str] = set()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record the prompt, the LM and all devices."""
        self.start, self.weights = trained(pl_module), frozen_weights(pl_module)
        self.devices |= {value.device.type for value in (*pl_module.parameters(), *pl_module.buffers())}

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record the initial state of a method without training."""
        if not self.weights:
            self.on_fit_start(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the loss, if there is one."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):
            self.losses.append(loss.detach().clone())


def trained(method: Any) -> dict[str, Any]:
    """Copy the state that training may change."""
    if hasattr(method, "prompts"):
        return {"prompts": list(method.prompts)}
    return {name: value.detach().cpu().clone() for name, value in method.state_dict().items()}


def frozen_weights(method: Any) -> dict[str, Tensor]:
    """Copy the frozen weights of the LM."""
    own = {name: value for name, value in method.lm.named_parameters() if not value.requires_grad}
    return {name: value.detach().clone() for name, value in own.items() if "lora_" not in name}


# --- one run ----------------------------------------------------------------------------------------------------------


def _one(
    name: str, make: Callable[[], m.PromptMethod], kind: str, variant: Variant, folder: Path, settings: Settings
) -> Row:
    watch = Watch()

    def data() -> TextDataModule:
        return YesNo() if kind in TEXTS else small_data(settings)

    def test(method: m.PromptMethod, **more: Any) -> dict[str, float]:
        watching = [callbacks.ResultFiles(), watch]
        tester = trainer(folder, settings.device, precision=variant.precision, callbacks=watching)
        return dict(tester.test(method, datamodule=data(), verbose=False, weights_only=True, **more)[0])

    L.seed_everything(1)
    method = make()
    if kind in FIXED:
        first, again = test(method), test(make())
        said, problems = ["trains nothing"], []
    else:
        # Loss scaling may skip the first steps.
        steps = 2 if kind in TEXTS or (settings.small and variant.dtype != "float16") else 6
        fit = trainer(
            folder,
            settings.device,
            max_steps=steps,
            precision=variant.precision,
            callbacks=[*default_callbacks(method, folder), watch],
            enable_checkpointing=True,
            logger=CSVLogger(folder),
        )
        fit.fit(method, datamodule=data(), weights_only=True)
        said, problems = _after_training(method, watch)
        if skipped := float(fit.callback_metrics.get("train/skipped_steps", 0)):
            said.append(f"{skipped:g} of {steps} steps skipped")
        saved = [path.name for path in (folder / "checkpoints").iterdir()]
        problems += [f"{file} is missing" for file in ("best.ckpt", "last.ckpt") if file not in saved]
        fit.save_checkpoint(folder / "x.ckpt")
        first = test(method)
        if method.lm.static:
            said.append(f"{method.lm.captured} graphs")
            problems += ["CUDA graphs failed"] if method.lm.captured is None else []
        L.seed_everything(2)
        again = test(make(), ckpt_path=folder / "x.ckpt")
    weights = frozen_weights(method)
    changed = [key for key, old in watch.weights.items() if not torch.equal(weights[key], old.to(weights[key].device))]
    if changed:
        problems.append(f"{len(changed)} weights of the LM changed, first {changed[0]}")
    if watch.devices != {settings.device}:
        problems.append(f"it was on {', '.join(sorted(watch.devices))}")
    if not all(math.isfinite(value) for value in (*first.values(), *again.values())):
        problems.append("a metric is not finite")
    half = variant.quantization is not None or variant.dtype != "float32" or variant.precision != "32-true"
    tolerance, difference = 2e-3 if half else 1e-5, _apart(first, again)
    if not difference <= tolerance:
        problems.append("metrics differ after reloading")
    said = [f"test/nll {first.get('test/nll', math.nan):.3f}, reload differs by {difference:.0e}", *said, *problems]
    figures = {"metrics": first, "reloaded": again, "losses": [float(loss) for loss in watch.losses]}
    expected = f"reloaded the same to {tolerance:.0e}, finite, moved, LM unchanged"
    return Row("methods", name, ", ".join(said), expected, not problems, figures=figures)


def _after_training(method: m.PromptMethod, watch: Watch) -> tuple[list[str], list[str]]:
    """Describe the result of training, and list its problems."""
    said: list[str] = []
    problems: list[str] = []
    losses = [float(loss) for loss in watch.losses]
    if any(losses):  # methods without gradients have none
        said.append(f"loss {losses[0]:.3f} to {losses[-1]:.3f}")
    if not all(math.isfinite(loss) for loss in losses):
        problems.append("a loss is not finite")
    now = trained(method)
    if "prompts" in now:
        return [*said, "kept its prompt: no proposal was better" if now == watch.start else "changed its prompt"], []
    moved = [key for key, value in now.items() if not torch.equal(value, watch.start[key])]
    said.append(f"{len(moved)} of {len(now)} tensors moved")
    if any(value.requires_grad and value.dtype != torch.float32 for value in method.parameters()):
        problems.append("a trained parameter is not in float32")
    if not moved and isinstance(method, m.HardPromptSearch):
        said.append("no candidate was better")
    elif not moved:
        problems.append("nothing moved")
    return said, problems


def _apart(first: Mapping[str, float], again: Mapping[str, float]) -> float:
    """Compute the largest difference between two sets of metrics; infinite if their names differ."""
    if set(first) != set(again):
        return math.inf
    return max((abs(first[key] - again[key]) for key in first), default=math.inf)
