"""Training the models of `shapes`, on sizes that take seconds; and the weights that are shipped."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from chunk_grpo_nb.paths import shapes_path
from chunk_grpo_nb.rewards.registry import RewardUnavailable, make_reward
from chunk_grpo_nb.shapes.pipeline import (
    build_pipeline,
    build_tokenizers,
    build_vae,
    captioned_scenes,
    encode,
    merge_rules,
    scene_data,
    train_vae,
    vocabulary,
)
from chunk_grpo_nb.shapes.preference import annotate, preference_scores, train_preference
from chunk_grpo_nb.shapes.proxies import (
    build_clip,
    contrastive_loss,
    near_miss,
    save_scorer,
    train_clip,
)
from chunk_grpo_nb.shapes.report import clip_report, round_trip, verifier_agreement
from chunk_grpo_nb.shapes.rewards import load_scorer, shapes_settings, wanted_conditions
from chunk_grpo_nb.shapes.scenes import (
    CLIP_LENGTH,
    KINDS,
    TEXT_LENGTH,
    parse_caption,
    render,
    sample_scene,
    split_of,
    split_prompts,
)
from chunk_grpo_nb.shapes.training import (
    FlowTraining,
    draw,
    pack,
    publish,
    sample_sigmas,
    token_ids,
    train_flow,
)
from chunk_grpo_nb.shapes.verifier import verify_batch

TRAINING = FlowTraining(steps=6, batch=8, warmup_steps=2, decay_steps=3)


def tiny_pipeline():
    """A pipeline of 0.1 M parameters with an untrained autoencoder."""
    return build_pipeline(build_vae(8), width=32, layers=1, single_layers=1, text_width=32)


def weights(pipeline) -> torch.Tensor:
    """All trained weights in a row."""
    return torch.cat(
        [
            p.detach().flatten()
            for name in ("transformer", "text_encoder", "text_encoder_2")
            for p in getattr(pipeline, name).parameters()
        ]
    )


def test_training_scenes_come_from_their_split():
    _, requests, captions = captioned_scenes(60, seed=3, split="test")
    held_out = {r["prompt"] for r in split_prompts("test")}
    assert set(captions) <= held_out and [parse_caption(text) for text in captions] == requests
    assert split_of(requests[0], "", "") in ("train", "validation", "test")


def test_tokenizers_know_every_word_as_one_token():
    clip, t5 = build_tokenizers()
    for record in split_prompts("validation", 5):
        words = record["prompt"].split()
        assert clip.tokenize(record["prompt"]) == [word + "</w>" for word in words]
        assert t5.tokenize(record["prompt"]) == ["▁" + word for word in words]
        assert len(words) + 2 <= CLIP_LENGTH and len(words) + 1 <= TEXT_LENGTH
    assert clip.decode(clip("a zebra").input_ids, skip_special_tokens=True) == "a zebra"


def test_merges_make_words_whole():
    words = ["red", "above", "are", "bed"]
    pieces = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    for a, b in merge_rules(words):
        for word, parts in pieces.items():
            joined = []
            for part in parts:
                joined = (
                    [*joined[:-1], a + b]
                    if joined and (joined[-1], part) == (a, b)
                    else [*joined, part]
                )
            pieces[word] = joined
    assert all(parts == [word + "</w>"] for word, parts in pieces.items())
    assert {"circle", "circles", "left", "four"} <= set(vocabulary())


def test_packing_is_that_of_the_pipeline():
    from diffusers import FluxPipeline

    latents = torch.randn(2, 8, 8, 8)
    assert torch.equal(pack(latents), FluxPipeline._pack_latents(latents, 2, 8, 8, 8))


def test_sigmas_shift_to_noise():
    plain, shifted = (
        sample_sigmas(1000, torch.Generator().manual_seed(0), shift=shift) for shift in (1.0, 3.0)
    )
    assert torch.all((0 < plain) & (plain < shifted) & (shifted < 1))


def test_learning_rate_rises_and_falls():
    rates = [TRAINING.lr_at(step) for step in range(6)]
    assert (
        rates[0] == TRAINING.lr / 2
        and rates[1] == TRAINING.lr == rates[3]
        and rates[5] == pytest.approx(TRAINING.lr / 3)
    )


def test_autoencoder_learns_and_sets_its_scale():
    pictures, _ = scene_data(64)
    vae = build_vae(8)
    curve = train_vae(vae, pictures, steps=30, batch=16)
    assert curve[-1]["error"] < curve[0]["error"] / 2
    assert encode(vae, pictures).std().item() == pytest.approx(1, abs=0.02)
    assert round_trip(vae, pictures[:3]).shape == (3, 32, 32, 3)


def test_resumed_training_equals_uninterrupted_training(tmp_path):
    latents, captions = (
        torch.randn(16, 16, 32, generator=torch.Generator().manual_seed(0)),
        ["a circle", "two red"] * 8,
    )
    whole, parts = tiny_pipeline(), tiny_pipeline()
    curve = train_flow(whole, latents, captions, TRAINING, tmp_path / "whole", unit=3)
    train_flow(
        tiny_pipeline(), latents, captions, TRAINING, tmp_path / "parts", unit=3, stop_after=1e-9
    )
    train_flow(
        tiny_pipeline(),
        latents,
        captions,
        replace(TRAINING, steps=6),
        tmp_path / "parts",
        unit=3,
        stop_after=1e-2,
    )
    train_flow(parts, latents, captions, TRAINING, tmp_path / "parts", unit=3)
    assert torch.equal(weights(whole), weights(parts))
    assert [row["step"] for row in curve] == [3, 6] and (tmp_path / "whole" / "curve.json").exists()


def test_published_pipeline_is_plain_diffusers(tmp_path):
    from diffusers import FluxPipeline

    pipeline = tiny_pipeline()
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "kept").touch()
    publish(pipeline, tmp_path)
    loaded = FluxPipeline.from_pretrained(tmp_path, local_files_only=True)
    assert [np.asarray(im).tolist() for im in draw(loaded, ["a circle"], 2)] == [
        np.asarray(im).tolist() for im in draw(pipeline, ["a circle"], 2)
    ]
    assert (tmp_path / "clip" / "kept").exists() and json.loads(
        (tmp_path / "world.json").read_text()
    )["height"] == 32
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            token_ids(loaded, ["a red circle"]),
            token_ids(pipeline, ["a red circle"]),
            strict=True,
        )
    )


def test_contrastive_loss_leaves_other_true_pairs_out():
    logits = torch.tensor([[5.0, 9.0, 0.0, 0.0], [9.0, 5.0, 0.0, 0.0]])
    both = torch.tensor([[True, True, False, False]] * 2)
    own = torch.tensor([[True, False, False, False], [False, True, False, False]])
    assert contrastive_loss(logits, both) < 0.05 < contrastive_loss(logits, own)


def test_scorers_train_save_and_score(tmp_path):
    model, tokenizer = build_clip(width=32, layers=1, patch=8)
    assert len(train_clip(model, tokenizer, *captioned_scenes(64), steps=3, batch=16)) == 2
    save_scorer(model, tokenizer, tmp_path / "clip")
    report = clip_report(model, tokenizer, per_kind=3, choices=4)
    assert set(report["retrieval among 5"]) == {*KINDS, "overall"}
    pictures, captions = scene_data(32, seed=1)
    groups = pictures.reshape(8, 4, 32, 32, 3)
    choices = annotate(captions[::4], groups, np.arange(32.0).reshape(8, 4))
    train_preference(model, tokenizer, choices, steps=3, batch=4)
    save_scorer(model, tokenizer, tmp_path / "pick")
    pick, clip = (
        make_reward(name, folder=str(tmp_path))(list(pictures), captions, [{}] * 32)
        for name in ("shapes_pick", "shapes_clip")
    )
    assert torch.isfinite(pick).all() and not torch.equal(pick, clip)
    assert preference_scores(model, tokenizer, captions[::4], groups).shape == (8, 4)


def test_a_missing_scorer_is_named(tmp_path):
    with pytest.raises(RewardUnavailable, match="shapes_3_clip"):
        load_scorer("clip", str(tmp_path))


def test_agreement_with_the_verifier():
    pictures, captions = scene_data(30, seed=8)
    records = [{"prompt": text, "kind": parse_caption(text).kind} for text in captions]
    shuffled = [captions[(n + 7 * (n % 2)) % 30] for n in range(30)]
    verdicts = verify_batch(pictures, wanted_conditions(shuffled, [{}] * 30))
    perfect = verifier_agreement(
        [v.dense for v in verdicts], verdicts, [r["kind"] for r in records]
    )
    assert (
        perfect["spearman with dense"] == pytest.approx(1) and perfect["right outscores wrong"] == 1
    )


def test_the_shipped_model_draws_its_captions():
    from diffusers import FluxPipeline

    folder = shapes_path()
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) <= 20e6
    settings = shapes_settings()
    assert settings["height"] == settings["width"] == 32
    assert settings["max_sequence_length"] == TEXT_LENGTH
    pipeline = FluxPipeline.from_pretrained(folder, local_files_only=True)
    records = [r for r in split_prompts("test", 6) if r["kind"] in ("single", "colours")]
    verdicts = verify_batch(
        draw(pipeline, [r["prompt"] for r in records], 17), [r["conditions"] for r in records]
    )
    assert np.mean([v.strict for v in verdicts]) >= 0.7


def test_the_shipped_scorers_prefer_the_right_picture():
    scenes, requests, captions = captioned_scenes(120, 2, split="test")
    rng = np.random.default_rng(2)
    wrong = render([sample_scene(near_miss(request, rng), rng) for request in requests])
    pictures = np.stack([render(scenes), wrong], 1)
    for name, share in (("clip", 0.7), ("pick", 0.6)):
        scores = preference_scores(*load_scorer(name), captions, pictures)
        assert (scores[:, 0] > scores[:, 1]).mean() >= share


@pytest.mark.slow
def test_the_training_notebooks_feed_each_other(tmp_path):
    from chunk_grpo_nb.analysis.notebooks import run_notebook

    root = Path(__file__).parent.parent
    small = yaml.safe_load((root / "ci" / "smoke.yaml").read_text(encoding="utf-8"))
    names = sorted(name for name in small if name.startswith("experiments/shapes_"))
    out = tmp_path / "shapes"
    for name in names:
        run_notebook(
            root / "nbs" / name, tmp_path / Path(name).name, {**small[name], "out_dir": str(out)}
        )
    records = {path.name for path in out.glob("*.json")}
    assert {"vae.json", "flow.json", "clip.json", "pick.json", "report.json"} <= records
