"""``python grpo_worker.py POLICY FOLDER`` under accelerate launch: one GRPO update on the rows in FOLDER.

Its completions are fixed by their prompts. Writes the gradients of the update and its log to FOLDER.
"""

import sys
from pathlib import Path

from safetensors.torch import save_file
from test_grpo import ANSWERS, CALL, disturb, settings
from transformers import TrainerCallback

from awares.engine.jsonl import write_records
from awares.engine.model import load_model, load_processor
from awares.engine.rows import load_rows
from awares.method import grpo, protocol


class Gradients(TrainerCallback):
    def __init__(self, file):
        self.file = file

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        named = {name.removeprefix("module."): weight.grad for name, weight in model.named_parameters()}
        if state.is_world_process_zero:
            save_file({name: grad.clone() for name, grad in named.items() if grad is not None}, self.file)


def write(trainer, generations):
    encode = lambda text: trainer.processing_class.tokenizer(text + "<|im_end|>")["input_ids"]  # noqa: E731

    def turn(prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        if num_generations == 1:
            return [encode(ANSWERS[len(ids) % len(ANSWERS)]) for ids in prompt_ids], None
        texts = [ANSWERS[(len(ids) + place % generations) % len(ANSWERS)] for place, ids in enumerate(prompt_ids)]
        texts[1::generations] = [protocol.OURS.render_call(CALL)] * len(texts[1::generations])
        return [encode(text) for text in texts], None

    trainer._generate_single_turn = turn


def update(policy, folder):
    params = settings(**{"grpo.max_steps": 1, "grpo.max_grad_norm": 1000.0})
    model, processor = load_model(policy), load_processor(policy)
    trainer = grpo.build_grpo_trainer(params, load_rows(folder / "rows"), model, processor, folder / "work")
    disturb(trainer)
    write(trainer, params.grpo.generations)
    processes = trainer.accelerator.num_processes
    trainer.add_callback(Gradients(folder / f"gradients-{processes}.safetensors"))
    trainer.args.save_strategy = "no"
    trainer.train()
    if trainer.accelerator.is_main_process:
        write_records(folder / f"log-{processes}.jsonl", [one for one in trainer.state.log_history if "reward" in one])


if __name__ == "__main__":
    update(*map(Path, sys.argv[1:]))
