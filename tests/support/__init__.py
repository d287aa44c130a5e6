"""What several tests share: models, small trainings, references, processes, a server, a pretend device."""
