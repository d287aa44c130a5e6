import dspy
import pandas as pd

lm = dspy.LM("openai/model", api_base="http://localhost:8000/v1", api_key="none", temperature=0.0, max_tokens=32)
dspy.configure(lm=lm, max_errors=10**6)


def read(split):
    rows = pd.read_csv(f"{split}.csv").itertuples()
    return [dspy.Example(question=row.question, answer=row.answer).with_inputs("question") for row in rows]


def exact_match(example, prediction, trace=None):
    return prediction.answer.strip() == example.answer


train, test = read("train"), read("test")
sentence = dspy.Predict(dspy.Signature("question -> answer", "Give the antonym of the word."))
bootstrap = dspy.BootstrapFewShot(exact_match, max_labeled_demos=5)
programs = {
    "sentence": sentence,
    "examples": dspy.LabeledFewShot(k=5).compile(sentence, trainset=train),
    "bootstrapped examples": bootstrap.compile(sentence, trainset=train[:20]),
}
evaluate = dspy.Evaluate(devset=test, metric=exact_match, num_threads=1)
scores = {name: evaluate(program).score for name, program in programs.items()}
print(pd.Series(scores))
best = programs[max(scores, key=scores.get)]
best.save("prompt.json")
print([best(question=word).answer for word in ("hot", "increase")])
