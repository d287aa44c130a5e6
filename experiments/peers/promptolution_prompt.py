import pandas as pd
from promptolution.llms import LocalLLM
from promptolution.optimizers import OPRO
from promptolution.predictors import MarkerBasedPredictor
from promptolution.tasks import ClassificationTask
from promptolution.utils.evaluation import evaluate_prompts

SENTENCE = "Give the antonym of the word between <final_answer> and </final_answer>."
llm = LocalLLM("model", batch_size=30)
llm.pipeline._forward_params["max_new_tokens"] = 32  # 256 are fixed, and take minutes for each batch on a CPU
predictor = MarkerBasedPredictor(llm)
val, test = (
    ClassificationTask(pd.read_csv(f"{split}.csv"), "Give the antonym of the word.", "question", "answer")
    for split in ("val", "test")
)
optimizer = OPRO(predictor, val, llm, [SENTENCE], num_instructions_per_step=2)
prompts = optimizer.optimize(n_steps=2)
table = evaluate_prompts([SENTENCE, prompts[0].construct_prompt()], test, predictor)
print(table)
table.to_csv("prompts.csv", index=False)
print(predictor.predict([table["prompt"][0]] * 2, ["hot", "increase"])[0])
