"""Make a frozen language model better at a task by optimising the prompt, never the weights."""

__version__ = "0.1.0"
