"""Ported reward models: layout at real size, arithmetic, and scoring on tiny models."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from chunk_grpo_nb.rewards import clip_family, hpsv3, imagereward, ocr, weights
from chunk_grpo_nb.rewards.registry import RewardUnavailable, make_reward
from chunk_grpo_nb.rewards.scoring import check_pairing, score

PROMPTS = ["a red cube", "two blue spheres", "a dog on a mat"]


def noise_image(seed: int, width: int = 40, height: int = 32) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    )


IMAGES = [noise_image(i, 40 + 6 * i, 32) for i in range(3)]


@pytest.fixture(autouse=True, scope="module")
def offline():
    """No test may ask the hub."""
    import huggingface_hub.constants as constants

    old, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    yield
    constants.HF_HUB_OFFLINE = old


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(i) for i in range(33, 127)]
    words = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[]).save_pretrained(folder)
    layers = dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        hidden_act="gelu",
    )
    text = dict(
        **layers,
        vocab_size=len(words),
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
        pad_token_id=len(words) - 1,
    )
    config = CLIPConfig(
        text_config=text,
        vision_config=dict(**layers, image_size=28, patch_size=14),
        projection_dim=16,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    return folder, config


def random_state(shapes: dict, seed: int = 0, scale: float = 0.2) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.randn(shape, generator=generator) * scale
        + (1.0 if "ln_" in key or "norm" in key.lower() else 0.0)
        for key, shape in shapes.items()
    }


# ---------------------------------------------------------------- layouts at real size


def test_hpsv2_layout_fills_every_parameter():
    from transformers import CLIPModel

    config = clip_family.vit_h_config()
    with torch.device("meta"):
        model = CLIPModel(config)
        ported = clip_family.openclip_to_transformers(
            {k: torch.empty(s) for k, s in clip_family.openclip_shapes(config).items()}
        )
    weights.check_layout(weights.shapes_of(ported), weights.shapes_of(model), "HPSv2.1")
    assert (
        sum(p.numel() for p in model.parameters()) == 986_109_441
    )  # open_clip's model profile for ViT-H-14


def test_imagereward_layout_fills_every_parameter():
    from transformers import BlipTextModel, BlipVisionModel

    vision, text = imagereward.imagereward_configs()
    with torch.device("meta"):
        parts = imagereward.imagereward_to_transformers(
            {k: torch.empty(s) for k, s in imagereward.imagereward_shapes(vision, text).items()}
        )
        modules = (
            BlipVisionModel(vision),
            BlipTextModel(text, add_pooling_layer=False),
            clip_family.score_head(768),
        )
    for part, module in zip(parts, modules):
        weights.check_layout(weights.shapes_of(part), weights.shapes_of(module), "ImageReward")


@pytest.mark.parametrize("new_names", [False, True])
def test_hpsv3_layout_fills_every_parameter(new_names):
    from transformers import Qwen2VLModel

    config = hpsv3.hpsv3_config()
    shapes = hpsv3.hpsv3_shapes(config)
    if new_names:  # as saved by transformers 4.52 and later
        shapes = {
            (
                "model." + k
                if k.startswith("visual")
                else k.replace("model.", "model.language_model.")
            ): s
            for k, s in shapes.items()
        }
    with torch.device("meta"):
        backbone, head = hpsv3.hpsv3_to_transformers({k: torch.empty(s) for k, s in shapes.items()})
        weights.check_layout(
            weights.shapes_of(backbone), weights.shapes_of(Qwen2VLModel(config)), "HPSv3"
        )
    weights.check_layout(
        weights.shapes_of(head), weights.shapes_of(hpsv3.rating_head(3584)), "HPSv3 head"
    )


def test_other_layout_is_refused_by_name(tiny_clip):
    shapes = clip_family.openclip_shapes(tiny_clip[1])
    wrong = {**shapes, "visual.proj": (3, 3), "extra.bias": (1,)}
    del wrong["ln_final.weight"]
    with pytest.raises(
        RewardUnavailable,
        match=r"1 missing: ln_final.weight; 1 unexpected: extra.bias; "
        r"1 of another shape: visual.proj is \(3, 3\)",
    ):
        weights.check_layout(wrong, shapes, "some file")
    with pytest.raises(RewardUnavailable, match="visual.head.gamma"):
        clip_family.openclip_to_transformers({"visual.head.gamma": torch.ones(1)})


# ---------------------------------------------------------------- pixels


def test_clip_pixels_equal_the_transformers_processor():
    from transformers import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    )
    for image in [
        *IMAGES[1:],
        noise_image(9, 31, 77),
        noise_image(8, 20, 20),
    ]:  # where rounding (CLIP) and flooring (transformers) half a pixel agree
        theirs = torch.tensor(np.stack(processor([image])["pixel_values"]))
        assert (clip_family.clip_pixels([image], 28) - theirs).abs().max() < 1e-5


def test_hps_pixels_keep_the_whole_image_and_pad_with_black():
    pixels = clip_family.hps_pixels(
        [
            Image.new("RGB", (448, 224), "white"),
            Image.new("RGB", (224, 224), "white"),
            Image.new("RGB", (10, 700), "white"),
        ],
        224,
    )
    red = pixels[:, 0] * 0.26862954 + 0.48145466
    assert (
        red[0, 56:168].min() > 0.99
        and red[0, :55].abs().max() < 1e-5
        and red[0, 169:].abs().max() < 1e-5
    )
    assert red[1].min() > 0.99
    assert (red[2] > 0.5).any(0).sum() == 3  # 10 x 700 becomes 3 x 224


# ---------------------------------------------------------------- CLIP family


def test_clip_score_and_pickscore_equal_the_model(tiny_clip):
    from transformers import AutoTokenizer, CLIPModel

    folder, config = tiny_clip
    model = CLIPModel.from_pretrained(folder)
    tokens = AutoTokenizer.from_pretrained(folder)(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = (
            model(pixel_values=clip_family.clip_pixels(IMAGES, 28), **tokens)
            .logits_per_image.diagonal()
            .double()
        )
    pick = score(make_reward("pickscore", model=folder, tokenizer=folder), IMAGES, PROMPTS)
    torch.testing.assert_close(pick, logits, rtol=1e-4, atol=1e-5)
    clip = score(
        make_reward("clip_score", model=str(folder), batch_size=2, offload=True), IMAGES, PROMPTS
    )
    torch.testing.assert_close(
        clip, logits * 100 / model.logit_scale.exp().item(), rtol=1e-4, atol=1e-4
    )


def test_long_prompts_are_cut_like_their_authors_do(tiny_clip):
    reward = make_reward("clip_score", model=tiny_clip[0])
    long = "x" * 200
    torch.testing.assert_close(
        score(reward, [IMAGES[0]], [long]), score(reward, [IMAGES[0]], [long + "yyy"])
    )


class OpenClipReference(nn.Module):
    """A CLIP with open_clip's parameter names, from the architecture alone."""

    def __init__(self, state: dict, config):
        super().__init__()
        self.s, self.c = state, config

    def norm(self, x, name):
        return F.layer_norm(x, x.shape[-1:], self.s[f"{name}.weight"], self.s[f"{name}.bias"])

    def tower(self, x, prefix, layers, heads, mask=None):
        for i in range(layers):
            b = f"{prefix}resblocks.{i}."
            attention = nn.MultiheadAttention(x.shape[-1], heads, batch_first=True)
            attention.load_state_dict(
                {
                    k: self.s[f"{b}attn.{k}"]
                    for k in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
                }
            )
            y = self.norm(x, f"{b}ln_1")
            x = x + attention(y, y, y, attn_mask=mask, need_weights=False)[0]
            y = F.linear(
                self.norm(x, f"{b}ln_2"), self.s[f"{b}mlp.c_fc.weight"], self.s[f"{b}mlp.c_fc.bias"]
            )
            x = x + F.linear(
                F.gelu(y), self.s[f"{b}mlp.c_proj.weight"], self.s[f"{b}mlp.c_proj.bias"]
            )
        return x

    def forward(self, pixels, ids):
        s, vision, text = self.s, self.c.vision_config, self.c.text_config
        x = (
            F.conv2d(pixels, s["visual.conv1.weight"], stride=vision.patch_size)
            .flatten(2)
            .transpose(1, 2)
        )
        x = (
            torch.cat([s["visual.class_embedding"].expand(len(x), 1, -1), x], 1)
            + s["visual.positional_embedding"]
        )
        x = self.tower(
            self.norm(x, "visual.ln_pre"),
            "visual.transformer.",
            vision.num_hidden_layers,
            vision.num_attention_heads,
        )
        image = self.norm(x[:, 0], "visual.ln_post") @ s["visual.proj"]
        t = s["token_embedding.weight"][ids] + s["positional_embedding"][: ids.shape[1]]
        mask = torch.full((ids.shape[1], ids.shape[1]), -math.inf).triu(1)
        t = self.norm(
            self.tower(t, "transformer.", text.num_hidden_layers, text.num_attention_heads, mask),
            "ln_final",
        )
        words = t[torch.arange(len(ids)), ids.argmax(-1)] @ s["text_projection"]
        return F.normalize(image, dim=-1), F.normalize(words, dim=-1)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_hpsv2_equals_an_open_clip_reference(tiny_clip, tmp_path, suffix):
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    folder, config = tiny_clip
    state = random_state(clip_family.openclip_shapes(config))
    file = tmp_path / f"weights{suffix}"
    save_file(state, file) if suffix == ".safetensors" else torch.save(
        {"state_dict": state, "epoch": 3}, file
    )
    reward = make_reward("hpsv2", model=file, tokenizer=folder, config=config, batch_size=2)
    ids = AutoTokenizer.from_pretrained(folder)(
        PROMPTS, padding="max_length", max_length=77, return_tensors="pt"
    )["input_ids"]
    with torch.no_grad():
        image, text = OpenClipReference(state, config)(clip_family.hps_pixels(IMAGES, 28), ids)
    torch.testing.assert_close(
        check_pairing(reward, IMAGES, PROMPTS),
        (image * text).sum(-1).double(),
        rtol=1e-4,
        atol=1e-5,
    )


def test_aesthetic_ignores_the_prompt_and_equals_its_head(tiny_clip, tmp_path):
    from transformers import CLIPModel

    folder, _ = tiny_clip
    head = clip_family.score_head(16).eval()
    torch.save(
        {f"layers.{k}": v for k, v in head.state_dict().items()}, tmp_path / "aesthetic-model.pth"
    )
    reward = make_reward("aesthetic", model=tmp_path, clip=folder)
    with torch.no_grad():
        feature = (
            CLIPModel.from_pretrained(folder)
            .get_image_features(clip_family.clip_pixels(IMAGES, 28))
            .pooler_output
        )
        expected = head(F.normalize(feature, dim=-1))[:, 0].double()
    torch.testing.assert_close(score(reward, IMAGES, PROMPTS), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(score(reward, IMAGES, PROMPTS[::-1]), expected, rtol=1e-4, atol=1e-5)


def test_jpeg_rewards_are_opposite_and_ordered():
    flat = Image.new("RGB", (64, 64), "grey")
    small, large = score(
        make_reward("jpeg_incompressibility"), [flat, noise_image(0, 64, 64)], ["", " "]
    ).tolist()
    assert 0 < small < large
    assert score(make_reward("jpeg_compressibility"), [flat], [""]).item() == -small
    assert (
        score(
            make_reward("jpeg_incompressibility", quality=10), [noise_image(0, 64, 64)], [""]
        ).item()
        < large
    )


# ---------------------------------------------------------------- ImageReward


class BlipReference:
    """BLIP's layers from a flat state dict with the published names."""

    def __init__(self, state):
        self.state = state

    def norm(self, x, name, eps):
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)

    def linear(self, x, name):
        return F.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def perceptron(self, x, first, second):
        return self.linear(F.gelu(self.linear(x, first)), second)

    def attend(self, q, k, v, heads, bias=0):
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + bias
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    def vision(self, pixels, config):
        """The ViT: (n, patches + 1, width)."""
        v = "blip.visual_encoder."
        kernel, bias = (self.state[f"{v}patch_embed.proj.{kind}"] for kind in ("weight", "bias"))
        patches = F.conv2d(pixels, kernel, bias, stride=config.patch_size)
        start = self.state[f"{v}cls_token"].expand(len(pixels), -1, -1)
        x = torch.cat([start, patches.flatten(2).transpose(1, 2)], 1)
        x = x + self.state[f"{v}pos_embed"]
        for i in range(config.num_hidden_layers):
            b = f"{v}blocks.{i}."
            parts = self.linear(self.norm(x, f"{b}norm1", 1e-6), f"{b}attn.qkv").chunk(3, -1)
            x = x + self.linear(self.attend(*parts, config.num_attention_heads), f"{b}attn.proj")
            y = self.norm(x, f"{b}norm2", 1e-6)
            x = x + self.perceptron(y, f"{b}mlp.fc1", f"{b}mlp.fc2")
        return self.norm(x, f"{v}norm", 1e-6)

    def attention(self, t, source, name, heads, bias):
        """BERT's attention to `source`, with its residual."""
        inputs = {"query": t, "key": source, "value": source}
        parts = [self.linear(x, f"{name}.self.{part}") for part, x in inputs.items()]
        y = self.linear(self.attend(*parts, heads, bias), f"{name}.output.dense")
        return self.norm(t + y, f"{name}.output.LayerNorm", 1e-12)

    def text(self, ids, mask, image, config):
        """The BERT that attends to the image: (n, tokens, width)."""
        e, heads = "blip.text_encoder.", config.num_attention_heads
        words = self.state[f"{e}embeddings.word_embeddings.weight"][ids]
        places = self.state[f"{e}embeddings.position_embeddings.weight"][: ids.shape[1]]
        t = self.norm(words + places, f"{e}embeddings.LayerNorm", 1e-12)
        bias = (1 - mask[:, None, None].float()) * -1e9
        for i in range(config.num_hidden_layers):
            b = f"{e}encoder.layer.{i}."
            t = self.attention(t, t, f"{b}attention", heads, bias)
            t = self.attention(t, image, f"{b}crossattention", heads, 0)
            y = self.perceptron(t, f"{b}intermediate.dense", f"{b}output.dense")
            t = self.norm(t + y, f"{b}output.LayerNorm", 1e-12)
        return t


def imagereward_reference(state, vision, text, pixels, ids, mask):
    """BLIP's ViT and cross-attending BERT, and the head, written from the published names."""
    blip = BlipReference(state)
    h = blip.text(ids, mask, blip.vision(pixels, vision), text)[:, 0]
    for i in (0, 2, 4, 6, 7):
        h = blip.linear(h, f"mlp.layers.{i}")
    return (h[:, 0] - 0.16717362830052426) / 1.0333394966054072


def test_imagereward_equals_a_blip_reference(tmp_path):
    from transformers import AutoTokenizer, BertTokenizer, BlipTextConfig, BlipVisionConfig

    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *"a red cube two blue spheres dog on mat".split(),
    ]
    BertTokenizer(vocab={w: i for i, w in enumerate(words)}).save_pretrained(tmp_path / "words")
    vision = BlipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=16,
        layer_norm_eps=1e-6,
    )
    text = BlipTextConfig(
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        encoder_hidden_size=32,
        vocab_size=len(words),
        is_decoder=True,
        bos_token_id=2,
        sep_token_id=3,
        eos_token_id=3,
    )
    state = random_state(imagereward.imagereward_shapes(vision, text))
    unused = {
        "blip.vision_proj.weight": torch.zeros(2, 2),
        "blip.text_proj.bias": torch.zeros(2),
        "blip.text_encoder.embeddings.position_ids": torch.arange(512)[None],
    }
    torch.save({**state, **unused}, tmp_path / "ImageReward.pt")
    reward = make_reward(
        "imagereward", model=tmp_path, tokenizer=tmp_path / "words", configs=(vision, text)
    )
    tokens = AutoTokenizer.from_pretrained(tmp_path / "words")(
        PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
    )
    assert tokens["attention_mask"].sum(1).tolist() == [5, 5, 7]
    with torch.no_grad():
        expected = imagereward_reference(
            state,
            vision,
            text,
            clip_family.clip_pixels(IMAGES, 32),
            tokens["input_ids"],
            tokens["attention_mask"],
        )
    torch.testing.assert_close(
        check_pairing(reward, IMAGES, PROMPTS), expected.double(), rtol=1e-3, atol=1e-3
    )


# ---------------------------------------------------------------- HPSv3


QWEN_SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]


def save_word_tokenizer(folder):
    """A tokenizer of a few whole words, and Qwen's special ones; returns word -> id."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    plain = "a red cube two blue spheres dog on mat rate this : system user assistant".split()
    words = {word: i for i, word in enumerate(["<unk>", *QWEN_SPECIAL, *plain])}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=raw,
        unk_token="<unk>",
        pad_token="<|endoftext|>",
        additional_special_tokens=QWEN_SPECIAL,
    ).save_pretrained(folder)
    return words


def tiny_qwen_config(words):
    """Qwen2-VL with two layers."""
    from transformers import Qwen2VLConfig

    text = dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(words) + 1,
        bos_token_id=1,
        eos_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
    )
    return Qwen2VLConfig(
        text_config=text,
        vision_config=dict(depth=1, embed_dim=16, hidden_size=32, num_heads=2),
        image_token_id=words["<|image_pad|>"],
        video_token_id=words["<|video_pad|>"],
        vision_start_token_id=words["<|vision_start|>"],
        vision_end_token_id=words["<|vision_end|>"],
    )


@pytest.fixture(scope="module")
def tiny_hpsv3(tmp_path_factory):
    """A tiny Qwen2-VL in the published layout, a word tokenizer, and a template file."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("hpsv3")
    config = tiny_qwen_config(save_word_tokenizer(folder))
    save_file(random_state(hpsv3.hpsv3_shapes(config)), folder / "HPSv3.safetensors")
    source = (
        'import nothing_here\nINSTRUCTION = """\nrate \n{text_prompt}\n"""\n'
        'prompt_with_special_token = """\nthis : <|Reward|>\n"""\n'
    )
    template = folder / "data_collator_qwen.py"
    template.write_text(source)
    places = {"model": folder, "tokenizer": folder, "template": template}
    return folder, config, {**places, "config": config, "dtype": "float32"}


def test_hpsv3_template_is_read_without_running_it(tiny_hpsv3, tmp_path):
    assert (
        hpsv3.hpsv3_template(tiny_hpsv3[2]["template"])
        == "\nrate \n{text_prompt}\n\nthis : <|Reward|>\n"
    )
    (tmp_path / "own.txt").write_text("no field here")
    with pytest.raises(RewardUnavailable, match="expected one {text_prompt}"):
        hpsv3.hpsv3_template(tmp_path / "own.txt")
    with pytest.raises(RewardUnavailable, match="data_collator_qwen.py"):
        hpsv3.hpsv3_template(tmp_path / "absent.py")


def test_hpsv3_pairs_batches_and_pads(tiny_hpsv3):
    reward = make_reward("hpsv3", batch_size=3, **tiny_hpsv3[2])
    values = check_pairing(reward, IMAGES, PROMPTS)
    assert values.std() > 0
    alone = score(make_reward("hpsv3", batch_size=1, **tiny_hpsv3[2]), IMAGES, PROMPTS)
    torch.testing.assert_close(alone, values, rtol=1e-3, atol=1e-4)
    assert (score(reward, IMAGES, PROMPTS[::-1]) - values).abs().max() > 1e-4  # the prompt matters


def test_hpsv3_reads_the_reward_token_at_plain_positions(tiny_hpsv3):
    """Against the language model called as the published forward calls it."""
    folder, config, options = tiny_hpsv3
    reward = make_reward("hpsv3", **options)
    whole, (image, prompt) = reward.model, (IMAGES[1], PROMPTS[1])
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(folder)
    words.add_tokens(["<|Reward|>"], special_tokens=True)
    text = hpsv3.hpsv3_template(options["template"]).replace("{text_prompt}", prompt)
    inputs = hpsv3.qwen_inputs(
        words, [image.resize(hpsv3.hpsv3_size(*image.size), Image.Resampling.BICUBIC)], [text]
    )
    assert (inputs["input_ids"] == config.image_token_id).sum() == inputs["grid"].prod() // 4
    with torch.no_grad():
        embeds = whole.backbone.get_input_embeddings()(inputs["input_ids"])
        seen = whole.backbone.visual(inputs["pixels"], grid_thw=inputs["grid"]).pooler_output
        embeds[inputs["input_ids"] == config.image_token_id] = seen
        states = whole.backbone.language_model(inputs_embeds=embeds).last_hidden_state
        at = (inputs["input_ids"][0] == whole.reward_id).nonzero().item()
        expected = whole.head(states[0, at])[0].double()
    torch.testing.assert_close(score(reward, [image], [prompt])[0], expected, rtol=1e-4, atol=1e-5)


def test_hpsv3_refuses_a_prompt_with_its_own_token(tiny_hpsv3):
    with pytest.raises(RuntimeError, match=r"hold the reward token once, found \[2\]"):
        score(make_reward("hpsv3", **tiny_hpsv3[2]), [IMAGES[0]], ["a <|Reward|> dog"])


@pytest.mark.parametrize(
    "size", [(1024, 1024), (720, 720), (1360, 768), (64, 64), (100, 900), (448, 450), (2000, 31)]
)
def test_hpsv3_size_equals_smart_resize(size):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    height, width = smart_resize(
        size[1], size[0], factor=28, min_pixels=256 * 28 * 28, max_pixels=256 * 28 * 28
    )
    assert hpsv3.hpsv3_size(*size) == (width, height)


# ---------------------------------------------------------------- OCR


def test_ocr_scores_what_is_read_and_names_prompts_without_text():
    reward = make_reward("ocr", reader=lambda images: ["Open LATE", "opn", ""])
    data = [{}, {"text": "open"}, {"text": "open"}]
    assert score(reward, IMAGES, ['says "open late"', "x", "y"], data).tolist() == [1.0, 0.75, 0.0]
    with pytest.raises(RuntimeError, match="quotes none"):
        score(reward, IMAGES, PROMPTS)


@pytest.mark.parametrize(
    "prompt, wanted",
    [
        ('a 27" monitor saying "HELLO"', "HELLO"),
        ('a 27" monitor and a 32" screen saying "HELLO" and "BYE"', "HELLO BYE"),
        ('a 12"x8" board that says "MENU"', "MENU"),
        ('a 27" monitor', None),
        ('a sign "Level 5"', "Level 5"),
        ('a sign saying"OPEN"', "OPEN"),
        ('a sign " OPEN "', "OPEN"),
        ("a sign “Öffnet „heute“ um 9”", "Öffnet „heute“ um 9"),
        ("ein Schild „Offen“", "Offen"),
        ("une enseigne «Ouvert»", "Ouvert"),
        ('a sign " "', None),
    ],
)
def test_the_text_an_image_should_show(prompt, wanted):
    if wanted is None:
        with pytest.raises(ValueError, match="no text to look for"):
            ocr.wanted_text(prompt, {})
    else:
        assert ocr.wanted_text(prompt, {}).startswith(wanted)


def test_wanted_text_of_the_metadata():
    assert ocr.wanted_text('a sign "A"', {"text": " B "}) == "B"
    assert ocr.wanted_text('a sign "A"', {"text": None}) == "A"
    assert ocr.wanted_text("a clock", {"text": 1200}) == "1200"
    with pytest.raises(ValueError) as error:
        ocr.wanted_text("\x1b[2J" + "p" * 1_000_000, {"text": " "})
    assert len(str(error.value)) < 300 and "\x1b" not in str(error.value)


@pytest.mark.parametrize(
    "a, b, d",
    [("", "", 0), ("", "abc", 3), ("kitten", "sitting", 3), ("abc", "acb", 2), ("flaw", "lawn", 2)],
)
def test_edit_distance(a, b, d):
    assert ocr.edit_distance(a, b) == ocr.edit_distance(b, a) == d


def save_byte_tokenizer(folder):
    """A tokenizer of single bytes and GOT's special tokens; returns token -> id."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<imgpad>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {w: i for i, w in enumerate([*special, *letters])}
    raw = Tokenizer(models.BPE(vocab=words, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=special[1:],
    ).save_pretrained(folder)
    return words


def tiny_got_config(words):
    """GOT-OCR 2.0 with one layer of each kind."""
    from transformers import GotOcr2Config

    vision = dict(
        hidden_size=16,
        output_channels=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=64,
        patch_size=8,
        window_size=4,
        global_attn_indexes=[0],
        mlp_dim=16,
    )
    text = dict(
        model_type="qwen2",
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=len(words),
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    images = {"image_token_index": words["<imgpad>"], "image_seq_length": 4}
    return GotOcr2Config(vision_config=vision, text_config=text, **images)


def test_got_reader_runs_a_small_model(tmp_path):
    """GOT-OCR 2.0 with random weights: one text per image, whatever is beside it."""
    from transformers import GotOcr2ForConditionalGeneration, GotOcr2ImageProcessorPil

    config = tiny_got_config(save_byte_tokenizer(tmp_path))
    GotOcr2ImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(tmp_path)
    torch.manual_seed(0)
    GotOcr2ForConditionalGeneration(config).save_pretrained(tmp_path)
    read = ocr.got_reader(tmp_path, device="cpu", max_new_tokens=5)
    texts = read(IMAGES[:2])
    assert len(texts) == 2
    assert all(isinstance(t, str) and "<im" not in t for t in texts)
    assert read(IMAGES[1:2]) == texts[1:]
    reward = make_reward("ocr", model=tmp_path, device="cpu", max_new_tokens=5)
    assert score(reward, IMAGES[:1], ['says "x"']).shape == (1,)


# ---------------------------------------------------------------- missing weights


@pytest.mark.parametrize(
    "name", ["clip_score", "pickscore", "hpsv2", "aesthetic", "imagereward", "hpsv3", "ocr"]
)
def test_missing_weights_say_what_to_download_and_where_to_put_it(
    name, tmp_path, tiny_hpsv3, tiny_clip
):
    options = {
        "hpsv3": {"template": tiny_hpsv3[2]["template"], "tokenizer": tiny_hpsv3[0]},
        "aesthetic": {"clip": tiny_clip[0]},
    }.get(name, {})
    for model in (str(tmp_path), "nobody/nothing"):
        with pytest.raises(RewardUnavailable) as error:
            make_reward(name, model=model, **options)
        want = weights.WEIGHTS[name]
        for part in (
            f"huggingface.co/{want.hub}",
            f"hf download {want.hub}",
            want.licence,
            f"make_reward('{name}', model=...)",
            want.file or "folder",
        ):
            assert part in str(error.value)


def test_every_licence_is_stated():
    assert all(w.licence and w.gigabytes > 0 and "/" in w.hub for w in weights.WEIGHTS.values())


# ---------------------------------------------------------------- broken files, odd machines

BROKEN_FILES = {
    "cut.safetensors": b"\x10\x00\x00\x00",
    "text.safetensors": b"not weights at all, but an error page",
    "empty.pt": b"",
    "text.pt": b"<html>sign in to download</html>",
}


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_broken_weight_files_are_named(tmp_path, name):
    (tmp_path / name).write_bytes(BROKEN_FILES[name])
    with pytest.raises(RewardUnavailable, match=f"{name}: not a readable weight file"):
        weights.load_state(tmp_path / name)


def test_files_that_hold_no_named_weights(tmp_path):
    for content in ([1, 2], torch.ones(2), {"epoch": 3}, {"state_dict": {"a": "b"}}):
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises(RewardUnavailable, match="expected named weights"):
            weights.load_state(tmp_path / "a.pt")


@pytest.mark.parametrize("error", [ConnectionError, RuntimeError, KeyError, ImportError])
def test_whatever_a_hub_raises_becomes_an_instruction(monkeypatch, error):
    def loader(model, **options):
        raise error("\x1b[31mno route\nto host")

    with pytest.raises(RewardUnavailable, match="hf download openai/clip-vit") as caught:
        weights.from_hub("clip_score", loader, "owner/model")
    assert "\x1b" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("model", ["x" * 300, "x" * 300 + "/y", "a\0b", "~no_such_user/x"])
def test_paths_that_no_file_can_have(monkeypatch, model):
    import huggingface_hub

    def offline(*a, **k):
        raise ConnectionError("offline")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(RewardUnavailable, match="no weights at") as error:
        weights.weight_file("hpsv3", model)
    assert len(str(error.value)) < 900


def test_cards_that_are_not_there_and_empty_batches_are_refused():
    layer = nn.Linear(1, 1)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device cuda:1: this machine has 0 cards"):
            weights.ModelReward("r", layer, None, device="cuda:1")
    for size in (0, -1, 2.5, "4"):
        with pytest.raises(ValueError, match="batch_size .*expected at least 1"):
            weights.ModelReward("r", layer, None, batch_size=size)
