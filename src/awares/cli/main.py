"""The command ``awares``: ask a policy, score it, time it, serve it, plan its making.

Exit codes: 0 done, 1 something in the data or the files is wrong, 2 wrong usage, 130 interrupted. What is asked for goes
to stdout, everything else to stderr. Nothing heavy is imported before a command needs it.
"""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from awares.cli.options import parser
from awares.errors import AwaresError

if TYPE_CHECKING:
    from awares.cli.batch import Summary
    from awares.method.rollout import Trajectory
    from awares.policy import AwaRes, Checkpoint


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line ``arguments`` (default: the process's own); the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if given[:1] == ["bench"]:
            return _bench(given[1:])
        parsed = parser(given).parse_args(given)
        code = COMMANDS[parsed.command](parsed)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever read our output has gone; nothing may be flushed to it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (AwaresError, OSError) as error:
        _say(" ".join(str(error).split()))
        return 1
    except KeyboardInterrupt:
        _say("interrupted")
        return 130


def _say(text: str) -> None:
    print(f"awares: {text}", file=sys.stderr)


# The policy


def _checkpoint(args: argparse.Namespace) -> "Checkpoint":
    from awares.policy import Checkpoint, of_run, shipped

    if args.adapter and not args.model:
        args.parser.error("--adapter needs --model, the base model that it belongs to")
    if args.run:
        return of_run(args.run)
    if not args.model:
        return shipped()
    adapters = tuple(args.adapter or ())
    return Checkpoint(" + ".join([args.model, *map(str, adapters)]), args.model, adapters)


def _limits(args: argparse.Namespace) -> dict[str, Any]:
    """Engine options that were given."""
    named = {"max_new_tokens": args.max_new_tokens, "token_budget": args.token_budget}
    return {name: value for name, value in named.items() if value is not None}


def _form(found: "Checkpoint") -> dict[str, Any]:
    """The engine's option for the interaction that a policy was trained on."""
    return {"protocol": found.form} if found.form else {}


def _load(args: argparse.Namespace, **options: Any) -> "tuple[AwaRes, str]":
    """The policy and its name; ``options`` go to the engine, those of the command line before them."""
    from awares.policy import AwaRes

    found = _checkpoint(args)
    limits = {**options, **_form(found), **_limits(args)}
    if args.server:
        return _remote(args, found, limits)
    return AwaRes.from_pretrained(found.path, found.adapters or None, args.dtype, args.device, **limits), found.name


def _remote(args: argparse.Namespace, found: "Checkpoint", limits: dict[str, Any]) -> "tuple[AwaRes, str]":
    """The policy behind ``--server``. The replies of a batch are kept beside its results."""
    from awares.clients.chat import ChatClient, Server
    from awares.clients.engine import RemoteEngine
    from awares.engine.model import load_processor
    from awares.method.rollout import MAX_NEW_TOKENS
    from awares.policy import AwaRes

    name = args.server_model or Path(found.path).resolve().name
    cache = args.out.with_name(f"{args.out.name}.replies") if args.out else None
    server = Server(url=args.server, model=name, attempts=12 if args.out else 3)  # somebody waits for a single answer
    client = ChatClient(server, cache, progress=sys.stderr.isatty() and args.out is not None)
    limits = {
        "max_new_tokens": MAX_NEW_TOKENS,
        **{key: value for key, value in limits.items() if key != "token_budget"},
    }
    engine: Any = RemoteEngine(client, load_processor(found.path), **limits)
    return AwaRes(engine), f"{name} behind a server"


# ask


def _ask(args: argparse.Namespace) -> int:
    if args.question is not None and args.common is not None:
        args.parser.error("the question stands twice: QUESTION and --question")
    question = args.common if args.question is None else args.question
    if args.image.is_dir() or args.image.suffix.lower() == ".jsonl":
        return _ask_batch(args, question)
    if question is None:
        args.parser.error("no question: write it behind the image")
    if args.out or args.retry_errors or args.chunk:
        args.parser.error("--out, --retry-errors and --chunk belong to a batch: a folder or a .jsonl file")
    return _ask_one(args, question)


def _ask_one(args: argparse.Namespace, question: str) -> int:
    from awares.engine.images import open_image

    image = open_image(args.image)  # before the model is loaded: a wrong path should not cost seconds
    policy, _ = _load(args)
    done = policy.ask(image, question, call_bias=args.call_bias or 0.0)
    if args.show:
        _draw(args.show, image, question, done)
    if args.json:
        named = {"image": str(args.image), "question": question}
        print(json.dumps({**named, **done.to_dict(), "rtr": done.rtr}, ensure_ascii=False))
        return 0
    print(done.answer)
    print(f"crops   {', '.join(done.crops) or 'none'}{'' if done.call_status != 'malformed' else ' (malformed call)'}")
    print(f"tokens  {done.visual_tokens} of {done.full_visual_tokens} visual tokens, RTR {done.rtr:.2f}")
    print(f"time    {done.seconds:.2f} s")
    return 0


def _draw(path: Path, image: Any, question: str, done: "Trajectory") -> None:
    import matplotlib

    matplotlib.use("Agg")  # no window is to be opened
    from awares.study import figures

    figures.style(110)
    card = {"image": image, "question": question, "answer": done.answer, "crops": done.crops}
    figures.save_figure(figures.gallery([card]), path)


def _ask_batch(args: argparse.Namespace, question: str | None) -> int:
    from awares.cli import batch

    if args.out is None:
        args.parser.error("a batch needs --out, the file for its results")
    if args.show:
        args.parser.error("--show draws one image, not a batch")
    items = batch.read_items(args.image, question)
    policy, name = _load(args)
    settings = _settings(args, policy, name, args.call_bias or 0.0)
    done = batch.run(items, args.out, policy.engine, settings, args.chunk or batch.CHUNK, args.retry_errors)
    if args.json:
        print(json.dumps({"out": str(args.out), **vars(done)}))
    _say(_told(done, args.out))
    return 1 if done.errors else 0


def _told(done: "Summary", out: Path) -> str:
    return f"{done.rows} rows, {done.ran} asked now, {done.done_before} done before, {done.errors} with an error: {out}"


def _settings(args: argparse.Namespace, policy: "AwaRes", name: str, bias: float) -> dict[str, Any]:
    """What decides the answers of a batch."""
    engine: Any = policy.engine  # behind a server it has no decoder
    tokens = engine.max_new_tokens if args.server else engine.decoder.max_new_tokens
    weights = "" if args.server else _digest(_checkpoint(args))
    form = hashlib.sha256(repr(engine.protocol).encode()).hexdigest()[:8]
    about = {"policy": name, "weights": weights, "dtype": args.dtype, "prompt": form, "max_side": engine.max_side}
    return {**about, "call_bias": bias, "max_new_tokens": tokens}


def _digest(found: "Checkpoint") -> str:
    """Of model and adapters: a run that was trained again has the same name."""
    from awares.training.checkpoints import folder_digest

    parts = [folder_digest(part) for part in (found.path, *found.adapters)]
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:16]


# eval


def _eval(args: argparse.Namespace) -> int:
    from awares.config import load_params
    from awares.data import rows as data
    from awares.engine.model import set_threads
    from awares.method import evaluation, protocol

    if args.rows_file and (args.rows or args.seed is not None):
        args.parser.error("--rows and --seed draw the tasks' rows, not those of a file")
    given = {"evaluation.rows": args.rows, "evaluation.seed": args.seed, "evaluation.call_bias": args.call_bias}
    params = load_params(args.profile, overrides={key: value for key, value in given.items() if value is not None})
    rows = data.from_jsonl(args.rows_file) if args.rows_file else data.make_split(params, "evaluation")
    set_threads(params.threads)
    limits = {"max_new_tokens": params.protocol.max_new_tokens, "token_budget": params.protocol.token_budget}
    limits |= {"max_side": params.crops.max_side}
    policy, name = _load(args, **limits, protocol=protocol.from_params(params))
    done = _trajectories(args, rows, policy, name, params.evaluation.call_bias)
    table = evaluation.main_table(evaluation.scored(name, rows, done), params.evaluation).drop(columns="system")
    if args.json:
        found = {"policy": name, "call_bias": params.evaluation.call_bias, "table": table.to_dict("records")}
        print(json.dumps(found))
    else:
        print(table.to_string(index=False, float_format="{:.2f}".format))
    return 0


def _trajectories(args: argparse.Namespace, rows: Any, policy: "AwaRes", name: str, bias: float) -> "list[Trajectory]":
    """The policy's own choices on ``rows``, kept in --out where it is given."""
    if args.out is None:
        policy.engine.progress = sys.stderr.isatty()
        return policy.engine.run(rows["image"], rows["question"], call_bias=bias, row_ids=rows["id"])
    from awares.cli import batch

    items, settings = batch.dataset_items(rows), _settings(args, policy, name, bias)
    _say(_told(batch.run(items, args.out, policy.engine, settings), args.out))
    return batch.trajectories(args.out, rows["id"])


# serve, bench


def _serve(args: argparse.Namespace) -> int:
    from dataclasses import fields

    from awares.cli.serve import serve
    from awares.cli.wire import ServeSettings

    found = _checkpoint(args)
    limits: dict[str, Any] = {one.name: getattr(args, one.name) for one in fields(ServeSettings) if one.name != "model"}
    name = args.model_name or ("awares" if not args.model else Path(args.model).resolve().name)
    try:
        settings = ServeSettings(model=name, **limits)
    except AwaresError as error:
        args.parser.error(str(error))
    where = (found.path, found.adapters or None, args.host, args.port, args.mode, settings, args.dtype, args.device)
    serve(*where, **{**_form(found), **_limits(args)})
    return 0


def _bench(arguments: list[str]) -> int:
    from awares.bench.bench import main as bench

    return bench(arguments)


# plan


def _plan(args: argparse.Namespace) -> int:
    from awares.bench import plan
    from awares.config import load_params

    params = load_params(args.profile, overrides=args.overrides)
    table = plan.forecast(params)
    findings = plan.preflight(params) if args.check else []
    if args.json:
        found = {
            "profile": params.profile,
            "stages": table.to_dict("records"),
            "checks": [vars(one) for one in findings],
        }
        print(json.dumps(found))
    else:
        print(table.to_string(index=False, float_format="{:,.1f}".format))
        print(f"\n{plan.hours(table, params):.1f} h on {params.plan.gpus} x {params.plan.gpu}, servers not counted")
        for one in findings:
            mend = "" if one.there else f": {one.mend}"
            print(f"{'there  ' if one.there else 'MISSING'} {one.what} ({one.found}){mend}")
    return 0 if all(one.there for one in findings) else 1


# push


def _push(args: argparse.Namespace) -> int:
    from awares.cli import hub
    from awares.config import load_params

    params = load_params(args.profile)
    folder = hub.policy_folder(params) if args.what == "policy" else hub.dataset_folder(params, args.images)
    files = hub.contents(folder)
    for name, size in files:
        print(f"{size:>14,} {name}")
    print(f"{sum(size for _, size in files):>14,} bytes in {folder}")
    if not args.dry_run:
        kind = "model" if args.what == "policy" else "dataset"
        print(hub.push(folder, args.repo, kind, private=not args.public))
    return 0


COMMANDS = {"ask": _ask, "eval": _eval, "plan": _plan, "push": _push, "serve": _serve}
