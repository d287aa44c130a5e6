"""Lightning callbacks, which use only the public interface of methods and write to the run folder."""

from lightning_prompts.callbacks.budget import Budget
from lightning_prompts.callbacks.gradient_scaling import GradientScaling
from lightning_prompts.callbacks.last_checkpoint import LastCheckpoint
from lightning_prompts.callbacks.non_finite_guard import NonFiniteGuard
from lightning_prompts.callbacks.prompt_path import PromptPath
from lightning_prompts.callbacks.prompt_readout import PromptReadout
from lightning_prompts.callbacks.prompt_table import PromptTable
from lightning_prompts.callbacks.result_files import ResultFiles
from lightning_prompts.callbacks.sample_generations import SampleGenerations
from lightning_prompts.callbacks.stop_on_signal import StopOnSignal
from lightning_prompts.callbacks.text_metrics import TextMetrics
from lightning_prompts.callbacks.throughput import Throughput
from lightning_prompts.callbacks.validate_at_end import ValidateAtEnd

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

if not __name__.startswith("lightning_prompts."):  # in a checkout, a second import would duplicate all classes
    raise ImportError(f"import lightning_prompts.{__name__}")
