"""Benchmark folders as official scorers read them, and our GenEval scorer on small detectors."""

import json
import re
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn

from chunk_grpo_nb.prompts import Prompt, load_prompts
from chunk_grpo_nb.rewards import benchmarks, geneval
from chunk_grpo_nb.rewards.geneval import ColourClassifier, GenEvalScorer, objects_from_queries
from chunk_grpo_nb.rewards.geneval_rules import (
    GENEVAL_CLASSES,
    GENEVAL_COLOURS,
    Found,
    check_objects,
    relations,
)
from chunk_grpo_nb.rewards.registry import RewardUnavailable, make_reward
from chunk_grpo_nb.rewards.scoring import score

METADATA = [
    {
        "tag": "single_object",
        "include": [{"class": "dog", "count": 1}],
        "prompt": "a photo of a dog",
    },
    {
        "tag": "counting",
        "include": [{"class": "cat", "count": 2}],
        "exclude": [{"class": "cat", "count": 3}],
        "prompt": "a photo of two cats",
    },
    {
        "tag": "position",
        "include": [
            {"class": "dog", "count": 1},
            {"class": "cat", "count": 1, "position": ["left of", 0]},
        ],
        "prompt": "a photo of a cat left of a dog",
    },
]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(m) + "\n" for m in METADATA))
    return load_prompts(path)


def painter(texts, seeds):
    """Colour from the seed, so that an image tells which seed made it."""
    return [
        Image.new("RGB", (16, 16), tuple(np.random.default_rng(s).integers(0, 256, 3).tolist()))
        for s in seeds
    ]


# ---------------------------------------------------------------- folders


def test_geneval_folder_is_what_the_official_scorer_reads(tmp_path, prompts):
    assert (
        benchmarks.generate_geneval(
            prompts, painter, tmp_path / "out", images_per_prompt=4, batch_size=3
        )
        == 12
    )
    for index, expected in enumerate(METADATA):  # the reading of evaluate_images.py
        place = tmp_path / "out" / f"{index:0>5}"
        assert (
            place.name.isdigit() and json.loads((place / "metadata.jsonl").read_text()) == expected
        )
        names = sorted(p.name for p in (place / "samples").iterdir())
        assert len(names) == 4 and all(re.match(r"\d+\.png", name) for name in names)
    colours = {Image.open(p).getpixel((0, 0)) for p in (tmp_path / "out").rglob("*.png")}
    assert len(colours) == 12  # another seed for each image


def test_a_killed_generation_goes_on_with_the_same_images(tmp_path, prompts):
    calls = []

    def dies(texts, seeds):
        calls.append(len(texts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return painter(texts, seeds)

    with pytest.raises(KeyboardInterrupt):
        benchmarks.generate_geneval(prompts, dies, tmp_path / "a", batch_size=4)
    (tmp_path / "a" / "00002" / "samples").mkdir(parents=True, exist_ok=True)
    (tmp_path / "a" / "00002" / "samples" / ".00000.png.partial").write_bytes(b"half")
    progress = []
    assert (
        benchmarks.generate_geneval(
            prompts,
            painter,
            tmp_path / "a",
            batch_size=4,
            on_progress=lambda *p: progress.append(p),
        )
        == 4
    )
    assert progress == [(4, 4)]
    benchmarks.generate_geneval(prompts, painter, tmp_path / "b", batch_size=1)
    for path in (tmp_path / "b").rglob("*.png"):
        assert (tmp_path / "a" / path.relative_to(tmp_path / "b")).read_bytes() == path.read_bytes()


def test_dpg_grid_is_cut_back_into_its_images(tmp_path):
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "partiprompts3.txt").write_text("a long description")
    (tmp_path / "prompts" / "12.txt").write_text("another")
    loaded = load_prompts(tmp_path / "prompts")
    assert benchmarks.generate_dpg(loaded, painter, tmp_path / "out") == 2
    assert benchmarks.generate_dpg(loaded, painter, tmp_path / "out") == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["12.png", "partiprompts3.png"]
    index = [p.metadata["name"] for p in loaded].index("partiprompts3")
    grid = Image.open(tmp_path / "out" / "partiprompts3.png")
    for k, (x, y) in enumerate(
        [(0, 0), (16, 0), (0, 16), (16, 16)]
    ):  # the crops of compute_dpg_bench.py at --resolution 16
        (expected,) = painter([""], [benchmarks.image_seed(0, index, k)])
        assert grid.crop((x, y, x + 16, y + 16)).tobytes() == expected.tobytes()


def test_wise_files_are_named_by_prompt_id(tmp_path):
    items = [
        {
            "prompt_id": 1 + k,
            "Prompt": f"riddle {k}",
            "Explanation": "x",
            "Category": "c",
            "Subcategory": "s",
        }
        for k in range(3)
    ]
    (tmp_path / "cultural_common_sense.json").write_text(json.dumps(items))
    assert (
        benchmarks.generate_wise(
            load_prompts(tmp_path / "cultural_common_sense.json"), painter, tmp_path / "out"
        )
        == 3
    )
    assert all((tmp_path / "out" / f"{item['prompt_id']}.png").exists() for item in items)


@pytest.mark.parametrize("run, prompt, message", [
    (benchmarks.generate_geneval, Prompt("a dog"), "no GenEval metadata"),
    (benchmarks.generate_dpg, Prompt("a dog"), "item name ''"),
    (benchmarks.generate_dpg, Prompt("a dog", {"name": "a.b"}), "without dots"),
    (benchmarks.generate_wise, Prompt("a dog"), "no prompt_id"),
])  # fmt: skip
def test_prompts_of_another_benchmark_are_refused(tmp_path, run, prompt, message):
    with pytest.raises(ValueError, match=message):
        run([prompt], painter, tmp_path)


def test_generators_that_cannot_be_right_are_refused(tmp_path, prompts):
    with pytest.raises(ValueError, match="returned 1 images for 4"):
        benchmarks.generate_geneval(
            prompts, lambda texts, seeds: painter(texts, seeds)[:1], tmp_path / "geneval"
        )
    with pytest.raises(ValueError, match="cuts squares"):
        benchmarks.generate_dpg(
            [Prompt("a", {"name": "1"})],
            lambda texts, seeds: [Image.new("RGB", (8, 4))] * 4,
            tmp_path / "dpg",
        )
    twice = [Prompt("a", {"prompt_id": 1}), Prompt("b", {"prompt_id": 1})]
    with pytest.raises(ValueError, match="occurs twice"):
        benchmarks.generate_wise(twice, painter, tmp_path / "wise")


def test_seeds_differ_and_stay():
    seeds = {benchmarks.image_seed(s, i, k) for s in range(3) for i in range(50) for k in range(4)}
    assert len(seeds) == 600 and all(0 <= s < 2**32 for s in seeds)
    assert benchmarks.image_seed(0, 7, 2) == benchmarks.image_seed(0, 7, 2)


def test_policy_generator_passes_texts_and_seeds():
    asked = []

    class Policy:
        def sample(self, texts, sampler, init_seeds, noise_seeds, keep_calls):
            asked.append((texts, sampler, init_seeds, noise_seeds, keep_calls))
            return texts

        def decode(self, recording):
            return [Image.new("RGB", (2, 2))] * len(recording)

    assert len(benchmarks.policy_generator(Policy(), "sampler")(["a", "b"], [1, 2])) == 2
    assert asked == [(["a", "b"], "sampler", [1, 2], [1, 2], False)]


# ---------------------------------------------------------------- rules


def box(x, y, size=10, score=0.9):
    return Found((x, y, x + size, y + size), score)


@pytest.mark.parametrize("a, b, expected", [
    (box(0, 0), box(50, 0), {"left of"}),
    (box(50, 0), box(0, 0), {"right of"}),
    (box(0, 0), box(0, 50), {"above"}),
    (box(0, 50), box(0, 0), {"below"}),
    (box(0, 0), box(50, 50), {"left of", "above"}),
    (box(0, 0), box(50, 10), {"left of"}),
    (box(0, 0), box(1, 0), set()),
    (box(0, 0), box(0, 0), set()),
])  # fmt: skip
def test_relations(a, b, expected):
    assert relations(a.box, b.box) == expected


def no_colours(found, name):
    pytest.fail("colours were not asked for")


CASES = [
    ({"include": [{"class": "dog", "count": 1}]}, {"dog": [box(0, 0)]}, True),
    ({"include": [{"class": "dog", "count": 1}]}, {"cat": [box(0, 0)]}, False),
    ({"include": [{"class": "dog", "count": 1}]}, {"dog": [box(0, 0), box(9, 9)]}, True),
    (
        {"include": [{"class": "dog", "count": 2}], "exclude": [{"class": "dog", "count": 3}]},
        {"dog": [box(0, 0), box(9, 9)]},
        True,
    ),
    (
        {"include": [{"class": "dog", "count": 2}], "exclude": [{"class": "dog", "count": 3}]},
        {"dog": [box(0, 0)] * 3},
        False,
    ),
    (METADATA[2], {"dog": [box(50, 0)], "cat": [box(0, 0)]}, True),
    (METADATA[2], {"dog": [box(0, 0)], "cat": [box(50, 0)]}, False),
    (METADATA[2], {"cat": [box(0, 0)]}, False),
    (
        METADATA[2],
        {"dog": [box(50, 0), box(-50, 0)], "cat": [box(0, 0)]},
        True,
    ),  # only the most confident dog counts
]


@pytest.mark.parametrize("metadata, objects, correct", CASES)
def test_rules_of_counting_and_position(metadata, objects, correct):
    verdict = check_objects(objects, metadata, no_colours)
    assert verdict.correct is correct and bool(verdict.reasons) is not correct


def test_rules_of_colour():
    clause = {"include": [{"class": "dog", "count": 2, "color": "red"}]}
    dogs = {"dog": [box(0, 0), box(20, 0), box(40, 0)]}
    asked = []

    def colours(found, name):
        asked.append((len(found), name))
        return ["red", "red"]

    assert check_objects(dogs, clause, colours).correct and asked == [
        (2, "dog")
    ]  # the two most confident
    assert check_objects(dogs, clause, lambda *a: ["red", "blue"]).reasons == (
        "expected red dog>=2, found red, blue",
    )
    both = {
        "include": [
            {"class": "dog", "count": 1, "color": "red"},
            {"class": "cat", "count": 1, "position": ["above", 0]},
        ]
    }
    assert (
        check_objects({"dog": [box(0, 0)], "cat": [box(0, 0)]}, both, lambda *a: ["blue"]).reasons[
            1
        ]
        == "no target for cat to be above"
    )


# ---------------------------------------------------------------- from queries to objects


def test_objects_equal_a_dense_reference():
    """Every (query, class) pair of the top 100, on masks at full size, as mmdet states it."""
    torch.manual_seed(0)
    logits, masks, classes = torch.randn(7, 81) * 3, torch.randn(7, 6, 8) * 4, 80
    padded, shown, size = (24, 32), (20, 30), (40, 60)
    up = F.interpolate(
        F.interpolate(masks[None], padded, mode="bilinear", align_corners=False)[..., :20, :30],
        size,
        mode="bilinear",
        align_corners=False,
    )[0]
    expected = []
    top = logits.softmax(-1)[:, :-1].flatten().topk(100).indices
    for place in top.tolist():
        q, k = divmod(place, classes)
        inside = (up[q] > 0).float()
        s = logits.softmax(-1)[q, k] * (up[q].sigmoid() * inside).sum() / (inside.sum() + 1e-6)
        if s > 0.05:
            ys, xs = torch.where(inside > 0)
            expected.append(
                (
                    GENEVAL_CLASSES[k],
                    round(s.item(), 5),
                    (xs.min().item(), ys.min().item(), xs.max().item() + 1, ys.max().item() + 1),
                )
            )
    found = objects_from_queries(logits, masks, padded, shown, size, threshold=0.05)
    got = [
        (name, round(f.score, 5), tuple(map(int, f.box)))
        for name, group in found.items()
        for f in group
    ]
    assert sorted(got) == sorted(expected) and len(got) > 5


def test_at_most_sixteen_objects_a_class_most_confident_first():
    logits = torch.full((30, 81), -9.0)
    logits[:, 16] = torch.linspace(3, 9, 30)
    found = objects_from_queries(logits, torch.full((30, 4, 4), 9.0), (8, 8), (8, 8), (8, 8), 0.3)[
        "dog"
    ]
    scores = [f.score for f in found]
    assert len(scores) == 16 and scores == sorted(scores, reverse=True)


def test_classes_are_cocos_under_genevals_names():
    assert len(GENEVAL_CLASSES) == len(set(GENEVAL_CLASSES)) == 80
    assert [
        GENEVAL_CLASSES.index(n)
        for n in ("person", "dog", "computer mouse", "tv remote", "computer keyboard", "toothbrush")
    ] == [0, 16, 64, 65, 66, 79]


# ---------------------------------------------------------------- small detectors


class PaintDetector(nn.Module):
    """A detector that really looks: a patch of a class's paint is an object, per half."""

    paints = {"dog": (1.0, 0.0, 0.0), "cat": (0.0, 0.0, 1.0)}

    def __init__(self):
        super().__init__()
        self.config, self.dtype = types.SimpleNamespace(num_labels=80), torch.float32

    def forward(self, pixel_values):
        pixels = (pixel_values * geneval._IMAGENET_STD + geneval._IMAGENET_MEAN)[:, :, ::4, ::4]
        classes, masks = [], []
        for name, paint in self.paints.items():
            near = (pixels[0] - torch.tensor(paint).view(3, 1, 1)).abs().amax(0) < 0.3
            for half in (slice(0, near.shape[1] // 2), slice(near.shape[1] // 2, None)):
                mask = torch.zeros_like(near)
                mask[:, half] = near[:, half]
                logits = torch.full((81,), -9.0)
                logits[GENEVAL_CLASSES.index(name) if mask.any() else 80] = 9.0
                classes.append(logits)
                masks.append(torch.where(mask, 9.0, -9.0))
        return types.SimpleNamespace(
            class_queries_logits=torch.stack(classes)[None],
            masks_queries_logits=torch.stack(masks)[None],
        )


class NamedColours:
    """Stands in for CLIP where colours do not matter."""

    clip = nn.Identity()

    def __call__(self, image, found, name):
        return ["red" if name == "dog" else "blue"] * len(found)


def scene(*patches, size=(90, 60)):
    image = Image.new("RGB", size, "white")
    for colour, x, y in patches:
        ImageDraw.Draw(image).rectangle((x, y, x + 16, y + 16), fill=colour)
    return image


IMAGES = [
    scene(("red", 10, 20)),
    scene(("blue", 8, 20), ("blue", 60, 20)),
    scene(("blue", 8, 20), ("red", 60, 20)),
]


def test_verdicts_from_pixels_as_a_reward():
    scorer = GenEvalScorer(PaintDetector(), NamedColours(), device="cpu", short=96)
    texts = [m["prompt"] for m in METADATA]
    assert score(scorer, IMAGES, texts, METADATA).tolist() == [1, 1, 1]
    assert score(scorer, IMAGES[1:] + IMAGES[:1], texts, METADATA).tolist() == [0, 0, 0]
    (dog,) = scorer.objects(IMAGES[0], 0.3)["dog"]
    assert np.abs(np.array(dog.box) - (10, 20, 27, 37)).max() <= 2 and dog.mask.shape == (60, 90)
    with pytest.raises(RuntimeError, match="no GenEval metadata"):
        score(scorer, IMAGES[:1], ["a dog"])


def test_folder_to_summary(tmp_path, prompts):
    benchmarks.generate_geneval(
        prompts,
        lambda texts, seeds: [IMAGES[[m["prompt"] for m in METADATA].index(t)] for t in texts],
        tmp_path,
        images_per_prompt=2,
    )
    Image.new("RGB", (90, 60)).save(tmp_path / "00001" / "samples" / "00001.png")
    table = geneval.score_folder(
        tmp_path, GenEvalScorer(PaintDetector(), NamedColours(), device="cpu", short=96)
    )
    assert list(table) == [
        "filename",
        "tag",
        "prompt",
        "correct",
        "reason",
        "metadata",
        "details",
    ]  # columns of results.jsonl
    assert table.correct.tolist() == [True, True, True, False, True, True]
    assert geneval.geneval_summary(table) == {
        "single_object": 1.0,
        "counting": 0.5,
        "position": 1.0,
        "overall": pytest.approx(2.5 / 3),
    }
    with pytest.raises(ValueError, match="no images in numbered folders"):
        geneval.score_folder(
            tmp_path / "00000", GenEvalScorer(PaintDetector(), NamedColours(), device="cpu")
        )


def test_other_detectors_and_missing_weights_are_refused(tmp_path, monkeypatch):
    detector = PaintDetector()
    detector.config = types.SimpleNamespace(num_labels=150)
    with pytest.raises(ValueError, match="knows 150 classes"):
        GenEvalScorer(detector, NamedColours())
    with pytest.raises(
        RewardUnavailable, match="hf download facebook/mask2former-swin-small-coco-instance"
    ):
        make_reward("geneval", model=tmp_path)


@pytest.fixture(scope="module")
def tiny_models(tmp_path_factory):
    """A Mask2Former and a CLIP with random weights, saved as the published ones are."""
    from transformers import (
        CLIPConfig,
        CLIPModel,
        CLIPTokenizer,
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        SwinConfig,
    )

    folder = tmp_path_factory.mktemp("geneval")
    torch.manual_seed(0)
    stages = [f"stage{i}" for i in range(1, 5)]
    swin = SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1] * 4,
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=stages,
    )
    sizes = dict(
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        num_attention_heads=2,
        dim_feedforward=32,
        encoder_feedforward_dim=32,
    )
    config = Mask2FormerConfig(
        backbone_config=swin,
        **sizes,
        encoder_layers=1,
        decoder_layers=2,
        num_queries=10,
        num_labels=80,
    )
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder / "detector")
    letters = [chr(i) for i in range(33, 127)]
    words = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[]).save_pretrained(
        folder / "clip"
    )
    layers = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    text = dict(
        **layers,
        vocab_size=len(words),
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
        pad_token_id=len(words) - 1,
    )
    CLIPModel(
        CLIPConfig(
            text_config=text,
            vision_config=dict(**layers, image_size=28, patch_size=14),
            projection_dim=16,
        )
    ).save_pretrained(folder / "clip")
    return folder


def test_the_transformers_models_run_end_to_end(tiny_models):
    scorer = make_reward(
        "geneval",
        model=tiny_models / "detector",
        clip=tiny_models / "clip",
        device="cpu",
        short=64,
        offload=True,
    )
    assert score(scorer, IMAGES, [m["prompt"] for m in METADATA], METADATA).tolist() == [0, 0, 0]
    found = scorer.objects(
        IMAGES[0], threshold=0.0
    )  # random weights: something is found once nothing is asked of it
    assert found and all(
        f.mask.shape == (60, 90) and 0 < f.score < 1 for group in found.values() for f in group
    )
    data = {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}]}
    scorer.objects = lambda image, threshold: {
        "dog": [Found((10, 20, 27, 37), 0.9, np.ones((60, 90), bool))]
    }
    verdict, _ = scorer.verdict(IMAGES[0], data)
    (colour,) = scorer.colours(IMAGES[0], scorer.objects(None, 0)["dog"], "dog")
    assert verdict.correct == (colour == "red") and colour in GENEVAL_COLOURS


def test_colour_weights_average_unit_features(tiny_models):
    from transformers import AutoTokenizer, CLIPModel

    clip, words = (
        CLIPModel.from_pretrained(tiny_models / "clip").eval(),
        AutoTokenizer.from_pretrained(tiny_models / "clip"),
    )
    classifier = ColourClassifier(clip, words)
    with torch.no_grad():
        tokens = words(
            [
                "a photo of a green cup",
                "a photo of a green-colored cup",
                "a photo of a green object",
            ],
            padding=True,
            return_tensors="pt",
        )
        mean = F.normalize(clip.get_text_features(**tokens).pooler_output, dim=-1).mean(0)
    torch.testing.assert_close(
        classifier.weights("cup")[GENEVAL_COLOURS.index("green")],
        mean / mean.norm(),
        rtol=1e-4,
        atol=1e-5,
    )


def test_cut_outs_show_the_object_on_grey():
    mask = np.zeros((60, 90), bool)
    mask[20:37, 10:20] = True
    cut = geneval.cut_out(IMAGES[0], Found((10.0, 20.0, 27.0, 37.0), 0.9, mask))
    assert (
        cut.size == (17, 17)
        and cut.getpixel((2, 5)) == (255, 0, 0)
        and cut.getpixel((14, 5)) == (0x99, 0x99, 0x99)
    )


# ---------------------------------------------------------------- metadata that travelled


@pytest.mark.parametrize("metadata", METADATA)
def test_metadata_that_went_through_other_formats_mean_the_same(metadata):
    def filled(clause):
        clause = {"color": None, "position": None, **clause, "count": float(clause["count"])}
        if clause["position"]:
            clause["position"] = np.array([str(part) for part in clause["position"]])
        return clause

    arrow = {key: metadata.get(key) for key in ("tag", "include", "exclude", "prompt")}
    for key in ("include", "exclude"):
        arrow[key] = arrow[key] and np.array([filled(c) for c in arrow[key]], dtype=object)
    text = {**arrow, "include": json.dumps(metadata["include"])}
    text["exclude"] = metadata.get("exclude") and json.dumps(metadata["exclude"])
    for travelled in (arrow, text, metadata):
        assert geneval.geneval_metadata(travelled) == metadata


def test_travelled_metadata_are_scored_and_written_as_the_official_file_has_them(tmp_path):
    scorer = GenEvalScorer(PaintDetector(), NamedColours(), device="cpu", short=96)
    nulls = [{**m, "exclude": m.get("exclude")} for m in METADATA]
    for data in nulls:
        data["include"] = [{"color": None, "position": None, **c} for c in data["include"]]
    texts = [m["prompt"] for m in METADATA]
    assert score(scorer, IMAGES, texts, nulls).tolist() == [1, 1, 1]
    prompts = [Prompt(d["prompt"], {k: v for k, v in d.items() if k != "prompt"}) for d in nulls]
    benchmarks.generate_geneval(prompts, painter, tmp_path)
    for index, official in enumerate(METADATA):
        path = tmp_path / f"{index:05d}" / "metadata.jsonl"
        assert json.loads(path.read_text()) == official


@pytest.mark.parametrize(
    "metadata, message",
    [
        ({}, "has no GenEval metadata"),
        ({"tag": None, "include": None}, "has no GenEval metadata"),
        ({"tag": "counting", "include": "[{"}, "cannot be read .JSONDecodeError"),
        ({"tag": "counting", "include": [{"class": "dog"}]}, "cannot be read .KeyError"),
        ({"tag": "counting", "include": 3}, "cannot be read .TypeError"),
        ({"tag": "counting", "include": ["dog"]}, "cannot be read .AttributeError"),
    ],
)
def test_metadata_that_are_not_genevals(metadata, message):
    with pytest.raises(ValueError, match=message):
        geneval.geneval_metadata(metadata, "a dog")


# ---------------------------------------------------------------- one door


def test_a_folder_belongs_to_one_model(tmp_path, prompts):
    benchmarks.generate_geneval(prompts, painter, tmp_path / "a", made_by={"model": "one"})
    made = benchmarks.generate_geneval(prompts, painter, tmp_path / "a", made_by={"model": "one"})
    assert made == 0
    before = (tmp_path / "a" / "00000" / "metadata.jsonl").read_bytes()
    for change in (
        dict(made_by={"model": "two"}),
        dict(made_by={"model": "one"}, seed=1),
        dict(made_by={"model": "one"}, prompts=prompts[:2]),
        dict(),
    ):
        arguments = {"prompts": prompts, "generate": painter, "folder": tmp_path / "a", **change}
        with pytest.raises(ValueError, match="holds images of something else"):
            benchmarks.generate_geneval(**arguments)
    assert (tmp_path / "a" / "00000" / "metadata.jsonl").read_bytes() == before
    (tmp_path / "foreign").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "foreign" / "1.png")
    wise = [Prompt("a", {"prompt_id": 1})]
    with pytest.raises(ValueError, match="holds images of something else"):
        benchmarks.generate_wise(wise, painter, tmp_path / "foreign")


def test_run_benchmark_generates_scores_and_says_how_to_score_officially(tmp_path, prompts):
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(m) + "\n" for m in METADATA))
    scorer = GenEvalScorer(PaintDetector(), NamedColours(), device="cpu", short=96)
    by_text = {m["prompt"]: image for m, image in zip(METADATA, IMAGES)}

    def paint_well(texts, seeds):
        return [by_text[text] for text in texts]

    result = benchmarks.run_benchmark(
        "geneval", path, paint_well, tmp_path / "out", {"model": "m"}, scorer
    )
    assert result.generated == 12 and result.scores["overall"] == 1.0
    assert json.loads((tmp_path / "out" / "scores.json").read_text()) == result.scores
    rows = [json.loads(x) for x in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert len(rows) == 12 and {"filename", "tag", "correct", "details"} <= set(rows[0])
    assert str(tmp_path / "out") in result.official_command


@pytest.mark.parametrize(
    "benchmark, prompts, message",
    [
        ("dalle", [], "known are geneval, dpg, wise"),
        (None, [], "known are geneval, dpg, wise"),
        ("wise", [Prompt("a", {"prompt_id": "x"})], "no prompt_id that is a number"),
        ("dpg", [Prompt("a", {"name": "1"}), Prompt("b", {"name": "1"})], "only once"),
    ],
)
def test_benchmarks_that_are_none(tmp_path, benchmark, prompts, message):
    with pytest.raises(ValueError, match=message):
        benchmarks.run_benchmark(benchmark, prompts, painter, tmp_path)


def test_dpg_and_wise_through_the_door(tmp_path):
    dpg = benchmarks.run_benchmark("dpg", [Prompt("a", {"name": "1"})], painter, tmp_path / "d")
    assert dpg.generated == 1 and "--resolution 16" in dpg.official_command
    wise = [Prompt("a", {"prompt_id": 7})]
    assert benchmarks.run_benchmark("wise", wise, painter, tmp_path / "w").scores is None
    assert (tmp_path / "w" / "7.png").exists()
    with pytest.raises(ValueError, match="only geneval takes a scorer"):
        benchmarks.run_benchmark("wise", wise, painter, tmp_path / "w", scorer=object())
