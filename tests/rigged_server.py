"""Our server in chat mode around the tiny model, rigged as in test_rollout: a process for the tests of `RemoteEngine`.

``python rigged_server.py LOG PORT``; nothing is logged.
"""

import torch
from conftest import tiny_model, tiny_tokenizer
from faulty_server import serve
from test_rollout import Rigged

from awares.cli.options import Limits
from awares.cli.serve import make_app
from awares.engine import decode
from awares.engine.model import make_processor
from awares.method.rollout import Engine

if __name__ == "__main__":
    torch.set_num_threads(1)
    processor = make_processor(tiny_tokenizer(), max_pixels=2000 * 2000)
    Rigged.tokenizer = processor.tokenizer
    decode.FirstToken = Rigged  # type: ignore[misc]
    engine = Engine(tiny_model(processor), processor, max_new_tokens=16)
    serve(make_app(engine, "tiny", Limits(), mode="chat"))
