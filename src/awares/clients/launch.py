"""vLLM servers that a step starts for itself: one at a time, on loopback, stopped at the end and after an error.

Inside `managed`, the first request to a model without an address starts its server and stops the one before.
"""

import os
import random
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.request import ProxyHandler, build_opener

from pydantic_core import to_json
from tqdm import tqdm

from awares.errors import AwaresRequestError

_direct = build_opener(ProxyHandler({}))  # a proxy of the environment does not reach this machine's own servers
# A watcher in the server's group ends the group once the pipe of the process that started it closes, by any death
WATCHED = """exec 3<&0
( trap "" TERM; cat <&3; kill -TERM 0; sleep 20; kill -KILL 0 ) >/dev/null 2>&1 &
exec "$@" </dev/null 3<&-"""


@dataclass(frozen=True)
class Launch:
    """How the server of ``name`` is started; it must be healthy after ``minutes``, downloads of weights included."""

    name: str
    python: Path
    flags: tuple[str, ...]
    folder: Path
    log: Path
    minutes: float

    def lacks(self) -> str:
        """Why the server cannot be started; "" if ``python`` has vLLM."""
        find = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
        if self.python.is_file() and not subprocess.run([self.python, "-c", find], check=False).returncode:
            return ""
        return f"no vLLM in {self.python}"


class _Running:
    """The one server of this process."""

    def __init__(self) -> None:
        self.allowed, self.url, self._lock = False, "", Lock()
        self.launch: Launch | None = None
        self.process: subprocess.Popen[bytes] | None = None

    def address(self, launch: Launch) -> str:
        """The URL of the healthy server of ``launch``, which this starts unless it runs; AwaresError if it dies."""
        with self._lock:
            if self.launch != launch:
                if not self.allowed:
                    fix = f"set AWARES_{launch.name.upper()}_URL, or send requests inside `with launch.managed():`"
                    raise AwaresRequestError(f"{launch.name}: this model has no server: {fix}")
                self.stop()
                self._start(launch)
            if fault := self.fault(launch):
                raise AwaresRequestError(fault)
            return self.url

    def fault(self, launch: Launch | None) -> str:
        """Why the server of ``launch`` has ended; "" while it runs, and for a server that is not ours."""
        if not launch or self.launch != launch or self.process is None or self.process.poll() is None:
            return ""
        fix = "correct python or vllm (its flags) in data/served.yaml if they are the cause, then run again"
        end = f"its server ended with exit code {self.process.returncode}; {fix}"
        return f"{launch.name}: {end}. From {launch.log}:\n{_errors(launch.log)}"

    def stop(self) -> None:
        """End the server and everything that it started."""
        process, self.process, self.launch = self.process, None, None
        if process is None:
            return
        with process, suppress(ProcessLookupError):
            process.terminate()  # vLLM ends its workers itself
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=30)
            os.killpg(process.pid, signal.SIGKILL)

    def _start(self, launch: Launch) -> None:
        """Until the server is healthy, or has ended; shows the last line of its log."""
        port, until = _free_port(), time.monotonic() + 60 * launch.minutes
        launch.log.parent.mkdir(parents=True, exist_ok=True)
        command = [str(launch.python), "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--host", "127.0.0.1", "--port", str(port), *launch.flags]
        with launch.log.open("wb") as log:
            self.launch, self.url = launch, f"http://127.0.0.1:{port}/v1"
            given: Any = {"stdin": subprocess.PIPE, "stdout": log, "stderr": subprocess.STDOUT, "cwd": launch.folder}
            self.process = subprocess.Popen(["sh", "-c", WATCHED, "sh", *command], start_new_session=True, **given)
        with tqdm(desc=f"starting {launch.name}", bar_format="{desc}: {elapsed}{postfix}", leave=False) as bar:
            while not self.fault(launch):
                with suppress(OSError), _direct.open(self.url.replace("/v1", "/health"), timeout=5):
                    return
                if not self.allowed or time.monotonic() > until:
                    late = f"{launch.name}: its server is not healthy after {launch.minutes:g} minutes"
                    fix = f"raise minutes in data/served.yaml if it was still loading. From {launch.log}:"
                    raise AwaresRequestError(f"{late}; {fix}\n{_errors(launch.log)}")
                bar.set_postfix_str(_errors(launch.log, most=1)[-80:])
                time.sleep(0.2)


running = _Running()


@contextmanager
def managed() -> Iterator[None]:
    """Inside, models of data/served.yaml without an address get a server when a request needs it."""
    running.allowed = True
    try:
        yield
    finally:
        running.allowed = False
        running.stop()


def _free_port() -> int:
    """Not one of those that the system gives to connections: another process could get it before the server."""
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AwaresRequestError("no free port between 20000 and 32000 on this machine: stop servers that are not needed")


def as_flags(values: Mapping[str, Any]) -> Iterator[str]:
    """Flags of the command line: ``{"max-model-len": 8192, "enforce-eager": True}`` -> --max-model-len 8192 ..."""
    for name, value in values.items():
        yield f"--{name}"
        if value is not True:
            yield value if isinstance(value, str) else to_json(value).decode()


def _errors(log: Path, most: int = 12) -> str:
    """The last lines of ``log``, of those that name an error if any does: vLLM prints the cause early."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    named = [line for line in lines if re.search(r"^(?!.*\b(INFO|WARNING)\b).*(Error|Exception|error): ", line)]
    return "\n".join(dict.fromkeys((named or lines)[-most:]))
