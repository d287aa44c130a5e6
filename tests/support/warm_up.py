"""Imported by the server of `forks` ahead of all forks: imports what runs need, and does one short run."""

from __future__ import annotations

import io
import os
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout

import numpy as np
import peft
import pytest
import torch
from transformers.models.llama import modeling_llama

from lightning_prompts.cli import main, run
from support.commands import FIT, SMALL

USED = (main, modeling_llama, np, peft, pytest)
ENVIRONMENT = dict(os.environ)

torch.set_num_threads(1)
said = io.StringIO()
with tempfile.TemporaryDirectory() as folder, redirect_stdout(said), redirect_stderr(said):
    code = run([*FIT, *SMALL, "--trainer.max_steps", "1", "--trainer.default_root_dir", f"{folder}/run"])
if code:
    print(said.getvalue(), file=sys.stderr)
os.environ.clear()
os.environ.update(ENVIRONMENT)
