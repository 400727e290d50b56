"""``python fsdp_worker.py BASE FOLDER`` under accelerate launch with an FSDP configuration: SFT in one CPU process.

accelerate shards on GPUs only: on a CPU it reads the configuration and ignores it. Here its plugin is put where
accelerate keeps it on a GPU. The libraries shard, train, save and load. The script prints what each process holds.
"""

import sys
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from test_launch import FSDP2, settings
from torch.distributed.fsdp import FSDPModule
from transformers import TrainerCallback

from awares.engine.rows import load_rows
from awares.method import sft
from awares.training import checkpoints as training


class Sharded(TrainerCallback):
    def on_train_begin(self, args, state, control, model=None, **kwargs):
        parts = sum(isinstance(module, FSDPModule) for module in model.modules())
        whole = sum(weight.numel() for weight in model.parameters())
        here = sum(weight.to_local().numel() for weight in model.parameters())
        print(f"{parts} parts, {here} of {whole} weights", flush=True)


def shard_and_train(trainer, folder, log):
    for state in (PartialState(), trainer.accelerator.state):
        state.distributed_type = DistributedType.FSDP
    trainer.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
    trainer.is_fsdp_enabled = True
    trainer.add_callback(Sharded())
    train(trainer, folder, log)


if __name__ == "__main__":
    base, folder = map(Path, sys.argv[1:])
    changes = {"sft.launch": FSDP2, "sft.share_computation": False, "sft.gradient_checkpointing": True}
    train, training.train = training.train, shard_and_train
    (folder / "checkpoints").mkdir(exist_ok=True)
    params, rows = settings(folder, **changes), load_rows(folder / "rows")
    sft.fit_sft(params, rows, base, folder / "checkpoints", folder / "log.jsonl")
