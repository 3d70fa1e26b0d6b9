"""The reward server as a process, and its client against servers that die, hang or lie."""

import http.server
import json
import math
import os
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest
import torch
from PIL import Image

from chunk_grpo_nb.rewards.combined import WeightedReward
from chunk_grpo_nb.rewards.judges import VlmJudge, VlmPreference, read_preference, read_rating
from chunk_grpo_nb.rewards.registry import (
    RewardError,
    RewardUnavailable,
    make_reward,
    reward_function,
)
from chunk_grpo_nb.rewards.remote import RemoteReward, decode_image, encode_image
from chunk_grpo_nb.rewards.scoring import check_pairing, check_reachable, score, score_async
from chunk_grpo_nb.rewards.server import Limits, _load_served, running_server, serve

pytest.importorskip("fastapi")
IMAGES = [Image.new("RGB", (10 + i, 8), (i, 2 * i, 3)) for i in range(5)]
PROMPTS = [f"prompt {i}" for i in range(5)]

REWARDS = """
import os, time

def width(images, prompts, metadata):
    rows = zip(images, prompts, metadata)
    return [image.width + 100 * int(p.split()[-1]) + m.get("bonus", 0) for image, p, m in rows]

def hang(images, prompts, metadata):
    time.sleep(60)

def die(images, prompts, metadata):
    os._exit(3)

def picky(images, prompts, metadata):
    if "prompt 2" in prompts:
        raise KeyError("no colour")
    return [1.0] * len(images)

def nan(images, prompts, metadata):
    return [float("nan") if p == "prompt 1" else 1.0 for p in prompts]
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(folder, port: int) -> subprocess.Popen:
    """A server process over the rewards above; returns when it answers."""
    (folder / "served_rewards.py").write_text(REWARDS)
    names = [f"served_rewards:{n}" for n in ("width", "hang", "die", "picky", "nan")]
    code = (
        "from chunk_grpo_nb.rewards.server import Limits, serve; "
        f"serve({names}, port={port}, limits=Limits(max_batch=3))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "CHUNK_GRPO_TOKEN": "secret"},
    )
    for _ in range(600):
        try:
            httpx.get(f"http://127.0.0.1:{port}/health", timeout=1, trust_env=False)
            return process
        except httpx.HTTPError:
            assert process.poll() is None, process.stdout.read().decode()
            time.sleep(0.05)
    raise AssertionError("the server did not start")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    port = free_port()
    process = start(tmp_path_factory.mktemp("served"), port)
    yield f"http://127.0.0.1:{port}", port, process
    process.terminate()
    process.wait(10)


def client(server, name: str, **options) -> RemoteReward:
    return make_reward(
        f"{server[0]}/{name}",
        **{"token": "secret", "batch_size": 3, "retries": 1, "backoff": 0.05, **options},
    )


# ---------------------------------------------------------------- a real process


def test_a_server_in_front_of_another_asks_it_before_it_starts(server, monkeypatch):
    monkeypatch.setenv("CHUNK_GRPO_TOKEN", "secret")
    dead = f"http://127.0.0.1:{free_port()}/width"
    with pytest.raises(RewardUnavailable, match="Is the server up"):
        serve(["no_such_module:width", dead], port=free_port())
    with pytest.raises(RewardUnavailable, match="has no reward 'height'"):
        serve([f"{server[0]}/height"], port=free_port())
    with pytest.raises(ValueError, match="two rewards would be served as 'width'"):
        serve([f"{server[0]}/width", "module:width"], port=free_port())


def test_a_server_passes_images_on_to_another(server, monkeypatch):
    monkeypatch.setenv("CHUNK_GRPO_TOKEN", "secret")
    served = _load_served([f"{server[0]}/width"], {})
    with running_server(served) as url:
        found = score(make_reward(f"{url}/width"), IMAGES[:3], PROMPTS[:3])
    assert found.tolist() == [10.0, 111.0, 212.0]


def test_scores_come_back_in_order_with_metadata(server):
    remote = client(server, "width", batch_size=2)
    assert remote.health() == {
        "status": "ok",
        "rewards": ["die", "hang", "nan", "picky", "width"],
        "max_batch": 3,
        "needs_token": True,
    }
    assert check_pairing(remote, IMAGES, PROMPTS).tolist() == [10, 111, 212, 313, 414]
    assert score(
        remote, IMAGES, PROMPTS, [{"bonus": torch.tensor(1000 * i)} for i in range(5)]
    ).tolist() == [10, 1111, 2212, 3313, 4414]
    assert score(remote, [], []).shape == (0,)
    remote.close()


def test_failures_of_the_reward_name_the_prompt_and_can_be_dropped(server):
    with pytest.raises(RewardError, match="prompt 2") as error:
        score(client(server, "picky", batch_size=1), IMAGES, PROMPTS)
    assert not isinstance(error.value, RewardUnavailable) and "no colour" in str(error.value)
    assert score(client(server, "picky"), IMAGES, PROMPTS, on_failure="drop").isnan().tolist() == [
        False,
        False,
        True,
        False,
        False,
    ]
    with pytest.raises(RewardError, match="returned .nan. on 'prompt 1'"):
        score(client(server, "nan"), IMAGES, PROMPTS)


@pytest.mark.parametrize("name, options, message", [
    ("width", {"token": "guess"}, "status 401.*CHUNK_GRPO_TOKEN"),
    ("height", {}, "status 404: no reward 'height' here"),
    ("width", {"batch_size": 5}, "status 413: 5 images in one request; this server takes 3"),
])  # fmt: skip
def test_refusals_are_final_and_say_why(server, name, options, message):
    begin = time.perf_counter()
    with pytest.raises(RewardUnavailable, match=message):
        score(client(server, name, backoff=30, **options), IMAGES, PROMPTS)
    assert time.perf_counter() - begin < 10  # not tried again


def test_a_reward_that_hangs_is_given_up_and_others_go_on(server):
    begin = time.perf_counter()
    with pytest.raises(RewardUnavailable, match=r"no answer in time .* \(tried 2 times\)"):
        score(client(server, "hang", timeout=0.3), IMAGES[:1], PROMPTS[:1])
    assert time.perf_counter() - begin < 10
    assert score(client(server, "width"), IMAGES[:1], PROMPTS[:1]).tolist() == [10]


def test_garbage_requests_are_refused(server):
    def post(body):
        headers = {"authorization": "Bearer secret"}
        url = f"{server[0]}/score/width"
        return httpx.post(url, content=body, headers=headers, trust_env=False)

    good = {"images": [encode_image(IMAGES[0])], "prompts": ["prompt 0"], "metadata": [{}]}
    assert post(json.dumps(good)).json() == {"scores": [10.0]}
    for wrong in (
        b"\x80\x04",
        "[]",
        "{}",
        {**good, "prompts": []},
        {**good, "prompts": [1]},
        {**good, "metadata": [3]},
        {**good, "images": ["AAAA"]},
        {**good, "images": [7]},
    ):
        reply = post(wrong if isinstance(wrong, str | bytes) else json.dumps(wrong))
        assert reply.status_code == 400 and reply.json()["error"], wrong


def test_scoring_overlaps_with_other_work(server):
    remote = client(server, "hang", timeout=1.0, retries=0)
    begin = time.perf_counter()
    pending = score_async(remote, IMAGES[:1], PROMPTS[:1])
    assert time.perf_counter() - begin < 0.5 and not pending.done()
    with pytest.raises(RewardUnavailable):
        pending.result(timeout=20)
    both = WeightedReward({f"{server[0]}/width": 2.0}, {f"{server[0]}/width": {"token": "secret"}})
    assert score(both, IMAGES[:2], PROMPTS[:2]).tolist() == [20, 222]


def test_a_server_is_asked_whether_it_will_answer(server):
    check_reachable(client(server, "width"))
    for name, token, message in (
        ("height", "secret", "has no reward 'height'"),
        ("width", "wrong", "status 401.*token"),
        ("width", None, "wants a token"),
    ):
        with pytest.raises(RewardUnavailable, match=message):
            check_reachable(client(server, name, token=token))
    address = client(server, "height").url.replace("/score", "")
    options = {address: {"token": "secret"}}
    for reward in (
        WeightedReward({address: 2.0}, options),
        make_reward("win_rate", reward=address, options=options[address]),
    ):
        with pytest.raises(RewardUnavailable, match="has no reward 'height'"):
            check_reachable(reward)


@pytest.mark.parametrize("name", ["http://127.0.0.1:9/x", "vlm_judge", "vlm_preference"])
def test_a_server_that_is_not_there_is_known_before_it_is_needed(name):
    options = {"url": "http://127.0.0.1:9", "model": "m"} if "vlm" in name else {}
    with pytest.raises(RewardUnavailable, match="Is the server up"):
        check_reachable(make_reward(name, **options))


@pytest.mark.parametrize("status, alive", [(200, True), (404, True), (502, False), (403, False)])
def test_servers_without_our_health_are_only_asked_whether_they_answer(status, alive):
    transport = httpx.MockTransport(lambda request: httpx.Response(status, text="hello"))
    for reward in (
        RemoteReward("http://127.0.0.1:1/x", transport=transport),
        make_reward("vlm_judge", url="http://127.0.0.1:1", model="m", transport=transport),
    ):
        if alive:
            check_reachable(reward)
        else:
            with pytest.raises(RewardUnavailable, match=str(status)):
                check_reachable(reward)


def test_a_server_that_dies_is_named_and_one_that_comes_back_is_used(server):
    _, port, process = server
    with pytest.raises(RewardUnavailable, match=f"127.0.0.1:{port}"):
        score(client(server, "die", timeout=5, retries=0), IMAGES[:1], PROMPTS[:1])
    assert process.wait(10) == 3
    with pytest.raises(RewardUnavailable, match="ConnectError"):
        score(client(server, "width"), IMAGES[:1], PROMPTS[:1])
    with pytest.raises(RewardUnavailable, match="Is the reward server up"):
        client(server, "width").health()
    pending = score_async(
        client(server, "width", retries=20, backoff=0.02), IMAGES[:1], PROMPTS[:1]
    )
    with running_server({"width": lambda images, prompts, metadata: [7.0]}, port=port):
        assert pending.result(timeout=60).tolist() == [7.0]


# ---------------------------------------------------------------- servers that talk nonsense


NONSENSE = {
    "html": b"<html>proxy error</html>",
    "cut": b'{"scores": [1.0',
    "list": b"[1.0]",
    "short": b'{"scores": []}',
    "long": b'{"scores": [1, 2]}',
    "text": b'{"scores": ["high"]}',
    "bool": b'{"scores": [true]}',
    "nested": b'{"scores": [[1]]}',
    "binary": b"\x80\x04\x95",
    "empty": b"",
}


@pytest.fixture(scope="module")
def nonsense_server():
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["content-length"]))
            body = NONSENSE.get(self.path.rpartition("/")[2])
            if body is None:
                self.connection.close()
                return
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *args: None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize("kind", [*NONSENSE, "closes"])
def test_nonsense_never_becomes_a_score(nonsense_server, kind):
    remote = RemoteReward(f"{nonsense_server}/{kind}", retries=1, backoff=0.01)
    for mode in ("raise", "drop"):
        with pytest.raises(RewardUnavailable, match="tried 2 times"):
            score(remote, IMAGES[:1], PROMPTS[:1], on_failure=mode)


def test_infinite_numbers_are_caught_by_score():
    body = httpx.MockTransport(lambda request: httpx.Response(200, content=b'{"scores": [1e999]}'))
    with pytest.raises(RewardError, match="scores must be finite"):
        score(RemoteReward("http://127.0.0.1:1/x", transport=body), IMAGES[:1], PROMPTS[:1])


# ---------------------------------------------------------------- bounds


def test_a_full_line_is_sent_away_and_comes_back():
    def slow(images, prompts, metadata):
        time.sleep(0.05)
        return [1.0] * len(images)

    with running_server({"slow": slow}, limits=Limits(max_waiting=1)) as url:
        hasty = RemoteReward(f"{url}/slow", batch_size=1, workers=5, retries=0)
        with pytest.raises(RewardUnavailable, match="status 503: 1 requests are already in line"):
            score(hasty, IMAGES, PROMPTS)
        patient = RemoteReward(f"{url}/slow", batch_size=1, workers=5, retries=9, backoff=0.05)
        assert score(patient, IMAGES, PROMPTS).tolist() == [1.0] * 5


def test_large_images_and_requests_are_refused():
    with running_server(
        {"r": lambda i, p, m: [0.0] * len(i)}, limits=Limits(max_pixels=100)
    ) as url:
        with pytest.raises(RewardUnavailable, match="status 413: image of 64 × 8 pixels"):
            score(make_reward(f"{url}/r"), [Image.new("RGB", (64, 8))], ["a"])
    with running_server(
        {"r": lambda i, p, m: [0.0] * len(i)}, limits=Limits(max_bytes=1000)
    ) as url:
        with pytest.raises(RewardUnavailable, match="longer than 1000 bytes"):
            score(make_reward(f"{url}/r"), IMAGES[:1], ["a" * 2000])


def test_a_reward_is_called_by_one_thread_at_a_time():
    inside, most = [], []

    def watched(images, prompts, metadata):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.02)
        inside.pop()
        return [0.0] * len(images)

    with running_server({"watched": watched}) as url:
        score(make_reward(f"{url}/watched", batch_size=1, workers=5), IMAGES, PROMPTS)
    assert len(most) == 5 and max(most) == 1


def test_other_machines_are_let_in_only_with_a_token(monkeypatch):
    monkeypatch.delenv("CHUNK_GRPO_TOKEN", raising=False)
    reward_function("nothing_at_all")(lambda images, prompts, metadata: [0.0] * len(images))
    with pytest.raises(ValueError, match="open to other machines"):
        serve(["nothing_at_all"], host="0.0.0.0")


@pytest.mark.parametrize("url", ["http://", "http://host", "http:///x", "https://host:8000/"])
def test_addresses_without_a_reward_are_refused(url):
    with pytest.raises(ValueError, match="expected http://host:port/name"):
        make_reward(url)


def test_images_are_lossless_and_only_png_is_read():
    import base64
    import io

    assert decode_image(encode_image(IMAGES[3])).tobytes() == IMAGES[3].tobytes()
    buffer = io.BytesIO()
    IMAGES[0].save(buffer, format="BMP")
    for text in (base64.b64encode(buffer.getvalue()).decode(), "not base64!", "", None):
        with pytest.raises(ValueError, match="not a PNG"):
            decode_image(text)


# ---------------------------------------------------------------- deadlines and sizes


class RawServer:
    """A server that answers every connection with what `talk(connection)` sends."""

    def __init__(self, talk):
        self.talk = talk
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/reward"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            threading.Thread(target=self.answer, args=(connection,), daemon=True).start()

    def answer(self, connection):
        try:
            connection.recv(2**16)
            self.talk(connection)
            connection.close()
        except OSError:
            pass


OK = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"


def drip(head: bytes, tail: bytes):
    """Send the head at once and the tail a byte at a time, ten bytes a second."""

    def talk(connection):
        connection.sendall(head)
        for byte in tail:
            connection.sendall(bytes([byte]))
            time.sleep(0.1)

    return talk


@pytest.mark.parametrize(
    "talk",
    [
        drip(OK + b"content-length: 600\r\n\r\n", b" " * 600),
        drip(OK + b"transfer-encoding: chunked\r\n\r\n", b"1\r\n \r\n" * 100),
        drip(OK + b"x: ", b"y" * 600),
        drip(b"", b"HTTP/1.1 200 " + b"O" * 600),
    ],
    ids=["body", "chunks", "headers", "status line"],
)
def test_a_server_that_drips_is_given_up_at_the_deadline(talk):
    server = RawServer(talk)
    remote = RemoteReward(server.url, timeout=1.0, retries=0)
    start = time.monotonic()
    with pytest.raises(RewardUnavailable, match="no answer in time"):
        remote(IMAGES[:1], PROMPTS[:1], [{}])
    assert time.monotonic() - start < 5
    with pytest.raises(RewardUnavailable, match="Is the reward server up"):
        remote.health(timeout=0.5)
    server.socket.close()


def peak_memory() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_a_compressed_answer_is_refused_before_it_is_unpacked():
    import gzip

    bomb = gzip.compress(b" " * 2**28)
    head = OK + b"content-encoding: gzip\r\ncontent-length: %d\r\n\r\n" % len(bomb)
    server = RawServer(lambda connection: connection.sendall(head + bomb))
    before = peak_memory()
    with pytest.raises(RewardUnavailable, match="compressed"):
        RemoteReward(server.url, retries=0)(IMAGES[:1], PROMPTS[:1], [{}])
    assert peak_memory() - before < 2**26
    server.socket.close()


def test_an_answer_that_never_ends_is_dropped():
    def talk(connection):
        connection.sendall(OK + b"\r\n")
        while True:
            connection.sendall(b" " * 2**16)

    server = RawServer(talk)
    before = peak_memory()
    with pytest.raises(RewardUnavailable, match="longer than 16777216 bytes"):
        RemoteReward(server.url, retries=0)(IMAGES[:1], PROMPTS[:1], [{}])
    assert peak_memory() - before < 2**27
    server.socket.close()


@pytest.mark.parametrize(
    "body", [b"[" * 100_000, b"{" + b'"a":{' * 50_000, b"\xff", b'{"scores": [' + b"9" * 5000]
)
def test_answers_that_are_hard_to_parse_are_nonsense(body):
    transport = httpx.MockTransport(lambda request: httpx.Response(200, content=body))
    with pytest.raises(RewardUnavailable, match="makes no sense"):
        RemoteReward("http://h:1/x", retries=0, transport=transport)(IMAGES[:1], ["a"], [{}])


def test_messages_of_a_server_never_reach_the_terminal_raw():
    body = json.dumps({"error": "\x1b[31m" + "x" * 10_000}).encode()
    transport = httpx.MockTransport(lambda request: httpx.Response(400, content=body))
    with pytest.raises(RewardUnavailable) as error:
        RemoteReward("http://h:1/x", retries=0, transport=transport)(IMAGES[:1], ["a"], [{}])
    assert "\x1b" not in str(error.value) and len(str(error.value)) < 800


def constant(images, prompts, metadata):
    return [0.0] * len(images)


def test_requests_that_are_too_long_are_refused_by_their_announcement():
    with running_server({"r": constant}, limits=Limits(max_bytes=1000)) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(
                b"POST /score/r HTTP/1.1\r\nhost: h\r\ncontent-length: 600000000\r\n\r\n"
            )
            connection.settimeout(5)  # not one byte of the body is sent
            assert connection.recv(100).startswith(b"HTTP/1.1 413")


def test_requests_that_drip_are_ended_and_hold_no_place_for_long():
    limits = Limits(max_seconds=1.0, max_waiting=1)
    with running_server({"r": constant}, limits=limits) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(
                b"POST /score/r HTTP/1.1\r\nhost: h\r\ncontent-length: 1000\r\n\r\n{"
            )
            connection.settimeout(10)
            assert connection.recv(100).startswith(b"HTTP/1.1 408")
        remote = RemoteReward(f"{url}/r", retries=0)
        assert remote(IMAGES[:1], PROMPTS[:1], [{}]).tolist() == [0.0]


@pytest.mark.parametrize(
    "headers, body, status",
    [
        ({}, b"[" * 100_000, 400),
        ({}, b'{"images": ' + b"9" * 5000 + b"}", 400),
        ({"content-encoding": "gzip"}, b"x", 400),
    ],
)
def test_requests_that_are_hard_to_parse_are_refused(headers, body, status):
    with running_server({"r": constant}) as url:
        answer = httpx.post(f"{url}/score/r", content=body, headers=headers, trust_env=False)
        assert answer.status_code == status


def test_a_port_that_is_taken_and_a_misspelt_option_are_refused_before_loading():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(ValueError, match="cannot listen at"):
            serve(["jpeg_compressibility"], port=taken.getsockname()[1])
    with pytest.raises(ValueError, match="cannot listen at"):
        serve(["jpeg_compressibility"], port=70_000)
    with pytest.raises(ValueError, match="does not take quantity"):
        serve(["jpeg_compressibility"], {"jpeg_compressibility": {"quantity": 1}}, port=free_port())


def test_a_group_reward_behind_a_server_gets_whole_groups():
    @reward_function("rank_of_width", whole_group=True)
    def rank(images, prompts, metadata):
        widths = [image.width for image in images]
        return [sorted(widths).index(width) for width in widths]

    with running_server({"rank": rank}) as url:
        remote = RemoteReward(f"{url}/rank", batch_size=2, whole_group=True)
        assert score(remote, IMAGES, ["a"] * 5).tolist() == [0, 1, 2, 3, 4]


# ---------------------------------------------------------------- a judge that writes


def chat(reply: str, seen: list | None = None) -> httpx.MockTransport:
    def handler(request: httpx.Request) -> httpx.Response:
        if seen is not None:
            seen.append(json.loads(request.content))
        return httpx.Response(200, json={"choices": [{"message": {"content": reply}}]})

    return httpx.MockTransport(handler)


def test_judge_asks_about_each_image_and_reads_the_last_score(tmp_path):
    seen = []
    (tmp_path / "question.txt").write_text("How good is {prompt}? {braces} stay.")
    judge = make_reward(
        "vlm_judge",
        url="http://127.0.0.1:1/",
        model="m",
        template=tmp_path / "question.txt",
        transport=chat("Final Score: 2\nFinal Score: 4.5", seen),
    )
    assert score(judge, IMAGES[:2], ["a {x}", "b"]).tolist() == [4.5, 4.5]
    texts = sorted(request["messages"][0]["content"][1]["text"] for request in seen)
    assert texts == ["How good is a {x}? {braces} stay.", "How good is b? {braces} stay."]
    assert seen[0]["temperature"] == 0 and seen[0]["messages"][0]["content"][0]["image_url"][
        "url"
    ].startswith("data:image/png;base64,")


def test_judge_without_a_score_is_nan_with_a_warning():
    judge = VlmJudge("http://127.0.0.1:1", "m", transport=chat("I cannot say."))
    with (
        pytest.warns(UserWarning, match="no score of 1 to 5 in the answer for 'prompt 0'"),
        pytest.raises(RewardError, match="returned .nan."),
    ):
        score(judge, IMAGES[:1], PROMPTS[:1])
    with pytest.raises(RewardUnavailable, match="no chat completion"):
        VlmJudge(
            "http://127.0.0.1:1",
            "m",
            retries=0,
            transport=httpx.MockTransport(lambda r: httpx.Response(200, json={"choices": []})),
        )(IMAGES[:1], ["a"], [{}])
    with pytest.raises(ValueError, match="no {prompt}"):
        VlmJudge("http://127.0.0.1:1", "m", template="rate it")


@pytest.mark.parametrize(
    "text, value",
    [
        ("Final Score: 3", 3.0),
        ("final score - **4.25**", 4.25),
        ("**Final Score**: 5/5", 5.0),
        ("Final Score: -1", -1.0),
        ("Final Score (1-5): 4", 4.0),
        ("**Final Score (1–5):** 4", 4.0),
        ("Final Score [1 to 5] = 3.5", 3.5),
        ("Final Score (out of 5): 2", 2.0),
        ("Final Score: 4 (on a scale of 1-5)", 4.0),
        ("Final Score on a scale of 1 to 5: 3", 3.0),
        ("Final Score: (4)", 4.0),
        ("Final Score: [4]", 4.0),
        ("Final Score:\n\n4", 4.0),
        ("Final Score (1-5):\n**4**", 4.0),
        ('{"final_score": 4}', 4.0),
        ("Final Score: 4,5", 4.5),
        ("Final Score: 4 out of 5", 4.0),
        ("Final Score: 4 out of 5 stars", 4.0),
        ("Final Score: 3 stars out of 5", 3.0),
        ("Final-Score: 2", 2.0),
        ("Final Score from 1 to 5 = 2", 2.0),
        ("Final Score: $\\boxed{4}$", 4.0),
        ("Final Score: 4\nFinal Score scale: 1 to 5", 4.0),
        ("end with 'Final Score: x', x from 1 to 5. Final Score: 2", 2.0),
        ("Final Score (1-5): 4\nThe 3 foxes are fine.", 4.0),
    ],
)
def test_ratings(text, value):
    assert read_rating(text) == value
    assert math.isnan(read_rating(text, scale=(1, 5))) == (value == -1.0)


@pytest.mark.parametrize(
    "text",
    ["Final Score: 95", "Final Score: 0", "Final Score: 4/10", "Final Score: 50 out of 100", "none",
     "Final Score: five", "Final Score: ", "Final Score: 3-4", "Final Score: 4–5",
     "Final Score: 1e3", "Final Score: 3 or 4", "Final Score: between 3 and 4",
     "Final Score: \N{MINUS SIGN}3",
     "Final Score: 5 stars out of 10", "Final Score: 3 to 4"],
)  # fmt: skip
def test_ratings_off_the_scale_are_no_ratings(text):
    assert math.isnan(read_rating(text, scale=(1, 5)))


MESSAGES = {
    "null content": {"content": None, "reasoning_content": "Final Score: 4"},
    "empty content": {"content": " ", "reasoning": "Final Score: 4"},
    "no content": {"reasoning_content": "Final Score: 4"},
    "parts": {"content": [{"type": "text", "text": "Final "}, {"text": "Score: 4"}]},
    "both": {"content": "Final Score: 4", "reasoning_content": "Final Score: 1"},
}


@pytest.mark.parametrize("kind", MESSAGES)
def test_the_text_of_an_answer_in_any_field(kind):
    answer = {"choices": [{"message": MESSAGES[kind]}]}
    transport = httpx.MockTransport(lambda request: httpx.Response(200, json=answer))
    judge = VlmJudge("http://127.0.0.1:1", "m", transport=transport)
    assert score(judge, IMAGES[:1], PROMPTS[:1]).tolist() == [4.0]


def test_an_answer_without_any_text_is_one_image_without_score():
    answer = {"choices": [{"message": {"content": None}}]}
    transport = httpx.MockTransport(lambda request: httpx.Response(200, json=answer))
    judge = VlmJudge("http://127.0.0.1:1", "m", transport=transport)
    with pytest.warns(UserWarning, match="no score of 1 to 5"):
        assert score(judge, IMAGES[:1], ["p" * 10**6], on_failure="drop").isnan().all()


def test_the_warning_about_a_long_prompt_is_short():
    judge = VlmJudge("http://127.0.0.1:1", "m", transport=chat("\x1b[2J no"))
    with pytest.warns(UserWarning) as caught:
        score(judge, IMAGES[:1], ["p" * 10**6], on_failure="drop")
    assert len(str(caught[0].message)) < 400 and "\x1b" not in str(caught[0].message)


def test_scales_of_other_judges():
    judge = VlmJudge(
        "http://127.0.0.1:1", "m", template="{prompt}?", transport=chat("Final Score: 95")
    )
    assert score(judge, IMAGES[:1], ["a"]).tolist() == [95.0]
    options = dict(url="http://127.0.0.1:1", model="m", scale=(0, 100))
    judge = make_reward("vlm_judge", transport=chat("Final Score: 95/100"), **options)
    assert score(judge, IMAGES[:1], ["a"]).tolist() == [95.0]


@pytest.mark.parametrize("text", ["Better: 1 or 2", "Better: first and second", "Better: 12", ""])
def test_a_judge_that_does_not_choose_has_no_preference(text):
    assert math.isnan(read_preference(text))


def test_preferences_are_win_rates_of_whole_groups():
    judge = make_reward(
        "vlm_preference", url="http://127.0.0.1:1", model="m", transport=chat("Better: 1")
    )
    assert score(judge, IMAGES, ["a", "b", "a", "b", "a"]).tolist() == [0.5] * 5
    one = VlmPreference("http://h", "m", both_orders=False, transport=chat("Better: 1"))
    assert score(one, IMAGES[:3], ["a"] * 3).tolist() == [1.0, 0.5, 0.0]
    mute = VlmPreference("http://h", "m", transport=chat("Both are nice."))
    assert score(mute, IMAGES[:2], ["a"] * 2, on_failure="drop").isnan().all()
