import lightning_prompts as lp

data = lp.QuestionAnswer("train.csv", "val.csv", "test.csv", template="{prompt} {question} and {answer}.", stop=r"\W")
methods = {"sentence": "static", "examples": "few_shot", "soft prompt": "soft_prompt", "prefix": "prefix"}
found = lp.compare(methods, data, lm="model", seeds=1, max_steps=30, text="Here are two antonyms:", folder="runs")
print(found)
found.report()
best = found.runs(found.table["exact_match"].idxmax())[0]
print(best.export())
print(best.answer(["hot", "increase"]))
