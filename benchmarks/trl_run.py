"""The peer of the demo run: the same work with TRL's SFTTrainer and PEFT, as their documentation shows it.

trl_run.py WORKSPACE: the same base model, rows, adapter and hyperparameters, the loss on answers only, held-out
loss in the training, exact answers before and after. Prints its figures as one line of JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import psutil
import torch
import yaml
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

workspace = Path(sys.argv[1])
model_folder = str(workspace / "models" / "demo")
settings = yaml.safe_load((workspace / "finetuning" / "olive-config.yaml").read_text())["passes"]["finetune"]
arguments = settings["training_args"]
torch.set_num_threads(1)  # as ours does for a model this small


class FirstStep(TrainerCallback):
    seconds = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self.seconds = self.seconds or time.time() - psutil.Process().create_time()


def rows(file: str):
    data = load_dataset("json", data_files=str(workspace / "dataset" / file), split="train")
    return data.map(lambda row: {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}).remove_columns(
        "messages"
    )


def accuracy(model) -> float:
    tokenizer.padding_side = "left"
    right = 0
    for start in range(0, len(held_out), 32):
        batch = held_out[start : start + 32]
        inputs = tokenizer.apply_chat_template(
            batch["prompt"], add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**inputs, max_new_tokens=9, do_sample=False, eos_token_id=end_of_turn)
        answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(a.strip() == c[0]["content"] for a, c in zip(answers, batch["completion"], strict=True))
    return right / len(held_out)


tokenizer = AutoTokenizer.from_pretrained(model_folder)
end_of_turn = tokenizer.convert_tokens_to_ids("<|end|>")
model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
train, held_out = rows("sample-train.jsonl"), rows("sample-heldout.jsonl")
before = accuracy(model)
first_step = FirstStep()
trainer = SFTTrainer(
    model=model,
    processing_class=tokenizer,
    train_dataset=train,
    eval_dataset=held_out,
    peft_config=LoraConfig(
        r=settings["r"],
        lora_alpha=settings["alpha"],
        lora_dropout=settings["lora_dropout"],
        target_modules=settings["target_modules"],
        task_type="CAUSAL_LM",
    ),
    callbacks=[first_step],
    args=SFTConfig(
        output_dir=str(workspace / "models" / "trl"),
        num_train_epochs=arguments["num_train_epochs"],
        learning_rate=arguments["learning_rate"],
        warmup_steps=arguments["warmup_steps"],
        per_device_train_batch_size=arguments["per_device_train_batch_size"],
        per_device_eval_batch_size=arguments["per_device_eval_batch_size"],
        gradient_checkpointing=False,
        eval_strategy="steps",
        eval_steps=0.1,
        save_steps=0.1,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        logging_steps=0.02,
        max_length=256,
        seed=42,
        bf16=False,
        use_cpu=True,
        report_to="none",
    ),
)
training = time.time()
trainer.train()
training = time.time() - training
trainer.save_model(str(workspace / "models" / "trl" / "adapter"))
trainer.model.eval()
figures = {"first_step": first_step.seconds, "training": training, "before": before, "after": accuracy(trainer.model)}
print(json.dumps(figures))
