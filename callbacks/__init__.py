"""Callbacks see a method's public interface only, and write into the run folder."""

from callbacks.budget import Budget
from callbacks.gradient_scaling import GradientScaling
from callbacks.last_checkpoint import LastCheckpoint
from callbacks.non_finite_guard import NonFiniteGuard
from callbacks.prompt_path import PromptPath
from callbacks.prompt_readout import PromptReadout
from callbacks.prompt_table import PromptTable
from callbacks.result_files import ResultFiles
from callbacks.sample_generations import SampleGenerations
from callbacks.stop_on_signal import StopOnSignal
from callbacks.text_metrics import TextMetrics
from callbacks.throughput import Throughput
from callbacks.validate_at_end import ValidateAtEnd

__all__ = [
    "Budget",
    "GradientScaling",
    "LastCheckpoint",
    "NonFiniteGuard",
    "PromptPath",
    "PromptReadout",
    "PromptTable",
    "ResultFiles",
    "SampleGenerations",
    "StopOnSignal",
    "TextMetrics",
    "Throughput",
    "ValidateAtEnd",
]
