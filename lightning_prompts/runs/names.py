"""Names of the files and folders in a run folder."""

from __future__ import annotations

CONFIG = "config.yaml"  # all settings of the run
ENVIRONMENT = "environment.json"  # versions, machine and precision

METRICS = "metrics.json"  # of `test`
PREDICTIONS = "predictions.jsonl"  # of `test`: one row for each question
TESTED = "tested.json"  # of `test`: the checkpoint and its step
VALIDATION = "validation.json"  # of `validate`
GENERATIONS = "generations.jsonl"  # of `predict`
RESULTS = (METRICS, PREDICTIONS, TESTED, VALIDATION, GENERATIONS)
BUDGET = "budget.json"  # what training cost
SAMPLES = "samples.jsonl"  # answers to a few validation questions during training
READOUT = "prompt.jsonl"  # the tokens nearest to the prompt at each validation
PROMPT_TEXT = "prompt.txt"  # the best prompt, where it is text
CANDIDATES = "prompts.jsonl"  # the prompts that a method tried
PROMPT_PATH = "prompt_path.jsonl"  # a projection of the prompt's vectors at each validation
TRAINING = (BUDGET, SAMPLES, READOUT, PROMPT_TEXT, CANDIDATES, PROMPT_PATH)

CHECKPOINTS = "checkpoints"
BEST, LAST = "best.ckpt", "last.ckpt"
LOGS = "logs"  # one folder version_N for each start
CURVES = "metrics.csv"  # in a folder of the logs
LOGGERS = "loggers.json"  # in the logs: where a resumed run continues in W&B and MLflow

# Written by the launcher of many runs.
SECONDS = "seconds.json"  # how long `fit` took
RECORD = "run.json"  # the settings that the run was launched with
OUTPUT = "output.txt"  # what the run printed
