import re

import pandas as pd
import torch
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

STEPS = 30
train, test = pd.read_csv("train.csv"), pd.read_csv("test.csv")
tokenizer = AutoTokenizer.from_pretrained("model", padding_side="left")


def load():
    return AutoModelForCausalLM.from_pretrained("model", dtype=torch.float32)


def answers(model, questions, text=""):
    batch = tokenizer([f"{text} {question} and" for question in questions], return_tensors="pt", padding=True)
    with torch.no_grad():
        written = model.generate(**batch, max_new_tokens=16, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    new = tokenizer.batch_decode(written[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    return [re.split(r"\W", one.strip())[0] for one in new]


def exact_match(model, text=""):
    found = []
    for start in range(0, len(test), 50):
        found += answers(model, test["question"][start : start + 50], text)
    return sum(one == right for one, right in zip(found, test["answer"], strict=True)) / len(test)


def encode(rows):
    ids, labels = [], []
    for row in rows.itertuples():
        question, answer = (tokenizer(text).input_ids for text in (f" {row.question} and", f" {row.answer}."))
        ids.append(torch.tensor(question + answer))
        labels.append(torch.tensor([-100] * len(question) + answer))
    pad = torch.nn.utils.rnn.pad_sequence
    mask = pad([torch.ones_like(one) for one in ids], batch_first=True)
    labels = pad(labels, batch_first=True, padding_value=-100)
    return {"input_ids": pad(ids, batch_first=True), "labels": labels, "attention_mask": mask}


def fit(config, rate):
    torch.manual_seed(0)
    model = get_peft_model(load(), config)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)
    for step in range(STEPS):
        model(**encode(train.sample(32, random_state=step))).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


examples = "\n".join(f" {row.question} and {row.answer}." for row in train.sample(5, random_state=0).itertuples())
base = load()
scores = {
    "sentence": exact_match(base, "Here are two antonyms:"),
    "examples": exact_match(base, f"Here are two antonyms:{examples}\n"),
}
soft = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20)
prefix = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20, prefix_projection=True)
models = {"soft prompt": fit(soft, 2e-2), "prefix": fit(prefix, 5e-4)}
scores |= {name: exact_match(model) for name, model in models.items()}
print(pd.Series(scores))
best = max(models, key=lambda name: scores[name])
models[best].save_pretrained("adapter")
print(best, answers(models[best], ["hot", "increase"]))
