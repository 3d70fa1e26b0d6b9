"""Runs of models that edit a picture: trained, resumed, evaluated and drawn from, and refused."""

import json

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image
from tiny import picture
from tiny_runs import tiny_config

from chunk_grpo_nb.analysis.cli import main
from chunk_grpo_nb.models.pipelines import LoadedPipeline
from chunk_grpo_nb.models.policy import load_policy
from chunk_grpo_nb.models.tiny import TINY_WORLD, tiny_pipeline
from chunk_grpo_nb.prompts import Prompt, PromptError, load_prompts
from chunk_grpo_nb.rewards.registry import reward_function
from chunk_grpo_nb.sources import check_sources, source_image
from chunk_grpo_nb.training.callbacks import Callback
from chunk_grpo_nb.training.config import flat, load_config
from chunk_grpo_nb.training.model_cards import loading_code
from chunk_grpo_nb.training.records import RunFolder, read_rows
from chunk_grpo_nb.training.rollout import scorer
from chunk_grpo_nb.training.state import evaluation_sampler
from chunk_grpo_nb.training.trainer import train

SEEN = []


class Cut(Exception):
    """The lights go out."""


class Stop(Callback):
    def on_iteration(self, trainer, iteration):
        if iteration == 1:
            raise Cut


@reward_function("kept", needs_source=True)
def kept(images, prompts, metadata):
    """How near the image is to its source; remembers what it saw."""
    SEEN.extend((prompt, row["source"].size) for prompt, row in zip(prompts, metadata, strict=True))
    pairs = [(image, row["source"].resize(image.size)) for image, row in zip(images, metadata)]
    return [-np.abs(np.asarray(a, float) - np.asarray(b)).mean() / 255 for a, b in pairs]


def write_rows(folder, *rows) -> None:
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a tiny Kontext, pictures in a folder below the prompts, and a config."""
    home = tmp_path_factory.mktemp("edits")
    tiny_pipeline("flux-kontext").save_pretrained(home / "kontext")
    world = {"max_sequence_length": 24}  # all that its tokenizer takes
    (home / "kontext" / "world.json").write_text(json.dumps(world))
    (home / "pictures").mkdir()
    picture().save(home / "pictures" / "one.png")
    picture(("white", "green"), (20, 12)).save(home / "pictures" / "two.jpg")
    write_rows(
        home,
        {"prompt": "make it red", "image": "pictures/one.png"},
        {"prompt": "make it red", "image": "pictures/two.jpg"},
        {"prompt": "make it blue", "image": "pictures/two.jpg"},
    )
    return home


def config_of(home, **settings):
    paths = {
        "model": str(home / "kontext"),
        "train_prompts": str(home / "prompts.jsonl"),
        "validation_prompts": str(home / "prompts.jsonl"),
    }
    return tiny_config(home, **paths, rewards={"kept": 1.0}, lora_rank=2, **settings)


def flat_config(home, path, **settings):
    path.write_text(yaml.safe_dump(dict(flat(config_of(home, **settings))), sort_keys=False))
    return str(path)


def test_a_run_of_an_editing_model_from_train_to_resume(home, tmp_path, capsys):
    SEEN.clear()
    config, run = flat_config(home, tmp_path / "my.yaml"), tmp_path / "run"
    assert main(["train", "--config", config, "--out", str(run)]) == 0, capsys.readouterr().err
    opened = RunFolder.open(run)
    rows = read_rows(opened)
    assert len(rows) == 4 and (rows.grad_norm > 0).all()
    assert read_rows(opened, "replay")["velocity_error"].item() < 1e-6
    assert {size for _, size in SEEN} == {(12, 10), (20, 12)}  # the pictures as they are
    assert {text for text, _ in SEEN} == {"make it red", "make it blue"}

    # cut off after the first iteration and resumed: the same bits
    half = tmp_path / "half"
    first = ["train", "--config", config, "--out", str(half)]

    with pytest.raises(Cut):
        train(load_config(config), half, callbacks=[Stop()])
    assert main([*first, "--resume"]) == 0, capsys.readouterr().err
    assert (half / "metrics.jsonl").read_text() == (run / "metrics.jsonl").read_text()

    table, grid = tmp_path / "after.csv", tmp_path / "grid.png"
    prompts = ["--prompts", str(home / "prompts.jsonl"), "--rewards", "kept", "--images", "2"]
    assert main(["evaluate", str(run), *prompts, "--out", str(table)]) == 0
    assert len(pd.read_csv(table)) == 6
    one, two = str(home / "pictures" / "one.png"), str(home / "pictures" / "two.jpg")
    sample = ["sample", str(run), "make it red", "make it blue", "--images", "1"]
    assert main([*sample, "--image", one, "--image", two, "--out", str(grid)]) == 0
    other = tmp_path / "other.png"
    assert main([*sample, "--image", one, "--out", str(other)]) == 0
    with Image.open(grid) as drawn, Image.open(other) as again:
        assert drawn.size == again.size and drawn.tobytes() != again.tobytes()


def test_the_code_of_a_card_edits_a_picture_as_the_policy_does(home, tmp_path, monkeypatch):
    from tiny import disturb

    config = config_of(home)
    policy = load_policy(config.policy.model, lora_rank=2)
    disturb(policy)
    policy.save(tmp_path)
    image = picture(size=(24, 20))
    image.save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    exec(loading_code(config, policy.pipe, "make it red"), {"__name__": "card"})
    sampler = evaluation_sampler(config)
    asked = [Prompt("make it red", {"image": image})]
    (ours,) = policy.decode(policy.sample(asked, sampler, [0], [0]))
    with Image.open("image.png") as drawn:
        assert drawn.tobytes() == ours.tobytes()


@pytest.mark.parametrize("name", ["qwen-image-edit", "qwen-image-edit-plus"])
def test_qwen_image_edit_trains_too(home, tmp_path, monkeypatch, name):
    pipe = tiny_pipeline(name)
    folder = tmp_path / name
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": type(pipe).__name__}))
    pipe.register_to_config(_name_or_path=str(folder))
    loaded = LoadedPipeline(pipe, TINY_WORLD[name])  # its processor cannot be read from a folder
    monkeypatch.setattr("chunk_grpo_nb.models.policy.load_pipeline", lambda *_: loaded)
    settings = {"model": str(folder), "group_size": 2, "height": 8, "width": 8, "num_steps": 4}
    settings |= {"chunker": "step", "iterations": 1, "prompts_per_iteration": 3}
    prompts = {key: str(home / "prompts.jsonl") for key in ("train_prompts", "validation_prompts")}
    options = dict(prompts, rewards={"kept": 1.0}, lora_rank=2, **settings)
    if "plus" in name:
        with pytest.raises(ValueError, match="rollout_batch = 0.*set rollout_batch to 1"):
            train(tiny_config(home, **options), tmp_path / "run")
        options |= {"rollout_batch": 1}
    run = train(tiny_config(home, **options), tmp_path / "run")
    assert (read_rows(run).grad_norm > 0).all()
    assert read_rows(run, "replay")["velocity_error"].item() < 1e-6


def never_loaded(*_):
    raise AssertionError("the model was loaded before its prompts were checked")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": "pictures/three.png"}, r"prompts.jsonl, line 2: no picture at .*three.png"),
        ({"image": "words.png"}, r"prompts.jsonl, line 2: .*words.png is no picture that can be"),
        ({"image": 7}, r'line 2: an editing model needs a picture in the field "image", found .7'),
        ({}, r"line 2: an editing model needs a picture.*relative to the prompt file"),
    ],
)
def test_rows_without_a_picture_are_refused_before_loading(
    home, tmp_path, monkeypatch, row, message
):
    (tmp_path / "pictures").mkdir()
    picture().save(tmp_path / "pictures" / "one.png")
    (tmp_path / "words.png").write_text("words")
    write_rows(
        tmp_path,
        {"prompt": "make it red", "image": "pictures/one.png"},
        {"prompt": "make it blue", **row},
    )
    monkeypatch.setattr("chunk_grpo_nb.models.policy.load_pipeline", never_loaded)
    settings = {"train_prompts": str(tmp_path / "prompts.jsonl"), "model": str(home / "kontext")}
    for watched in (settings["train_prompts"], str(home / "prompts.jsonl")):
        config = tiny_config(home, **settings, validation_prompts=watched)
        with pytest.raises(PromptError, match=message):
            train(config, tmp_path / "run")
    turned = {**settings, "train_prompts": str(home / "prompts.jsonl")}
    config = tiny_config(home, **turned, validation_prompts=settings["train_prompts"])
    with pytest.raises(PromptError, match=message):
        train(config, tmp_path / "run")


def test_a_picture_is_read_upright_in_rgb_and_from_data_sets_as_it_is(tmp_path):
    image = Image.new("RGB", (4, 2), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    image.save(tmp_path / "turned.jpg", exif=exif)
    Image.new("LA", (4, 2)).save(tmp_path / "grey.png")
    write_rows(
        tmp_path,
        {"prompt": "a", "image": "turned.jpg"},
        {"prompt": "b", "image": str(tmp_path / "grey.png")},
    )
    turned, grey = load_prompts(tmp_path / "prompts.jsonl")
    check_sources([turned, grey])
    assert source_image(turned).size == (2, 4)
    assert source_image(grey).mode == "RGB"
    (tmp_path / "turned.jpg").write_bytes((tmp_path / "turned.jpg").read_bytes()[:-40])
    with pytest.raises(PromptError, match="line 1: .*turned.jpg is no picture"):
        source_image(turned)


def test_only_rewards_that_ask_see_the_picture(home):
    prompts = load_prompts(home / "prompts.jsonl")
    seen = []

    def plain(images, texts, metadata):
        seen.extend(metadata)
        return [0.0] * len(images)

    images = [picture(size=(8, 8))] * 3
    scores = scorer({"plain": plain, "kept": kept})(images, prompts)
    assert [row["image"] for row in seen] == ["pictures/one.png"] + ["pictures/two.jpg"] * 2
    assert not any("source" in row for row in seen)
    assert scores["kept"][1] == scores["kept"][2] != scores["kept"][0]


def test_commands_say_what_an_editing_model_needs(home, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("chunk_grpo_nb.models.policy.load_pipeline", never_loaded)
    model, out = str(home / "kontext"), str(tmp_path / "grid.png")
    one = str(home / "pictures" / "one.png")
    sample = ["sample", model, "a", "b", "c", "--out", out]
    for words, message in (
        (sample, "edits pictures: give --image once, or once for each of the 3 prompts, not 0"),
        ([*sample, "--image", one, "--image", one], "not 2 times"),
        ([*sample, "--image", "nowhere.png"], "--image nowhere.png: no picture at nowhere.png"),
        (["sample", "shapes", "a", "--image", one, "--out", out], "shapes does not edit pictures"),
        (
            ["evaluate", model, "--prompts", "shapes_test", "--out", str(tmp_path / "a.csv")],
            'needs a picture in the field "image"',
        ),
        (
            ["benchmark", "geneval", "shapes_test", "--model", model, "--out", str(tmp_path / "g")],
            "edits pictures; geneval asks for new ones",
        ),
    ):
        assert main(words) == 2
        assert message in capsys.readouterr().err
