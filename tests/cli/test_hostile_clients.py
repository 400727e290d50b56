"""A polite client next to slow, silent and greedy ones: a real server of the embedded model with few descriptors."""

import json
import resource
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from chat_server import serving
from PIL import Image
from test_serve import client, health, question

BASE = Path(__file__).parents[2] / "data" / "base"
FILES = 100  # file descriptors of the server
SECONDS = 10  # of attacks
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """URL, process and log of a server."""
    folder = tmp_path_factory.mktemp("served")
    few = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, FILES))}
    with open(folder / "log", "wb") as log:
        with serving(BASE, "--patience", 2, stderr=log, **few) as (url, process):
            yield url, process, folder / "log"


def connect(url, source="127.0.0.1"):
    address = "127.0.0.1", int(url.split(":")[2].split("/")[0])
    connection = socket.create_connection(address, timeout=30, source_address=(source, 0))
    connection.settimeout(30)
    return connection


def send(connection, data):
    """Whether the server still listens."""
    try:
        connection.sendall(data)
        return True
    except OSError:
        return False


def half_sent(count, start, drip):
    """A client with ``count`` connections, which sends ``drip`` on each every half second and opens lost ones again."""

    def run(url, ended):
        held = [connect(url) for _ in range(count)]
        for connection in held:
            send(connection, start)
        while not ended.wait(0.5):
            for place, connection in enumerate(held):
                if not send(connection, drip):
                    connection.close()
                    held[place] = connect(url)
                    send(held[place], start)
        for connection in held:
            connection.close()

    return run


def greedy(image, source="127.0.0.1"):
    """A client that always waits for an answer about ``image``."""
    body = json.dumps(question(image)).encode()

    def run(url, ended):
        while not ended.is_set():
            connection = connect(url, source)
            send(connection, HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            try:
                connection.recv(2**16)
            except OSError:
                pass
            connection.close()

    return run


def silent(url, ended):
    """Asks again and again on one connection and reads no answer."""
    connection = connect(url)
    connection.setblocking(False)
    while True:
        send(connection, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 20)
        if ended.wait(0.1):
            return


ATTACKS = [
    half_sent(300, b"GET /v1/models HTTP/1.1\r\nHost: x\r\n", b"X-More: 1\r\n"),
    half_sent(128, HEAD + b"Content-Length: 30000000\r\n\r\n{", b" "),
    half_sent(5, HEAD + b"Content-Length: 30000000\r\n\r\n{" + b" " * 25_000_000, b""),
    *[greedy(Image.new("RGBA", (7000, 7000), (9, 9, 9, 9)))] * 4,  # 49 megapixels in 190 kB, seconds of the model
    *[greedy(Image.new("RGB", (900, 900)))] * 4,
    *[greedy(Image.new("RGB", (336, 224)), "127.0.0.2")] * 12,  # as small as the polite client's, but of another one
    *[silent] * 4,
]


@pytest.mark.skipif(sys.platform != "linux", reason="a client's address is any of 127.0.0.0/8, memory is in /proc")
def test_a_polite_client_gets_its_answers_in_two_seconds_and_memory_and_log_stay_small(tiny, server):
    url, process, log = server
    ended, waited = threading.Event(), []

    def polite():
        begun = time.monotonic()
        assert health(url)["status"] == "ready"
        stock = client(url).with_options(max_retries=2)  # its default
        assert stock.chat.completions.create(**question(tiny.noise(336, 252, 0))).choices
        return time.monotonic() - begun

    alone = max(polite() for _ in range(6))  # on a machine that runs other tests, more than its 0.2 s
    with ThreadPoolExecutor(len(ATTACKS)) as pool:
        attacks = [pool.submit(attack, url, ended) for attack in ATTACKS]
        try:
            end = time.monotonic() + SECONDS
            while time.monotonic() < end:
                waited.append(polite())
        finally:
            ended.set()
        for attack in attacks:
            attack.result()
    peak = next(line for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if "VmHWM" in line)
    assert max(waited) < max(2, 8 * alone), (alone, waited)
    assert int(peak.split()[1]) < 1.5 * 2**20, peak
    assert log.stat().st_size < 20_000, log.read_text()[:2000]


def test_half_sent_requests_are_closed_after_a_few_seconds(server):
    url, _, _ = server
    begun = time.monotonic()
    head, body = connect(url), connect(url)
    head.sendall(HEAD)
    body.sendall(HEAD + b"Content-Length: 9\r\n\r\n{")
    assert head.recv(100) == b"" and b" 408 " in body.recv(100)
    assert 1 < time.monotonic() - begun < 6
