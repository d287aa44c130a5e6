"""Search over discrete prompts: draw candidates and score them."""
