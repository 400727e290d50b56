"""``python grpo_worker.py POLICY FOLDER`` under accelerate launch: one GRPO update on the rows in FOLDER.

Its completions are fixed. Writes the gradients of the update and its log to FOLDER.
"""

import sys
from pathlib import Path

from safetensors.torch import save_file
from test_grpo import disturb, settings, write
from transformers import TrainerCallback

from awares.engine.jsonl import write_records
from awares.engine.model import load_model, load_processor
from awares.engine.rows import load_rows
from awares.method import grpo


class Gradients(TrainerCallback):
    def __init__(self, file):
        self.file = file

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        named = {name.removeprefix("module."): weight.grad for name, weight in model.named_parameters()}
        if state.is_world_process_zero:
            save_file({name: grad.clone() for name, grad in named.items() if grad is not None}, self.file)


def update(policy, folder):
    params = settings(**{"grpo.max_steps": 1, "grpo.max_grad_norm": 1000.0})
    model, processor = load_model(policy), load_processor(policy)
    trainer = grpo.build_grpo_trainer(params, load_rows(folder / "rows"), model, processor, folder / "work")
    disturb(trainer)
    processes = trainer.accelerator.num_processes
    write(trainer, first=8 // processes * trainer.accelerator.process_index)
    trainer.add_callback(Gradients(folder / f"gradients-{processes}.safetensors"))
    trainer.args.save_strategy = "no"
    trainer.train()
    if trainer.accelerator.is_main_process:
        write_records(folder / f"log-{processes}.jsonl", [one for one in trainer.state.log_history if "reward" in one])


if __name__ == "__main__":
    update(*map(Path, sys.argv[1:]))
