"""`shapes`: scenes, captions, splits, verifier and rewards."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from chunk_grpo_nb.prompts import load_prompts
from chunk_grpo_nb.rewards.registry import make_reward
from chunk_grpo_nb.shapes.proxies import near_miss, request_features, scene_features, truth
from chunk_grpo_nb.shapes.report import balanced_requests
from chunk_grpo_nb.shapes.rewards import wanted_conditions
from chunk_grpo_nb.shapes.scenes import (
    COLOURS,
    KINDS,
    PREFIXES,
    SHAPES,
    SUFFIXES,
    Item,
    Request,
    Scene,
    all_requests,
    caption,
    conditions,
    holds,
    parse_caption,
    render,
    sample_scene,
    split_prompts,
)
from chunk_grpo_nb.shapes.verifier import find_objects, verify, verify_batch

PROMPTS = Path(__file__).parent.parent / "data" / "prompts"


@pytest.fixture(scope="module")
def drawn():
    """600 requests, 100 of each kind, with a scene and its picture each."""
    rng = np.random.default_rng(5)
    requests = balanced_requests(100, rng)
    scenes = [sample_scene(request, rng) for request in requests]
    return requests, scenes, render(scenes)


@pytest.mark.parametrize("kind", KINDS)
def test_captions_are_read_back(kind):
    for request in all_requests(kind):
        for prefix, suffix in ((PREFIXES[0], SUFFIXES[0]), (PREFIXES[3], SUFFIXES[2])):
            assert parse_caption(caption(request, prefix, suffix)) == request


@pytest.mark.parametrize(
    "text",
    [
        "a dog",
        "seven circles",
        "a red circle above a square",
        "",
        "two circle",
        "a circle and a red square",
    ],
)
def test_captions_outside_the_grammar_are_refused(text):
    with pytest.raises(ValueError, match="outside the grammar"):
        parse_caption(text)


def test_splits_share_no_caption():
    texts = {
        split: {r["prompt"] for r in split_prompts(split)}
        for split in ("train", "validation", "test")
    }
    assert (
        not texts["train"] & texts["test"]
        and not texts["train"] & texts["validation"]
        and not texts["validation"] & texts["test"]
    )
    assert all({r["kind"] for r in split_prompts(split)} == set(KINDS) for split in texts)


def test_attribution_pairs_are_held_out_whole():
    pairs = {
        split: {
            frozenset(parse_caption(r["prompt"]).objects)
            for r in split_prompts(split)
            if r["kind"] == "attribution"
        }
        for split in ("train", "test")
    }
    assert pairs["test"] and not pairs["train"] & pairs["test"]


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_prompt_files_hold_the_split(split):
    lines = [
        json.loads(line) for line in (PROMPTS / f"shapes_{split}.jsonl").read_text().splitlines()
    ]
    known = {r["prompt"]: r for r in split_prompts(split)}
    assert all(line == known[line["prompt"]] for line in lines)
    assert {line["kind"] for line in lines} == set(KINDS)
    assert len(load_prompts(PROMPTS / f"shapes_{split}.jsonl")) == len(lines)


def test_scenes_fulfil_their_request_inside_the_frame(drawn):
    requests, scenes, pictures = drawn
    assert truth(scene_features(scenes), request_features(requests)).diagonal().all()
    ground = np.array([scene.ground for scene in scenes])
    assert (
        np.abs(pictures[:, 0].mean(1) - ground).max() <= 1
        and np.abs(pictures[:, :, -1].mean(1) - ground).max() <= 1
    )


def test_an_impossible_scene_is_refused():
    crowd = Request("counting", (("triangle", None),) * 12)
    with pytest.raises(ValueError, match="no room for 12 shapes.*fewer shapes"):
        sample_scene(crowd, np.random.default_rng(0), tries=5)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_covers_its_area(shape):
    scene = Scene((Item(shape, "black", 16.3, 15.8, 6.0),), (255.0, 255.0, 255.0))
    drawn = (255 - render([scene])[0].astype(float)) / (255 - np.array(COLOURS["black"]))
    assert drawn[..., 0].sum() == pytest.approx(np.pi * 36, rel=0.02)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("colour", COLOURS)
def test_the_verifier_reads_shape_colour_and_place(shape, colour):
    item = Item(shape, colour, 13.4, 18.2, 5.0)
    (found,) = find_objects(render([Scene((item,))]))[0]
    assert (found.shape, found.colour) == (shape, colour)
    assert (
        abs(found.x - item.x) < 0.5
        and abs(found.y - item.y) < 0.5
        and abs(found.radius - item.radius) < 0.3
    )


def test_fresh_scenes_are_read_right(drawn):
    requests, _, pictures = drawn
    assert (
        np.mean([v.strict for v in verify_batch(pictures, [conditions(r) for r in requests])])
        >= 0.995
    )


def test_blur_and_noise_do_not_blind_the_verifier(drawn):
    requests, _, pictures = drawn
    rough = gaussian_filter(pictures.astype(float), (0, 0.7, 0.7, 0)) + np.random.default_rng(
        0
    ).normal(0, 8, pictures.shape)
    verdicts = verify_batch(
        rough.clip(0, 255).round().astype(np.uint8), [conditions(r) for r in requests]
    )
    assert np.mean([v.strict for v in verdicts]) >= 0.98


def test_wrong_captions_are_refused(drawn):
    requests, scenes, pictures = drawn
    rng = np.random.default_rng(1)
    misses = [near_miss(r, rng) for r in requests]
    wrong = ~truth(scene_features(scenes), request_features(misses)).diagonal()
    verdicts = verify_batch(pictures, [conditions(r) for r in misses])
    assert wrong.sum() > 500 and np.mean([v.strict for v, w in zip(verdicts, wrong) if w]) <= 0.01


def test_a_verdict_says_why():
    scene = Scene((Item("circle", "red", 8, 16, 5), Item("square", "blue", 24, 16, 5)))
    picture = render([scene])[0]
    good = verify(Image.fromarray(picture), conditions(parse_caption("a circle left of a square")))
    assert good.strict and good.dense == 1 and good.reasons == [""] * 4
    bad = verify(picture, conditions(parse_caption("a circle above a square")))
    assert (
        bad.met == [True, True, False, True]
        and bad.reasons[2] == "no circle above a square"
        and bad.dense == 0.75
    )
    swapped = verify(picture, conditions(parse_caption("a blue circle and a red square")))
    assert swapped.met == [True, True, False, False, True]
    more = verify(picture, conditions(parse_caption("two circles")))
    assert more.met == [True, False, True] and "1 circle instead of 2" in more.reasons


def test_relations_need_a_margin():
    a, b = Item("circle", "red", 10, 10, 3), Item("square", "red", 12, 20, 3)
    assert holds("above", a, b) and holds("below", b, a)
    assert not holds("left of", a, b) and not holds("right of", a, b)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((64, 64, 3), np.uint8),
        np.zeros((32, 32, 3), np.float32),
        Image.new("RGB", (512, 512)),
    ],
)
def test_pictures_of_another_size_are_refused(image):
    with pytest.raises(ValueError, match="32 x 32"):
        verify(image, conditions(parse_caption("a circle")))


def test_conditions_must_be_known():
    picture = np.zeros((32, 32, 3), np.uint8)
    with pytest.raises(ValueError, match="no conditions"):
        verify(picture, [])
    with pytest.raises(ValueError, match="unknown test 'is'"):
        verify(picture, [{"test": "is"}])
    with pytest.raises(ValueError, match="1 pictures but 2 lists"):
        verify_batch([picture], [[], []])


def test_gold_rewards(drawn):
    requests, _, pictures = drawn
    images, prompts = (
        [Image.fromarray(p) for p in pictures[::50]],
        [caption(r) for r in requests[::50]],
    )
    metadata = [{"conditions": conditions(r)} for r in requests[::50]]
    assert make_reward("shapes_strict")(images, prompts, metadata) == [1.0] * len(images)
    assert make_reward("shapes_dense")(images, prompts, [{}] * len(images)) == [1.0] * len(images)
    blank = [Image.new("RGB", (32, 32), (240, 240, 240))] * len(images)
    assert max(make_reward("shapes_dense")(blank, prompts, metadata)) == 0.0
    assert wanted_conditions(prompts, [{}] * len(prompts)) == [m["conditions"] for m in metadata]
