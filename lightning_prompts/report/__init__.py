"""``lightning-prompts report``: compare runs on one page."""
