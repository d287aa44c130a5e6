"""Deep Language Networks (Sordoni et al. 2023, arXiv 2306.12509): layers that are calls of an LM, prompts to learn."""
