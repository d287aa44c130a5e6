"""Two processes come to what one comes to: the same losses, prompts, metrics and files."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from lightning_prompts.callbacks import Budget, ResultFiles, SampleGenerations, TextMetrics, Throughput, ValidateAtEnd
from lightning_prompts.datamodules import Antonyms, Hyperbaton, Mixture, QuestionAnswer
from lightning_prompts.dln.layer import LanguageLayer
from lightning_prompts.dln.posterior import Posterior
from lightning_prompts.dln.proposals import (
    Crossover,
    InducedInstructions,
    LanguageModelProposals,
    MinedExamples,
    Paraphrases,
    Reflection,
    RuleRewrites,
)
from lightning_prompts.errors import UserError
from lightning_prompts.estimators.baselines import LeaveOneOut, MovingAverage, SelfCritical, ValueHead
from lightning_prompts.estimators.reinforce import TopK, ZScore
from lightning_prompts.estimators.relaxations import GumbelSoftmax, Projected, Softmax, StraightThrough
from lightning_prompts.lm import FrozenLM, LMConfig, Server
from lightning_prompts.methods import (
    Ape,
    Capo,
    DeepLanguageNetwork,
    DemonstrationSearch,
    FixedPrompt,
    Gepa,
    HardPromptSearch,
    LatentSeek,
    LoraTuning,
    PrefixTuning,
    PromptDistillation,
    PromptMethod,
    RefinerTuning,
    ReinforceRefiner,
    RelaxedPromptTuning,
    ScratchTransformer,
    SoftPromptTuning,
)
from lightning_prompts.methods.self_study import SelfStudy
from lightning_prompts.objectives import Divergence, Likelihood
from lightning_prompts.objectives.bertscore import BertScoreLoss
from lightning_prompts.objectives.rewards import AnswerLikelihood, BertScore, ExactMatch, TokenF1
from lightning_prompts.objectives.rewards import Mixture as MixedReward
from lightning_prompts.objectives.weighted_sum import WeightedSum
from lightning_prompts.parallel import LMParallel, mesh_sizes
from lightning_prompts.processes import DataParallelRank
from lightning_prompts.prompts.initializers import FromText
from lightning_prompts.prompts.soft import ResidualMLP
from lightning_prompts.refiners.networks import MLPRefiner, TransformerRefiner
from lightning_prompts.search.demonstrations import RandomDemonstrations
from lightning_prompts.search.rounding import Rounding
from lightning_prompts.search.scoring import Racing
from lightning_prompts.types import Batch, Example
from support.models import SHAPES, SMALLEST
from support.processes import result, together

pytestmark = pytest.mark.timeout(1500)  # all jobs of two processes are done ahead of the first test

LM = LMConfig(SMALLEST)
Make = Callable[[], PromptMethod]


class Whole(SoftPromptTuning):
    """Like a user's own method that knows nothing of shares: every process works on the whole batch."""

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        return self.answer_step(batch, self.current_prompt(), self.objective)


# Every way to follow a gradient, in the settings whose means over the batch differ most from one process's own.
GRADIENT: dict[str, Make] = {
    "soft": lambda: SoftPromptTuning(3, reparametrization=ResidualMLP(8), lm=LM, max_new_tokens=2),
    "soft-tokens": lambda: SoftPromptTuning(3, objective=Likelihood("tokens"), lm=LM, max_new_tokens=2),
    "latent-seek": lambda: LatentSeek(3, 2, samples=2, lm=LM, max_new_tokens=2),
    "soft-whole": lambda: Whole(3, objective=Likelihood("tokens"), lm=LM, max_new_tokens=2),
    "prefix": lambda: PrefixTuning(3, lm=LM, max_new_tokens=2),
    "distillation": lambda: PromptDistillation(
        3, shots=2, objective=Divergence(top_k=9, mean_over="tokens"), lm=LM, max_new_tokens=2
    ),
    "distillation-study": lambda: PromptDistillation(
        3, "prefix", context="Up.", self_study=SelfStudy(size=7, max_question_tokens=4), lm=LM, max_new_tokens=2
    ),
    "relaxed-softmax": lambda: RelaxedPromptTuning(
        3, Softmax(), rounding=Rounding(2, 4, 8, 1), lm=LM, max_new_tokens=2
    ),
    "relaxed-gumbel": lambda: RelaxedPromptTuning(3, GumbelSoftmax(), lm=LM, max_new_tokens=2),
    "relaxed-straight": lambda: RelaxedPromptTuning(3, StraightThrough(1.0), lm=LM, max_new_tokens=2),
    "relaxed-pez": lambda: RelaxedPromptTuning(
        3, Projected(), optimizer=lambda p: torch.optim.Adam(p, lr=0.05), lm=LM, max_new_tokens=2
    ),
    "refiner": lambda: RefinerTuning(2, lm=LM, max_new_tokens=2),
    "refiner-gumbel": lambda: RefinerTuning(
        2, TransformerRefiner(8, 1, 2), estimator=GumbelSoftmax(), lm=LM, max_new_tokens=2
    ),
    "refiner-straight": lambda: RefinerTuning(
        2, MLPRefiner(8), estimator=StraightThrough(1.0), lm=LM, cache_states=False, max_new_tokens=2
    ),
    "refiner-bertscore": lambda: RefinerTuning(
        2, objective=WeightedSum([Likelihood("tokens"), BertScoreLoss()], [1.0, 0.5]), lm=LM, max_new_tokens=2
    ),
    "reinforce-average": lambda: ReinforceRefiner(
        support=TopK(20), baseline=MovingAverage(), whitened=True, entropy_weight=0.1, lm=LM, max_new_tokens=2
    ),
    "reinforce-value": lambda: ReinforceRefiner(
        refiner=MLPRefiner(8), support=TopK(20), baseline=ValueHead(8), samples=2, lm=LM, max_new_tokens=2
    ),
    "reinforce-critical": lambda: ReinforceRefiner(
        support=TopK(20),
        baseline=SelfCritical(),
        lm=LM,
        max_new_tokens=2,
        pass_rows=8,
        reward=MixedReward([TokenF1(), AnswerLikelihood()], [1.0, 1.0]),
    ),
    "reinforce-leave-one-out": lambda: ReinforceRefiner(
        refiner=TransformerRefiner(8, 1, 2),
        support=TopK(20),
        baseline=LeaveOneOut(),
        shaping=ZScore(),
        lm=LM,
        max_new_tokens=2,
    ),
    "lora": lambda: LoraTuning(2, lm=LM, max_new_tokens=2),
    "scratch": lambda: ScratchTransformer(1, 16, 2, max_new_tokens=2),
}


class Watch(L.Callback):
    """Keeps what each step has logged."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        logged = trainer.callback_metrics
        self.steps.append({name: float(value) for name, value in logged.items() if name.startswith("train/")})


class Gradients(L.Callback):
    """Keeps the gradients of the first step."""

    def __init__(self) -> None:
        self.kept: dict[str, torch.Tensor] = {}
        self.numbers = 0  # of the LM in this process

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        if self.kept:
            return
        self.kept = {name: value.grad.clone() for name, value in pl_module.named_parameters() if value.grad is not None}
        parameters = pl_module.lm.model.parameters()
        self.numbers = sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in parameters)


def trainer(count: int, folder: Path, strategy: Any = "ddp", **settings: Any) -> L.Trainer:
    alone = {"strategy": "auto"} if count == 1 else {"strategy": strategy}
    return L.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        devices=count,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        gradient_clip_val=1.0,
        **{"enable_checkpointing": False, **alone, **settings},
    )


def antonyms() -> Antonyms:
    """11 examples in batches of 5: one process of two has 2 or 3 of them, and of the last batch none."""
    return Antonyms(batch_size=5, eval_batch_size=4, max_train_examples=11, val_fraction=0.003, test_fraction=0.003)


def fit(make: Make, count: int, folder: Path, strategy: Any = None, data: Any = None, steps: int = 3) -> dict[str, Any]:
    """Train for some steps; what was logged, trained and found on validation."""
    L.seed_everything(3, verbose=False)
    watch, budget, gradients = Watch(), Budget(), Gradients()
    kept = [watch, budget, gradients, Throughput(), SampleGenerations(2), ValidateAtEnd()]
    often = {"val_check_interval": 1} if strategy else {}
    run = trainer(count, folder, strategy or "ddp", max_steps=steps, callbacks=kept, **often)
    method = make()
    run.fit(method, datamodule=data() if data else antonyms())
    run.save_checkpoint(folder / "trained.ckpt")
    return {
        "gradients": gradients.kept,
        "numbers": gradients.numbers,
        "inference_mode": run.fit_loop.epoch_loop.val_loop.inference_mode,
        "steps": watch.steps,
        "state": {name: value.clone() for name, value in method.state_dict().items()},
        "val": {name: float(value) for name, value in run.callback_metrics.items() if name.startswith("val/")},
        "tokens": method.tokens_forwarded,
        "budget": budget.used,
        "text": method.prompt_text(),
        "rows": json.dumps(method.proposed()),
        "samples": (folder / "samples.jsonl").read_text() if run.is_global_zero else "",
    }


def fitting(name: str, count: int, folder: Path) -> dict[str, Any]:
    return fit(GRADIENT[name], count, folder)


# --- searches ---------------------------------------------------------------------------------------------------------

LONG = LMConfig(f"{SMALLEST},max_position_embeddings=900")
SEARCHES: dict[str, Make] = {
    "search": lambda: HardPromptSearch(
        4,
        FromText(" one two"),
        candidates=13,
        top_k=20,
        buffer=2,
        n_replace=2,
        filter=False,
        fluency=0.1,
        racing=Racing(2),
        lm=LM,
        max_new_tokens=2,
    ),
    "network": lambda: DeepLanguageNetwork(
        [LanguageLayer("Think.", max_new_tokens=4), LanguageLayer("Say.")],
        proposals=[LanguageModelProposals(3, max_new_tokens=8, shown=1), RuleRewrites(3), MinedExamples(2)],
        posterior=Posterior(samples=2),
        trust=0.1,
        error_weight=0.5,
        max_prompt_tokens=300,
        lm=LONG,
    ),
    "ape": lambda: Ape("Say.", InducedInstructions(3, 1, max_new_tokens=8), Paraphrases(3, max_new_tokens=8), lm=LONG),
    "gepa": lambda: Gepa(
        [LanguageLayer("Think.", max_new_tokens=4), LanguageLayer("Say.")],
        reflection=Reflection(3, 1.0, 8),
        reward=AnswerLikelihood(),
        lm=LONG,
    ),
    "capo": lambda: Capo(
        "Say.",
        InducedInstructions(3, 1, 1.0, 8),
        Crossover(2, 1.0, 8),
        Paraphrases(3, 1.0, 8),
        3,
        2,
        racing=Racing(3, 0.4),
        lm=LONG,
    ),
    "demonstrations": lambda: DemonstrationSearch(
        "Say.",
        [RandomDemonstrations(5, 2)],
        [RuleRewrites(2)],
        Racing(3, 0.4),
        lm=LMConfig(f"{LONG.name},initializer_range=0.2"),
    ),
}


def hyperbaton() -> Hyperbaton:
    return Hyperbaton(train_size=9, val_size=7, test_size=7, batch_size=4, eval_batch_size=3)


def searching(name: str, count: int, folder: Path) -> dict[str, Any]:
    return fit(SEARCHES[name], count, folder, data=None if name == "search" else hyperbaton, steps=3)


# --- evaluation -------------------------------------------------------------------------------------------------------


def judging(count: int, folder: Path) -> dict[str, Any]:
    """7 test questions of two tasks in batches of 3, then predictions: one process has none of the last one."""
    folder.mkdir(parents=True, exist_ok=True)
    members = {}
    for name, size in (("long", 4), ("short", 3)):
        paths = []
        for split in ("train", "val", "test"):
            rows = [{"question": f"{split} {n}" + " and" * n, "answer": "yes no"[: 3 + n]} for n in range(size)]
            paths.append(folder / f"{name}-{split}-{os.getpid()}.jsonl")
            paths[-1].write_text("\n".join(map(json.dumps, rows)))
        members[name] = QuestionAnswer(*map(str, paths))
    data = Mixture(members, eval_batch_size=3)
    L.seed_everything(3, verbose=False)
    run = trainer(count, folder, callbacks=[ResultFiles(), TextMetrics([TokenF1(), ExactMatch(), BertScore()])])
    method = RefinerTuning(2, estimator=GumbelSoftmax(), lm=LM, max_new_tokens=5)
    run.test(method, datamodule=data, verbose=False)
    run.predict(method, datamodule=data, return_predictions=False)
    return {}


def classifying(count: int, folder: Path) -> dict[str, Any]:
    run = trainer(count, folder, callbacks=[ResultFiles()])
    run.test(FixedPrompt("Say.", LONG), datamodule=hyperbaton(), verbose=False)
    return {}


def files(folder: Path) -> dict[str, Any]:
    """The result files of a run."""
    found: dict[str, Any] = {"metrics": json.loads((folder / "metrics.json").read_text())}
    for name in ("predictions", "generations"):
        if (folder / f"{name}.jsonl").exists():
            found[name] = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    return found


def differently_seeded(count: int, folder: Path) -> dict[str, Any]:
    os.environ.pop("PL_GLOBAL_SEED", None)  # what earlier jobs have said
    if count > 1:
        torch.manual_seed(torch.distributed.get_rank())
    run = trainer(count, folder, max_steps=1)
    try:
        run.fit(SoftPromptTuning(3, lm=LM), datamodule=antonyms())
    except UserError as error:
        return {"error": str(error)}
    return {}


# --- an LM in pieces --------------------------------------------------------------------------------------------------

PIECES = {"heads": ("auto", 2), "weights": (2, "auto")}  # data_parallel_size, tensor_parallel_size


def prompts(shape: str) -> dict[str, Make]:
    lm = LMConfig(SHAPES[shape])
    return {
        "soft": lambda: SoftPromptTuning(3, lm=lm, max_new_tokens=4),
        "prefix": lambda: PrefixTuning(3, mlp=None, lm=lm, max_new_tokens=4),
        "checkpointed": lambda: SoftPromptTuning(
            3, lm=LMConfig(SHAPES[shape], gradient_checkpointing=True), max_new_tokens=4
        ),
        "refiner": lambda: RefinerTuning(2, TransformerRefiner(8, 1, 2), lm=lm, max_new_tokens=4),
        "reinforce": lambda: ReinforceRefiner(support=TopK(20), baseline=MovingAverage(), lm=lm, max_new_tokens=4),
        "search": lambda: HardPromptSearch(
            3, FromText(" one"), candidates=9, top_k=20, filter=False, lm=lm, max_new_tokens=4
        ),
    }


# Heads are split by a plan for each architecture. Weights are split alike in all, and gathered for each pass: also for
# one that is repeated, and for as many as the slowest process needs.
SHARDED = [("heads", "llama", name) for name in ("soft", "checkpointed", "refiner", "reinforce", "search")]
SHARDED += [("heads", "gemma3", "soft"), ("heads", "qwen3", "prefix"), ("heads", "qwen2", "soft")]
SHARDED += [("weights", "llama", "checkpointed"), ("weights", "llama", "search"), ("weights", "qwen3", "prefix")]


def in_pieces(shape: str, prompt: str, pieces: str, count: int, folder: Path) -> dict[str, Any]:
    """Train, and save what was trained."""
    return fit(prompts(shape)[prompt], count, folder, LMParallel(*PIECES[pieces]), steps=2)


def uneven(count: int, folder: Path) -> dict[str, Any]:
    """The first process has five passes to run, the other one; then both follow a gradient."""
    lm, rank = FrozenLM.load(LM), 0
    if count > 1:
        rank = torch.distributed.get_rank()
        lm.spread_over(init_device_mesh("cpu", (count, 1), mesh_dim_names=("data_parallel", "tensor_parallel")))
    data = antonyms()
    data.setup("fit")
    examples = data.examples("train")
    with torch.no_grad():
        own = [lm.score([example], torch.zeros(0, lm.width)).nll.item() for example in examples[: 1 if rank else 5]]
        texts = lm.generate(examples[:2], torch.zeros(0, lm.width), 1 + 5 * rank)
    tokens = lm.tokens_forwarded
    lm.barrier()
    prompt = torch.full((2, lm.width), 0.1, requires_grad=True)
    lm.score(examples[5 + rank : 6 + rank], prompt).nll.sum().backward()
    assert prompt.grad is not None
    return {"nll": own, "texts": texts, "gradient": prompt.grad, "tokens": tokens}


def refused(count: int, folder: Path) -> dict[str, Any]:
    """What cannot be split is said."""
    found = {}
    cases: dict[str, tuple[Make, tuple[int, int]]] = {
        "weights are trained": (lambda: LoraTuning(lm=LM), (1, 2)),
        "no plan": (lambda: SoftPromptTuning(3, lm=LMConfig(SHAPES["gpt2"])), (1, 2)),
        "heads": (lambda: SoftPromptTuning(3, lm=LMConfig(SMALLEST + ",num_key_value_heads=1")), (1, 2)),
        "float16": (lambda: SoftPromptTuning(3, lm=LMConfig(SMALLEST, dtype="float16")), (2, 1)),
        "server": (
            lambda: DeepLanguageNetwork(proposer=LMConfig("x", server=Server("http://localhost:1/v1")), lm=LM),
            (1, 2),
        ),
        "steps for each question": (lambda: LatentSeek(3, lm=LM), (2, 1)),
        "several": (lambda: DeepLanguageNetwork(proposer=LMConfig(SHAPES["qwen2"]), lm=LM), (2, 1)),
    }
    for name, (make, sizes) in cases.items():
        try:
            trainer(count, folder, LMParallel(*sizes), max_steps=1).fit(make(), datamodule=antonyms())
        except UserError as error:
            found[name] = str(error)
    return found


@pytest.mark.parametrize("sizes", [(2, 4), (3, "auto"), ("auto", 5), (0, "auto")], ids=str)
def test_sizes_that_do_not_go_with_the_processes(sizes: tuple[Any, Any]) -> None:
    with pytest.raises(UserError, match=r"must be the number of processes, 4; set one of them to auto"):
        mesh_sizes(*sizes, nodes=2, devices=2)


def accumulating(count: int, folder: Path) -> dict[str, Any]:
    """Train for one step of two batches, and again from a checkpoint between them."""
    found = {}
    for name, resume in (("whole", None), ("resumed", folder / "between.ckpt")):
        L.seed_everything(3, verbose=False)

        class Saver(L.Callback):
            def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
                if not trainer.global_step:
                    trainer.save_checkpoint(folder / "between.ckpt")

        gradients = Gradients()
        settings = {"max_steps": 1, "accumulate_grad_batches": 2, "limit_val_batches": 0}
        run = trainer(count, folder, callbacks=[gradients, Saver()], **settings)
        run.fit(SoftPromptTuning(3, lm=LM), datamodule=antonyms(), ckpt_path=resume, weights_only=True)
        found[name] = gradients.kept
    return found


# --- all of them ------------------------------------------------------------------------------------------------------

JOBS: dict[str, Callable[[int, Path], dict[str, Any]]] = {
    **{name: functools.partial(fitting, name) for name in GRADIENT},
    **{name: functools.partial(searching, name) for name in SEARCHES},
    "judging": judging,
    "classifying": classifying,
    "differently-seeded": differently_seeded,
    "accumulating": accumulating,
    **{
        f"{pieces}-{shape}-{prompt}": functools.partial(in_pieces, shape, prompt, pieces)
        for pieces, shape, prompt in SHARDED
    },
    "uneven": uneven,
    "refused": refused,
}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have done all jobs."""
    folder = tmp_path_factory.mktemp("two")
    together(JOBS, folder)
    return folder


@pytest.fixture
def one(tmp_path: Path) -> Callable[[str], dict[str, Any]]:
    """Does a job in this process alone."""
    return lambda name: JOBS[name](1, tmp_path / name)


@pytest.fixture(scope="module")
def in_one_piece(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], dict[str, Any]]:
    """Trains with an LM that is not split; once for all ways to split it."""
    return functools.cache(lambda shape, prompt: in_pieces(shape, prompt, "heads", 1, tmp_path_factory.mktemp("whole")))


def close(mine: dict[str, float], theirs: dict[str, float], tolerance: float = 1e-5) -> None:
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        # A share of a gain is a ratio of small differences.
        most = max(tolerance, 1e-3) if name.endswith("_gain_kept") else tolerance
        assert theirs[name] == pytest.approx(value, rel=most, abs=most), name


@pytest.mark.parametrize("name", GRADIENT)
def test_the_losses_are_those_of_one_process(name: str, two: Path, one: Callable[[str], dict[str, Any]]) -> None:
    alone, ranks = one(name), [result(two, name, rank) for rank in (0, 1)]
    assert len(alone["steps"]) == 3
    for both in ranks:
        assert len(both["steps"]) == 3
        for mine, theirs in zip(alone["steps"], both["steps"], strict=True):
            close(mine, theirs)
        close(alone["val"], both["val"])
        for key, value in alone["state"].items():
            assert both["state"][key].shape == value.shape
            assert torch.allclose(both["state"][key].float(), value.float(), rtol=1e-3, atol=1e-4), key
    for key, value in ranks[0]["state"].items():
        assert torch.equal(value, ranks[1]["state"][key]), f"{key} is the same in both"
    samples = [json.loads(line) for line in alone["samples"].splitlines()]
    theirs = [json.loads(line) for line in ranks[0]["samples"].splitlines()]
    assert [row["question"] for row in samples] == [row["question"] for row in theirs]


@pytest.mark.parametrize("name", SEARCHES)
def test_searches_end_with_the_prompt_of_one_process(
    name: str, two: Path, one: Callable[[str], dict[str, Any]]
) -> None:
    alone, ranks = one(name), [result(two, name, rank) for rank in (0, 1)]
    assert [both["text"] for both in ranks] == [alone["text"]] * 2
    for both in ranks:
        close(alone["val"], both["val"], 1e-4)
        mine, theirs = json.loads(alone["rows"]), json.loads(both["rows"])
        assert [row["prompt"] for row in mine] == [row["prompt"] for row in theirs]
        assert [row["reward"] for row in theirs] == pytest.approx([row["reward"] for row in mine], abs=1e-4)
    assert ranks[0]["tokens"] < alone["tokens"], "the work was split"
    assert ranks[1]["tokens"] < alone["tokens"]


def test_the_budget_is_that_of_all(two: Path) -> None:
    for name in GRADIENT:
        ranks = [result(two, name, rank) for rank in (0, 1)]
        assert ranks[0]["budget"] == ranks[1]["budget"]
        used = ranks[0]["budget"]["tokens"]
        assert used > max(both["budget"]["steps"] for both in ranks)
        assert used <= sum(both["tokens"] for both in ranks)  # validation is in these
    search = [result(two, "search", rank) for rank in (0, 1)]
    assert search[0]["budget"]["tokens"] > max(both["tokens"] for both in search) * 0.9


@pytest.mark.parametrize("name", ["judging", "classifying"])
def test_metrics_and_files_are_those_of_one_process(
    name: str, two: Path, one: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    one(name)
    alone, both = files(tmp_path / name), files(two / name)
    assert alone.keys() == both.keys()
    assert alone["metrics"]["test/examples"] == 7
    close(alone["metrics"], both["metrics"])
    for kind in [key for key in alone if key != "metrics"]:
        assert len(both[kind]) == len(alone[kind]) == 7
        for mine, theirs in zip(alone[kind], both[kind], strict=True):
            numbers = ("nll", "correct")
            assert {key: value for key, value in mine.items() if key not in numbers} == {
                key: value for key, value in theirs.items() if key not in numbers
            }
            assert theirs["nll"] == pytest.approx(mine["nll"], abs=1e-5)
    if name == "judging":
        expected = {
            f"test/{name}{metric}" for name in ("", "long/", "short/") for metric in ("nll", "exact_match", "examples")
        }
        assert {*expected, "test/bertscore", "test/token_f1", "test/relaxed_nll"} <= alone["metrics"].keys()
        assert (alone["metrics"]["test/long/examples"], alone["metrics"]["test/short/examples"]) == (4, 3)


def test_different_seeds_are_refused(two: Path) -> None:
    for rank in (0, 1):
        assert "different seeds" in result(two, "differently-seeded", rank)["error"]


def test_a_run_resumes_with_the_gradients_of_all_processes(two: Path) -> None:
    for rank in (0, 1):
        found = result(two, "accumulating", rank)
        assert found["whole"]
        for name, value in found["whole"].items():
            assert torch.allclose(found["resumed"][name], value, rtol=1e-5, atol=1e-8), name


def test_hidden_states_are_computed_once(two: Path) -> None:
    kept = list((two / "cache" / "states").glob("*.safetensors"))
    assert kept
    assert not list((two / "cache" / "states").glob("*.part"))


@pytest.mark.parametrize(("pieces", "shape", "prompt"), SHARDED, ids=str)
def test_an_lm_in_pieces_trains_the_same_prompt(
    pieces: str, shape: str, prompt: str, two: Path, in_one_piece: Callable[[str, str], dict[str, Any]], tmp_path: Path
) -> None:
    name = f"{pieces}-{shape}-{prompt}"
    alone = in_one_piece(shape, prompt)
    assert result(two, name, 0)["budget"] == result(two, name, 1)["budget"], "so that they stop at the same step"
    for rank in (0, 1):
        both = result(two, name, rank)
        assert both["gradients"].keys() == alone["gradients"].keys()
        for key, value in alone["gradients"].items():
            # Of one size: a prefix has gradients of very small numbers.
            assert torch.allclose(both["gradients"][key], value, rtol=1e-4, atol=1e-5 * float(value.abs().max())), key
        assert not both["inference_mode"], "whose tensors the next step could not use"
        assert both["numbers"] < 0.75 * alone["numbers"], "the weights are spread"
        for mine, theirs in zip(alone["steps"], both["steps"], strict=True):
            close(mine, theirs)
        close(alone["val"], both["val"])
    # The checkpoint is one of any run.
    saved = torch.load(two / name / "trained.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == alone["state"].keys()
    method = prompts(shape)[prompt]()
    found = trainer(1, tmp_path, limit_test_batches=2).test(
        method, datamodule=antonyms(), ckpt_path=two / name / "trained.ckpt", verbose=False
    )
    assert 0 < found[0]["test/nll"] < 20


def test_processes_wait_for_the_passes_of_others(two: Path) -> None:
    ranks = [result(two, "uneven", rank) for rank in (0, 1)]
    lm, data = FrozenLM.load(LM), antonyms()
    data.setup("fit")
    examples = data.examples("train")
    for rank, both in enumerate(ranks):
        prompt = torch.zeros(0, lm.width)
        wanted = [lm.score([example], prompt).nll.item() for example in examples[: 1 if rank else 5]]
        assert both["nll"] == pytest.approx(wanted, abs=1e-5)
        assert both["texts"] == lm.generate(examples[:2], prompt, 1 + 5 * rank)
        trained = torch.full((2, lm.width), 0.1, requires_grad=True)
        lm.score(examples[5 + rank : 6 + rank], trained).nll.sum().backward()
        assert trained.grad is not None
        assert torch.allclose(both["gradient"], trained.grad, atol=1e-6)
    assert ranks[0]["tokens"] != ranks[1]["tokens"], "idle passes are not counted"


def test_what_cannot_be_split_is_said(two: Path) -> None:
    for rank in (0, 1):
        found = result(two, "refused", rank)
        for name, words in (
            ("weights are trained", "set trainer.strategy to ddp"),
            ("no plan", "data_parallel_size to the number of devices"),
            ("heads", "1 key/value heads"),
            ("float16", "set model.lm.dtype to bfloat16"),
            ("server", "tensor_parallel_size to 1"),
            ("several", "data_parallel_size to 1"),
            ("steps for each question", "model.steps to 0"),
        ):
            assert words in found[name], name


# --- how work is split ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("total", [0, 1, 2, 5, 8, 11])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_parts_are_even_and_make_up_the_whole(total: int, count: int) -> None:
    parts = [DataParallelRank(rank, count).part(total) for rank in range(count)]
    assert [index for part in parts for index in part] == list(range(total))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("total", [1, 2, 5, 8, 11])
@pytest.mark.parametrize("count", [2, 3, 8])
def test_the_mean_of_weighted_means_is_the_mean(total: int, count: int) -> None:
    batch = Batch([Example("", "", str(n * n)) for n in range(total)])
    parts = [DataParallelRank(rank, count).part_of(batch) for rank in range(count)]
    assert all(len(part) for part in parts)
    means = [part.weight * sum(float(str(e.answer)) for e in part.examples) / len(part) for part in parts]
    assert sum(means) / count == pytest.approx(sum(n * n for n in range(total)) / total)
