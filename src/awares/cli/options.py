"""Options that several commands share. A command is a dataclass: its fields are its options, calling it runs it."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer import Option

if TYPE_CHECKING:
    from awares.policy import AwaRes, Checkpoint


Bias = Annotated[float | None, Option(min=-1000, max=1000, metavar="X", help="> 0 calls for more crops, < 0 for fewer")]
Profile = Annotated[str, Option(help="of params.yaml (default: its own `profile`)", show_default=False)]
Json = Annotated[bool, Option("--json", help="print one JSON object")]


@dataclass(frozen=True, kw_only=True)
class PolicyOptions:
    """The options that name a policy."""

    model: Annotated[str, Option(metavar="PATH", help="a model or an adapter: a folder or a hub name")] = ""
    run: Annotated[str, Option(metavar="NAME", help="a run's policy: mini, mini/sft, mini/grpo/main-s2")] = ""
    device: Annotated[str, Option(help="cpu, cuda, cuda:1")] = "cpu"
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], Option(help="of the weights")] = "float32"
    max_new_tokens: Annotated[int | None, Option(min=1, help="of one turn (default 64; eval: params.yaml's)")] = None
    token_budget: Annotated[int | None, Option(min=1, help="tokens of a padded batch: bounds the memory")] = None
    server: Annotated[str, Option(metavar="URL", help="an OpenAI-compatible server of --model, ends in /v1")] = ""
    server_model: Annotated[str, Option(metavar="NAME", help="its name there (default: the folder's)")] = ""

    def __post_init__(self) -> None:
        refuse_if(bool(self.model and self.run), "--model is not allowed with --run")
        known = re.fullmatch(r"cpu|mps|cuda(:\d+)?", self.device)
        refuse_if(not known, f"--device {self.device!r}: give cpu, cuda or cuda:N")

    def checkpoint(self) -> "Checkpoint":
        """The policy that the options name."""
        from awares.policy import Checkpoint, of_run, shipped

        if self.model:
            return Checkpoint(self.model, self.model)
        return of_run(self.run) if self.run else shipped()

    def load(self, out: Path | None = None, **options: Any) -> "tuple[AwaRes, str]":
        """The policy and its name; ``options`` go to the engine. ``out``: a server's replies are kept next to it."""
        from awares.policy import AwaRes

        found = self.checkpoint()
        given = {"max_new_tokens": self.max_new_tokens, "token_budget": self.token_budget, "protocol": found.form}
        options |= {name: value for name, value in given.items() if value is not None}
        if not self.server:
            model = AwaRes.from_pretrained(found.path, found.adapters or None, self.dtype, self.device, **options)
            return model, found.name
        from awares.clients.chat import ChatClient, Server
        from awares.clients.engine import RemoteEngine
        from awares.engine.model import load_processor
        from awares.errors import validated

        options.pop("token_budget", None)
        name = self.server_model or Path(found.path).resolve().name
        attempts = 12 if out else 3  # somebody waits for a single answer
        server = validated(Server, {"url": self.server, "model": name, "attempts": attempts}, "--server")
        replies = out.with_name(f"{out.name}.replies") if out else None
        client = ChatClient(server, replies, progress=sys.stderr.isatty() and out is not None)
        engine: Any = RemoteEngine(client, load_processor(found.path, options.pop("pixels", (0, 0))), **options)
        return AwaRes(engine), f"{name} behind a server"


def refuse_if(wrong: bool, message: str) -> None:
    """Wrong usage, exit code 2, if ``wrong``."""
    if wrong:
        raise typer.BadParameter(message)
