"""Our server in chat mode around the tiny model, rigged as in test_rollout: a process for the tests of the remote engine.

``python rigged_server.py MAX_PIXELS``: the image processor's upper limit, so that a server of another model can be had.
"""

import sys

import torch
import uvicorn
from conftest import tiny_model, tiny_tokenizer
from test_rollout import Rigged

from awares.cli import serve
from awares.cli.wire import ServeSettings
from awares.engine import decode
from awares.engine.model import make_processor
from awares.method.rollout import Engine

if __name__ == "__main__":
    torch.set_num_threads(1)
    processor = make_processor(tiny_tokenizer(), max_pixels=int(sys.argv[1]))
    Rigged.tokenizer = processor.tokenizer
    decode.FirstToken = Rigged  # type: ignore[misc]
    engine = Engine(tiny_model(processor), processor, max_new_tokens=16)
    listener = serve.bind("127.0.0.1", 0)
    print(listener.getsockname()[1], flush=True)
    app = serve.make_app(engine, ServeSettings(model="tiny"), mode="chat")
    uvicorn.Server(uvicorn.Config(app, log_level="critical")).run([listener])
