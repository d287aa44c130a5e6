"""Search over discrete prompts: which candidates to try, and how good they are."""
