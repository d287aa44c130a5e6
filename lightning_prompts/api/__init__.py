"""The Python API: `fit`, `load`, `compare`.

Each call does what a command of the command line does, with the same settings and the same results. Errors are
`UserError`s with the same text. The LM stays loaded between calls.
"""

from lightning_prompts.api.comparison import Comparison, compare
from lightning_prompts.api.fitting import fit
from lightning_prompts.api.loaded_lms import free_lms
from lightning_prompts.api.prompt_run import PromptRun, load

__all__ = ["Comparison", "PromptRun", "compare", "fit", "free_lms", "load"]
