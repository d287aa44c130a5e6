"""Export a trained prompt to files for other programs, each checked by scoring through it."""
