"""A negative prompt per row: the stock pipeline's images, replay, training, evaluation."""

import json
import warnings

import pytest
import torch
from tiny import quiet, tiny_policy, tiny_sampler
from tiny_runs import make_folder, mean_of_channel, tiny_config

from chunk_grpo_nb.models.families import FAMILIES
from chunk_grpo_nb.models.pipelines import flow_scheduler, scheduled
from chunk_grpo_nb.prompts import Prompt, PromptError, load_prompts
from chunk_grpo_nb.rewards.registry import register_reward
from chunk_grpo_nb.training.callbacks import Callback
from chunk_grpo_nb.training.trainer import train

quiet()
ROWS = [
    Prompt("a red circle", {"negative_prompt": "blue square"}),
    Prompt("a red circle", {"negative_prompt": "green"}),
    Prompt("a red circle"),
]
SEEDS = {"init_seeds": [1, 1, 1], "noise_seeds": [2, 2, 2]}


def stock(policy, prompt: Prompt, seed: int):
    """What the stock pipeline draws when it is given both texts."""
    sampler = tiny_sampler("sd3.5")
    more = {"negative_prompt": prompt.negative} if prompt.negative else {}
    with scheduled(policy.pipe, flow_scheduler(policy.pipe)):
        return policy.pipe(
            prompt=prompt.text,
            guidance_scale=7.0,
            num_inference_steps=sampler.num_steps,
            height=sampler.height,
            width=sampler.width,
            max_sequence_length=policy.text.limit,
            generator=torch.Generator().manual_seed(seed),
            **more,
        ).images[0]


@pytest.fixture(scope="module")
def sd35():
    return tiny_policy("sd3.5")


def test_images_are_those_of_the_stock_pipeline_with_that_negative_prompt(sd35):
    sampler = tiny_sampler("sd3.5", kind="ode")
    seen = []
    for row, prompt in enumerate(ROWS):
        recording = sd35.sample([prompt], sampler, [row + 1], [0])
        (ours,) = sd35.decode(recording)
        assert ours.tobytes() == stock(sd35, prompt, row + 1).tobytes()
        seen.append(ours.tobytes())
    assert len(set(seen)) == 3


def test_rows_of_one_call_have_their_own(sd35):
    recording = sd35.sample(ROWS, tiny_sampler("sd3.5"), **SEEDS)
    for row, prompt in enumerate(ROWS):
        alone = sd35.sample([prompt], tiny_sampler("sd3.5"), [1], [2])
        torch.testing.assert_close(recording.latents[row], alone.latents[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(recording.final[0], recording.final[1], atol=1e-3)
    assert recording.prompts == ["a red circle"] * 3


def test_replay_gives_the_recorded_velocity_of_each_row(sd35):
    recording = sd35.sample(ROWS, tiny_sampler("sd3.5"), **SEEDS)
    rows, steps = torch.tensor([2, 0, 1]), torch.tensor([0, 3, 1])
    found = sd35.velocity(recording, rows, steps)
    torch.testing.assert_close(found, recording.velocities[rows, steps], rtol=1e-4, atol=1e-5)


def test_a_prompt_without_guidance_is_encoded_as_ever(sd35):
    plain = tiny_sampler("sd3.5", guidance_scale=1.0)
    with pytest.warns(UserWarning, match="'blue square' has no effect without guidance"):
        drawn = sd35.sample(ROWS, plain, **SEEDS)
    same = sd35.sample([p.text for p in ROWS], plain, **SEEDS)
    assert torch.equal(drawn.latents, same.latents)


def test_a_family_without_guidance_refuses():
    with pytest.raises(ValueError, match="no unconditional branch.*'blue square'.*prompt file"):
        tiny_policy("flux").sample(ROWS, tiny_sampler(), **SEEDS)


class TextOnly:
    """Stands in for a pipeline: the embedding of a text is its length."""

    def __call__(self, complex_human_instruction=None):
        """A parameter that Sana's encoder looks up."""

    def encode_prompt(self, prompt, negative_prompt=None, do_classifier_free_guidance=True, **_):
        def embed(texts):
            return torch.tensor([[float(len(text))] for text in texts])

        prompts = [prompt] if isinstance(prompt, str) else prompt
        other = [""] if negative_prompt is None else negative_prompt
        other = [other] if isinstance(other, str) else other
        if self.kind == "pair":
            return embed(prompts), None
        if self.kind == "two":
            return list(embed(prompts)), list(embed(other))
        return embed(prompts), torch.ones(1), embed(other), torch.ones(1)


@pytest.mark.parametrize(
    "pipeline, kind",
    [
        ("Flux2KleinPipeline", "pair"),
        ("QwenImagePipeline", "pair"),
        ("ZImagePipeline", "two"),
        ("SanaPipeline", "four"),
        ("Lumina2Pipeline", "four"),
    ],
)
def test_every_guided_family_encodes_the_negative_text(pipeline, kind):
    pipe = TextOnly()
    pipe.kind = kind
    own = {"QwenImagePipeline": 1.0}.get(pipeline, 0.0)  # a blank, or the empty prompt
    for options, length in (({}, own), ({"negative": "12345"}, 5.0)):
        found = FAMILIES[pipeline].encode(pipe, ["abc"], True, 8, **options)
        assert float(found["prompt_embeds"][0].flatten()[0]) == 3
        assert float(found["negative_prompt_embeds"][0].flatten()[0]) == length


@register_reward("sees_negatives")
def sees_negatives():
    red = mean_of_channel(0)

    def score(images, prompts, metadata):
        SEEN.extend(row.get("negative_prompt") for row in metadata)
        return red(images, prompts, metadata)

    return score


SEEN = []


class Recorded(Callback):
    """Keeps the rollouts."""

    def __init__(self):
        self.rollouts = []

    def on_rollout(self, trainer, rollout):
        self.rollouts.append(rollout)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_training_and_validation_read_the_negative_prompts_of_a_file(tmp_path):
    folder = make_folder(tmp_path, "sd3.5")
    rows = [{"prompt": "red circle", "negative_prompt": "blue square"}, {"prompt": "two circle"}]
    file, plain = write(tmp_path / "n.jsonl", rows), write(tmp_path / "p.jsonl", rows[1:])
    settings = {"model": str(folder / "sd3.5"), "rewards": {"sees_negatives": 1.0}}
    settings |= {"train_prompts": str(file), "validation_prompts": str(file), "iterations": 1}
    settings |= {"validate_every": 1, "guidance_scale": 5.0}
    watch = Recorded()
    SEEN.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(tiny_config(folder, **settings), tmp_path / "run", callbacks=[watch])
    assert SEEN.count("blue square") == SEEN.count(None) > 4  # in the rollout and in validations
    (rollout,) = watch.rollouts
    texts = [prompt.text for prompt in rollout.prompts]
    assert sorted(set(texts)) == ["red circle", "two circle"]
    assert load_prompts(plain)[0].negative is None


@pytest.mark.parametrize("value", [3, ["blue"], {"a": 1}])
def test_a_negative_prompt_that_is_no_text_is_refused(tmp_path, value):
    file = write(tmp_path / "n.jsonl", [{"prompt": "red circle", "negative_prompt": value}])
    with pytest.raises(PromptError, match="n.jsonl, line 1: the negative_prompt is"):
        load_prompts(file)


def test_a_blank_negative_prompt_is_the_pipelines_own(tmp_path):
    (tmp_path / "n.csv").write_text("prompt,negative_prompt\nred circle,blue\ntwo circle,\n")
    assert [p.negative for p in load_prompts(tmp_path / "n.csv")] == ["blue", None]
