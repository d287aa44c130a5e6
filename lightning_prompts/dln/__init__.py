"""Deep Language Networks (Sordoni et al. 2023, arXiv 2306.12509): layers are LM calls with trainable prompts."""
