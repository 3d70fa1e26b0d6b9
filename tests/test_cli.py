"""The console command: every command once on a tiny model, and every refusal in one line."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image
from test_sweep import write

import chunk_grpo_nb
from chunk_grpo_nb.analysis.cli import main, make_parser
from chunk_grpo_nb.models.tiny import tiny_pipeline
from chunk_grpo_nb.rewards.registry import RewardError, make_reward

REWARD = "test_cli:redness"
ROOT = Path(__file__).resolve().parent.parent
COMMANDS = "train evaluate sample benchmark plan report run sweep serve".split()


def redness(images, prompts, metadata):
    return [sum(i.resize((1, 1)).getpixel((0, 0))[:1]) / 255 for i in images]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a tiny pipeline, prompts, a config, and one trained run."""
    home = tmp_path_factory.mktemp("cli")
    tiny_pipeline("flux").save_pretrained(home / "flux")
    (home / "prompts.txt").write_text("red circle\nblue square\n")
    config = {
        "model": str(home / "flux"),
        "train_prompts": str(home / "prompts.txt"),
        "validation_prompts": str(home / "prompts.txt"),
        "rewards": {REWARD: 1.0},
        "prompts_per_iteration": 2,
        "group_size": 2,
        "num_steps": 4,
        "chunker": "step",
        "fraction": 1.0,
        "height": 16,
        "width": 16,
        "iterations": 1,
        "validation_images": 2,
        "validate_every": 1,
        "device": "cpu",
        "clip_low": 0.1,
        "clip_high": 0.1,
    }
    (home / "my.yaml").write_text(yaml.safe_dump(config))
    assert (
        main(
            [
                "train",
                "--config",
                str(home / "my.yaml"),
                "--out",
                str(home / "run"),
                "-p",
                "iterations",
                "2",
            ]
        )
        == 0
    )
    return home


def test_train_leaves_a_run_with_the_overridden_setting(home):
    assert yaml.safe_load((home / "run/config.yaml").read_text())["iterations"] == 2
    assert (home / "run/policy").is_dir()


def test_evaluate_writes_a_row_per_image_and_a_summary(home, capsys):
    words = [
        "evaluate",
        str(home / "run"),
        "--prompts",
        str(home / "prompts.txt"),
        "--rewards",
        REWARD,
        "--images",
        "2",
    ]
    assert main([*words, "--out", str(home / "after.parquet")]) == 0
    assert main([*words, "--base", "--out", str(home / "before.csv")]) == 0
    after, before = pd.read_parquet(home / "after.parquet"), pd.read_csv(home / "before.csv")
    assert len(after) == len(before) == 4 and REWARD in after
    assert "measure" in capsys.readouterr().out
    assert main([*words, "--out", str(home / "after.parquet")]) == 2
    assert "exists; choose another name" in capsys.readouterr().err


def test_sample_draws_a_row_per_prompt(home):
    assert (
        main(
            [
                "sample",
                str(home / "run"),
                "red circle",
                "blue square",
                "--images",
                "3",
                "--out",
                str(home / "grid.png"),
            ]
        )
        == 0
    )
    width, height = Image.open(home / "grid.png").size
    assert width > height > 96


def test_batches_change_no_image(home, capsys, monkeypatch):
    """`--batch` and the run's `rollout_batch` bound a call; the images stay the same."""
    from chunk_grpo_nb.models.policy import Policy

    calls, draw = [], Policy.sample

    def watched(self, prompts, *rest, **options):
        calls.append(len(prompts))
        return draw(self, prompts, *rest, **options)

    monkeypatch.setattr(Policy, "sample", watched)
    words = ["sample", str(home / "run"), "red circle", "blue square", "--images", "3"]
    assert main([*words, "--out", str(home / "whole.png")]) == 0
    assert main([*words, "--batch", "4", "--out", str(home / "parts.png")]) == 0
    assert calls == [6, 4, 2]
    whole, parts = (Image.open(home / f"{name}.png").tobytes() for name in ("whole", "parts"))
    assert whole == parts
    settings = home / "run/config.yaml"
    before = settings.read_text()
    settings.write_text(before.replace("rollout_batch: 0", "rollout_batch: 5"))
    try:
        assert main([*words, "--out", str(home / "run_batch.png")]) == 0
    finally:
        settings.write_text(before)
    assert calls[3:] == [5, 1]


def test_benchmark_fills_the_official_layout(home, capsys, monkeypatch):
    data = {"tag": "single_object", "include": [{"class": "cup", "count": 1}]}
    lines = [json.dumps({**data, "prompt": f"a photo of a {name}"}) for name in ("cup", "red cup")]
    (home / "evaluation_metadata.jsonl").write_text("\n".join(lines))
    words = ["benchmark", "geneval", str(home / "evaluation_metadata.jsonl")]
    words += ["--model", str(home / "run"), "--out", str(home / "geneval"), "--images", "2"]
    assert main([*words, "--steps", "2"]) == 0
    images = sorted(p.relative_to(home / "geneval") for p in (home / "geneval").rglob("*.png"))
    assert [str(p) for p in images] == [
        f"0000{k}/samples/0000{i}.png" for k in range(2) for i in range(2)
    ]
    out = capsys.readouterr().out
    assert "4 new images" in out and "evaluate_images.py" in out
    assert main([*words, "--steps", "2"]) == 0
    assert "0 new images" in capsys.readouterr().out, "what is there is not drawn again"
    assert main([*words, "--steps", "3"]) == 2
    assert "holds images of something else" in capsys.readouterr().err
    assert main([*words, "--steps", "2", "--base"]) == 2, "other weights, another folder"
    wise = [w if w != "geneval" else "wise" for w in words]
    assert main([*wise, "--score"]) == 2
    assert "cannot be scored here" in capsys.readouterr().err


def test_benchmark_takes_weights_beside_a_model(home):
    (home / "one.jsonl").write_text(
        json.dumps({"prompt_id": 7, "Prompt": "a cup", "prompt": "a cup"}) + "\n"
    )
    words = ["benchmark", "wise", str(home / "one.jsonl"), "--steps", "2", "--size", "16"]
    pictures = []
    for name, source in {
        "run": ["--model", str(home / "run")],
        "weights": ["--model", str(home / "flux"), "--weights", str(home / "run/policy")],
    }.items():
        assert main([*words, *source, "--out", str(home / f"wise_{name}")]) == 0
        pictures.append((home / f"wise_{name}/7.png").read_bytes())
    assert pictures[0] == pictures[1]


def wait_for_server(address):
    """Until the address answers, a minute at most."""
    for _ in range(600):
        try:
            return urllib.request.urlopen(address, timeout=5).read()
        except OSError:
            time.sleep(0.1)
    raise TimeoutError(address)


def test_serve_answers_over_http(tmp_path):
    """The real command on a free port scores an image, and Ctrl-C ends it without a traceback."""
    pytest.importorskip("uvicorn", reason="uvicorn is not installed: no server to start")
    pytest.importorskip("fastapi", reason="fastapi is not installed: no server to start")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "chunk_grpo_nb.analysis.cli", "serve", REWARD, "--port", str(port)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert "serving" in server.stdout.readline()
        wait_for_server(f"http://127.0.0.1:{port}/health")
        reward = make_reward(f"http://127.0.0.1:{port}/redness")
        assert reward([Image.new("RGB", (8, 8), "red")], ["red"], [{}]).tolist() == [1.0]
        server.send_signal(signal.SIGINT)
        _, err = server.communicate(timeout=300)
        assert server.returncode in (0, 130) and "Traceback" not in err, err
    finally:
        server.kill()


def test_ctrl_c_of_run_says_where_it_stopped(tmp_path):
    write(tmp_path / "slow.ipynb", "import time\ntime.sleep(600)")
    process = subprocess.Popen(
        [sys.executable, "-m", "chunk_grpo_nb.analysis.cli", "run", "slow.ipynb", "out.ipynb"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 240
    while not (tmp_path / "out.ipynb").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    lines = [line for line in err.splitlines() if line and not line.startswith("Executing:")]
    (line,) = lines  # nor does the kernel say anything
    assert line.startswith("chunk-grpo run: stopped. What was executed is in out.ipynb")


def test_report_says_what_to_install(home, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "seaborn", None)
    for name in [m for m in sys.modules if m.startswith("chunk_grpo_nb.analysis.")]:
        if name.rpartition(".")[2] in ("pages", "plots", "curves"):
            monkeypatch.delitem(sys.modules, name)
    assert main(["report", str(home / "run")]) == 2
    err = capsys.readouterr().err
    assert "pip install seaborn" in err and err.count("\n") == 1, err


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out.strip() == chunk_grpo_nb.__version__


def test_report_is_one_file_with_its_pictures_inside(home):
    assert main(["report", str(home / "run")]) == 0
    page = (home / "run/report.html").read_text()
    assert page.count("data:image/png;base64") >= 4 and "redness" in page and "iterations" in page
    assert main(["report", str(home / "run")]) == 0, "making the report again is fine"


def test_plan_says_what_fits(home, capsys):
    words = ["plan", "--model", str(home / "flux"), "--resolution", "16", "-p", "lora_rank", "2"]
    assert main([*words, "--gpu", "1GB"]) == 0
    assert "fits" in capsys.readouterr().out
    assert main([*words, "--gpu", "0.0001GB"]) == 1
    assert "DOES NOT FIT" in capsys.readouterr().out


def test_run_and_sweep(home, capsys):
    toy = write(home / "nbs/experiments/toy.ipynb", "assert seed < 5, 'too large'")
    assert main(["run", str(toy)]) == 0
    assert "seed: int = 0\n    of everything random" in capsys.readouterr().out
    assert main(["run", str(toy), str(home / "out.ipynb"), "-p", "sead", "1"]) == 2
    assert "did you mean 'seed'" in capsys.readouterr().err
    (home / "grid.yaml").write_text("experiment: toy\ngrid: {seed: [1, 9]}")
    words = ["sweep", str(home / "grid.yaml"), "--out", str(home / "results")]
    assert main([*words, "--status"]) == 0 and not (home / "results").exists()
    assert main([*words, "--jobs", "2"]) == 1, "one trial fails"
    assert "failed: all-seed=9" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        ("train --out {home}/new -p learning_rat 1.0e-4", "did you mean 'learning_rate'"),
        ("train --out {home}/new -p learning_rate 1e-4", "1.0e-5, not 1e-5"),
        ("train --out {home}/new -p seed 1 -p seed 2", "seed is given twice"),
        ("train --out {home}/new -p rewards {{a:", "not readable as YAML"),
        ("train --out {home}/new -p rewards [&a,*a]", "references are not supported"),
        ('train --out {home}/new -p rewards {{"a":1,"a":2}}', "is given twice"),
        ("train --out {home}/new -p rewards " + "[" * 2000, "nested deeper than 20"),
        (
            "evaluate {home}/run --out {home}/x.parquet --rewards http://127.0.0.1:9/width "
            "--prompts {home}/prompts.txt",
            "127.0.0.1:9/health",
        ),
        ("train --config {home}/none.yaml --out {home}/new", "no file"),
        ("train --config {home}/my.yaml --out {home}/run", "holds a run already"),
        (
            "evaluate {home}/nothing --out {home}/x.parquet --prompts {home}/prompts.txt "
            "--rewards test_cli:redness",
            "no such folder",
        ),
        (
            "evaluate {home}/run --out {home}/x.parquet --rewards shapes_strikt "
            "--prompts {home}/prompts.txt",
            "shapes_strikt",
        ),
        (
            "evaluate {home}/run --out {home}/x.parquet --rewards test_cli:redness "
            "--prompts {home}/none.txt",
            "none.txt",
        ),
        ("evaluate {home}/run --out {home}/x.xlsx", "must end in .parquet or .csv"),
        ("report {home}", "not a run folder"),
        ("report ~nobody-of-this-name/run", "a name that no user of this machine has"),
        ("train --config {home}/my.yaml --out ~nobody-of-this-name/run", "begins with ~"),
        ("train --config {home}/my.yaml --out ", "the run folder has no name"),
        ("train --config {home}/my.yaml --out {home}/new -p model \0", "special characters"),
        ("run {home}/none.ipynb", "no notebook"),
        ("sweep {home}/none.yaml", "no sweep file"),
        ("plan --model someone/unknown-model", "not known offline"),
        ("plan --model {home}/flux --resolution big", "write 720"),
        ("plan --model {home}/flux --resolution 10x", "write 720"),
        ("plan --model {home}/flux --gpu 80", "80GB or 79GiB"),
    ],
)
def test_refusals_are_one_line_and_leave_nothing(home, capsys, words, message):
    before = sorted(p.name for p in home.iterdir())
    assert main([w.format(home=home) for w in words.split(" ")]) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err and err.count("\n") == 1, err
    assert sorted(p.name for p in home.iterdir()) == before


@pytest.mark.parametrize("guidance", ["-1", "nan", "inf", "much"])
def test_guidance_is_a_finite_number_of_at_least_0(capsys, guidance):
    with pytest.raises(SystemExit) as end:
        main(["sample", "shapes", "a circle", "--out", "x.png", f"--guidance={guidance}"])
    assert end.value.code == 2
    assert "a number of at least 0" in capsys.readouterr().err


def test_debug_shows_the_error_itself():
    with pytest.raises(FileNotFoundError):
        main(["--debug", "report", "no/such/run"])


def test_every_command_explains_itself(capsys):
    for command in COMMANDS:
        with pytest.raises(SystemExit) as end:
            main([command, "--help"])
        assert end.value.code == 0
        assert "example: chunk-grpo " + command in " ".join(capsys.readouterr().out.split())
    assert "COMMAND" in make_parser().format_help()


def test_the_installed_command_answers_without_heavy_imports():
    run = subprocess.run(
        [Path(sys.executable).parent / "chunk-grpo", "--help"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert run.returncode == 0 and "train" in run.stdout, run.stderr
    code = (
        "import sys\n"
        "from chunk_grpo_nb.analysis.cli import make_parser\n"
        "make_parser()\n"
        "heavy = {'torch', 'diffusers', 'pandas', 'matplotlib', 'papermill'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout.strip() == "[]", run.stdout + run.stderr


@pytest.mark.parametrize(
    "words, message",
    [
        ("sample x red --images 0 --out x.png", "--images: '0': a whole number of at least 1"),
        ("sample x red --images -1 --out x.png", "--images: '-1': a whole number"),
        ("sample x red --batch 0 --out x.png", "--batch: '0': a whole number"),
        ("evaluate x --images -1 --out x.csv", "--images: '-1': a whole number"),
        ("benchmark genevil x --model x --out x", "invalid choice"),
        ("benchmark wise x --out x", "--model"),
        ("plan --processes 0", "--processes: '0': a whole number"),
        ("plan --processes \u00b2", "a whole number"),
        ("sweep x.yaml --jobs two", "--jobs: 'two': a whole number"),
        ("sweep x.yaml --backend spark", "invalid choice"),
        ("trian", "invalid choice"),
    ],
)
def test_a_mistake_in_the_words_is_one_line(capsys, words, message):
    with pytest.raises(SystemExit) as end:
        main(words.split(" "))
    err = capsys.readouterr().err
    assert end.value.code == 2 and message in err and err.count("\n") == 1, err


def test_control_characters_are_shown_and_not_sent(capsys):
    assert main(["report", "no\x1b[2Jrun"]) == 2
    err = capsys.readouterr().err
    assert "no\\x1b[2Jrun" in err and "\x1b" not in err


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff\xfe", b'{"nbformat": 4}'])
def test_files_that_are_no_notebooks(tmp_path, capsys, content):
    (tmp_path / "x.ipynb").write_bytes(content)
    assert main(["run", str(tmp_path / "x.ipynb")]) == 2
    err = capsys.readouterr().err
    assert "x.ipynb" in err and "Traceback" not in err and err.count("\n") == 1, err


def test_a_failing_notebook_is_named_without_a_traceback(tmp_path, capsys):
    bad = write(tmp_path / "bad.ipynb", "raise ValueError('\\x1b[31mred')")
    assert main(["run", str(bad), str(tmp_path / "out.ipynb")]) == 1
    err = capsys.readouterr().err
    assert "ValueError: \\x1b[31mred" in err and "Traceback" not in err


@pytest.mark.parametrize(
    "error, message",
    [
        (FloatingPointError("iteration 3, update 0: not finite"), "iteration 3, update 0"),
        (MemoryError("out of memory: lower micro_batch"), "lower micro_batch"),
        (MemoryError(), "MemoryError"),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried"), "draw fewer images"),
        (RewardError("reward 'redness' on 'red circle': no"), "red circle"),
    ],
)
def test_runs_that_stop_say_so_in_a_line(home, capsys, monkeypatch, error, message):
    def stop(*words, **options):
        raise error

    monkeypatch.setattr("chunk_grpo_nb.training.trainer.train", stop)
    assert main(["train", "--out", str(home / "stopped")]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1, err


def test_a_bug_keeps_its_traceback(home, monkeypatch):
    monkeypatch.setattr("chunk_grpo_nb.training.trainer.train", lambda *words, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["train", "--out", str(home / "stopped")])


def test_changed_prompts_are_refused_or_allowed(home, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("red circle\nblue square\n")
    train = ["train", "--out", str(tmp_path / "run")]
    words = [*train, "--config", str(home / "my.yaml"), "-p", "train_prompts", str(prompts)]
    assert main([*words, "--allow-changed-inputs"]) == 2, "a new run"
    assert main(words) == 0
    prompts.write_text("green circle\nblue square\n")
    more = [*train, "--resume", "-p", "iterations", "2"]
    assert main(more) == 2
    assert "train_prompts had hash" in (err := capsys.readouterr().err)
    assert "--allow-changed-inputs" in err and err.count("\n") < 30
    assert main([*more, "--allow-changed-inputs"]) == 0
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert list(manifest["resumed"][-1]["inputs"]) == ["train_prompts"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(home, capsys, monkeypatch, number):
    def send(self, trainer, iteration):
        os.kill(os.getpid(), number)

    out = home / f"signal_{number}"
    words = ["train", "--out", str(out)]
    with monkeypatch.context() as patched:
        patched.setattr("chunk_grpo_nb.training.callbacks.Progress.on_iteration", send)
        code = main([*words, "--config", str(home / "my.yaml"), "-p", "iterations", "3"])
    assert code == 128 + number
    err = capsys.readouterr().err
    assert "saved up to 1 iterations" in err and "Traceback" not in err
    assert f"chunk-grpo train --resume --out {out}" in err
    assert main([*words, "--resume"]) == 0, "the run knows its settings"
    assert main([*words, "--resume-from", str(out / "checkpoints/none.pt")]) == 2
    assert "none.pt is not among the finished checkpoints" in capsys.readouterr().err


COMPLETE = """
eval "$(register-python-argcomplete chunk-grpo)"
COMP_LINE="$1" COMP_POINT=${#1} COMP_TYPE=9
read -ra COMP_WORDS <<<"$1"
case "$1" in *" ") COMP_WORDS+=("");; esac
COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
_python_argcomplete chunk-grpo
printf "%s\n" "${COMPREPLY[@]}"
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize(
    "line, words",
    [
        ("chunk-grpo tr", ["train"]),
        ("chunk-grpo train --re", ["--resume", "--resume-from"]),
        ("chunk-grpo train --out x -p clip_", ["clip_low", "clip_high"]),
        ("chunk-grpo train -p sde ", ["flow", "dance", "cps"]),
        ("chunk-grpo run nb.ipynb out.ipynb -p ro", ["rounds"]),
        ("chunk-grpo run n", ["nb.ipynb"]),
    ],
)
def test_the_shell_completes_commands_settings_and_parameters(line, words, tmp_path):
    cell = nbformat.v4.new_code_cell(
        "rounds: int = 1  # how many", metadata={"tags": ["parameters"]}
    )
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "nb.ipynb")
    place = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["bash", "-c", COMPLETE, "complete", line]
    run = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PATH": place}, capture_output=True, text=True
    )
    assert [word.strip() for word in run.stdout.split()] == words, run.stderr
