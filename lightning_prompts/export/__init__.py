"""Taking a run's prompt home: files that other programs read, each checked by scoring through it."""
