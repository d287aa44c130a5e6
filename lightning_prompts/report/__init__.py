"""``lightning-prompts report``: what runs have found, side by side, on one page."""
