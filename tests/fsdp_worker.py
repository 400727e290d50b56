"""``python fsdp_worker.py BASE FOLDER`` under accelerate launch with an FSDP configuration: one process of the cold start in FOLDER, on a CPU.

accelerate shards on GPUs only: on a CPU it reads the configuration and leaves it aside. Here its plugin is put where accelerate keeps it on a GPU;
cutting the model up, training, saving and loading are then the libraries' own. Prints what each process holds.
"""

import sys
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from test_launch import FSDP2, settings
from torch.distributed.fsdp import FSDPModule
from transformers import TrainerCallback

from awares.data import rows as data
from awares.engine.model import load_model
from awares.method import sft
from awares.training import checkpoints as training
from awares.training import distributed as launch


class Sharded(TrainerCallback):
    def on_train_begin(self, args, state, control, model=None, **kwargs):
        parts = sum(isinstance(module, FSDPModule) for module in model.modules())
        whole = sum(weight.numel() for weight in model.parameters())
        here = sum(weight.to_local().numel() for weight in model.parameters())
        print(f"{parts} parts, {here} of {whole} weights", flush=True)


if __name__ == "__main__":
    base, folder = map(Path, sys.argv[1:])
    params = settings(
        folder, **{"sft.launch": FSDP2, "sft.share_computation": False, "sft.gradient_checkpointing": True}
    )
    rows = data.load_rows(params.run_dir("curation") / "train" / "dataset")
    job = sft._prepare(params, rows, rows, base, params.run_dir("sft"))
    model = load_model(base, params.base.dtype, launch.device(params))
    trainer = sft.build_trainer(params, job.rows, job.samples, model, job.processor, job.folder)
    for state in (PartialState(), trainer.accelerator.state):
        state.distributed_type = DistributedType.FSDP
    trainer.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
    trainer.is_fsdp_enabled = True
    trainer.add_callback(Sharded())
    training.train(trainer, job.folder, training.Log(job.log, sft.log_entry, "loss"))
