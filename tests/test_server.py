"""The reward server as a real process, and the client against servers that die, hang or talk nonsense."""

import http.server
import json
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

from chunk_grpo_nb.rewards.registry import (
    RewardError,
    RewardUnavailable,
    WeightedReward,
    check_pairing,
    make_reward,
    reward_function,
    score,
    score_async,
)
from chunk_grpo_nb.rewards.remote import (
    RemoteReward,
    VlmJudge,
    decode_image,
    encode_image,
    read_rating,
)
from chunk_grpo_nb.rewards.server import running_server, serve

pytest.importorskip("fastapi")
IMAGES = [Image.new("RGB", (10 + i, 8), (i, 2 * i, 3)) for i in range(5)]
PROMPTS = [f"prompt {i}" for i in range(5)]

REWARDS = """
import os, time

def width(images, prompts, metadata):
    return [image.width + 100 * int(p.split()[-1]) + m.get("bonus", 0) for image, p, m in zip(images, prompts, metadata)]

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
        f"from chunk_grpo_nb.rewards.server import serve; serve({names}, port={port}, max_batch=3)"
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


def test_scores_come_back_in_order_with_metadata(server):
    remote = client(server, "width", batch_size=2)
    assert remote.health() == {
        "status": "ok",
        "rewards": ["die", "hang", "nan", "picky", "width"],
        "max_batch": 3,
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
    post = lambda body: httpx.post(
        f"{server[0]}/score/width",
        content=body,
        headers={"authorization": "Bearer secret"},
        trust_env=False,
    )
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

    with running_server({"slow": slow}, max_waiting=1) as url:
        hasty = RemoteReward(f"{url}/slow", batch_size=1, workers=5, retries=0)
        with pytest.raises(RewardUnavailable, match="status 503: 1 requests are already in line"):
            score(hasty, IMAGES, PROMPTS)
        patient = RemoteReward(f"{url}/slow", batch_size=1, workers=5, retries=9, backoff=0.05)
        assert score(patient, IMAGES, PROMPTS).tolist() == [1.0] * 5


def test_large_images_and_requests_are_refused():
    with running_server({"r": lambda i, p, m: [0.0] * len(i)}, max_pixels=100) as url:
        with pytest.raises(RewardUnavailable, match="status 413: image of 64 × 8 pixels"):
            score(make_reward(f"{url}/r"), [Image.new("RGB", (64, 8))], ["a"])
    with running_server({"r": lambda i, p, m: [0.0] * len(i)}, max_bytes=1000) as url:
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
        pytest.warns(UserWarning, match="no score in the answer for 'prompt 0'"),
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
    ],
)
def test_ratings(text, value):
    assert read_rating(text) == value
