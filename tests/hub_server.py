"""A hub on this machine: gated or missing repositories, and commits of revisions."""

import hashlib
import http.server
import json
import re
import threading
from contextlib import contextmanager

import huggingface_hub.constants as hub_constants
import pytest
from huggingface_hub import HfFileSystem


class Gate(http.server.BaseHTTPRequestHandler):
    """A hub with one dataset and one model, both gated, and two tokens: ACCEPTED may read them."""

    ACCEPTED, WAITING = "hf_accepted", "hf_waiting"

    def do_GET(self):
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in ("", self.ACCEPTED, self.WAITING):
            self.reply(401, "", "Invalid credentials in Authorization header")
        elif not re.search("ChartQA|Gated-Qwen2.5-VL-3B", self.path):
            self.reply(404, "RepoNotFound", "Repository not found")
        elif token != self.ACCEPTED:
            self.reply(403 if token else 401, "GatedRepo", "Access to this repository is restricted")
        else:
            self.reply(200)

    def reply(self, status, code="", message=""):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.end_headers()


class Archive(Gate):
    """A hub with a commit for each revision of every dataset, but one that has moved, and one file in every folder:
    `train_images.zip`, sent in ranges."""

    content: bytes

    def do_GET(self):
        dataset, _, revision = self.path.removeprefix("/api/datasets/").partition("/revision/")
        if dataset in ("lmms-lab-encoder/POPE", "/api/agent-harnesses"):  # the client asks for a list of agents first
            return self.reply(404, "RepoNotFound", "Repository not found")
        if revision:
            part = json.dumps({"id": dataset, "sha": commit_of(dataset, revision)}).encode()
        elif "/resolve/" in self.path:
            first, last = map(int, re.findall(r"\d+", self.headers["Range"]))
            part = self.content[first : last + 1]
        else:
            folder = self.path.partition("/tree/")[2].partition("?")[0].partition("/")[2]
            file = {"type": "file", "path": f"{folder}/train_images.zip", "size": len(self.content), "oid": "0" * 40}
            part = json.dumps([file]).encode()
        self.reply(206)
        self.wfile.write(part)


def commit_of(repository, revision):
    return hashlib.sha1(f"{repository} {revision}".encode()).hexdigest()


@contextmanager
def serving(handler):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        url = f"http://127.0.0.1:{server.server_port}"
        patch.setattr(hub_constants, "ENDPOINT", url)
        patch.setattr(hub_constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
        yield
    HfFileSystem.clear_instance_cache()  # its instances know the address
    server.shutdown()


@pytest.fixture
def gate():
    with serving(Gate):
        yield
