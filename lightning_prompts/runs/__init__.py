"""Run folders: what a run writes, how to read it, and how to launch one run or many."""
