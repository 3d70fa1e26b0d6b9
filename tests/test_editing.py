"""Models that edit a picture: what goes in, what is kept, what is counted, and what is refused."""

import pytest
import torch
from tiny import PICTURES, PROMPTS, SEEDS, asked, draw, picture, quiet, tiny_policy, tiny_sampler

from chunk_grpo_nb.models.calls import APPENDED
from chunk_grpo_nb.models.pipelines import flow_scheduler, scheduled, source_area
from chunk_grpo_nb.models.policy import load_policy
from chunk_grpo_nb.models.tiny import tiny_pipeline
from chunk_grpo_nb.prompts import Prompt

quiet()
EDITING = ["flux-kontext", "qwen-image-edit", "qwen-image-edit-plus"]
ONE_SEED = {"init_seeds": [1], "noise_seeds": [4]}


def edit(text: str, image) -> Prompt:
    return Prompt(text, {"image": image})


@pytest.mark.parametrize("name", EDITING)
def test_a_picture_and_a_text_give_what_the_stock_pipeline_draws_of_them(name):
    policy, sampler = tiny_policy(name), tiny_sampler(name, kind="ode")
    size = policy.family.sources.size
    with source_area(policy.pipe, policy.world.get("source_area")):
        height, width = size(policy.pipe, sampler.height, sampler.width)
        image = picture(size=(width, height))
        own = {"max_area": 64, "_auto_resize": False, "max_sequence_length": 24}
        if name != "flux-kontext":
            own = {"negative_prompt": " ", "true_cfg_scale": 4.0}
        with scheduled(policy.pipe, flow_scheduler(policy.pipe)):
            generator = torch.Generator().manual_seed(1)
            sizes = {"height": 8, "width": 8, "num_inference_steps": 5}
            stock = policy.pipe(
                image=image, prompt="make it red", generator=generator, **sizes, **own
            ).images[0]
    recording = policy.sample([edit("make it red", image)], sampler, **ONE_SEED)
    (ours,) = policy.decode(recording)
    assert ours.tobytes() == stock.tobytes()


@pytest.mark.parametrize("name", EDITING)
def test_another_picture_is_another_image(name):
    policy, sampler = tiny_policy(name), tiny_sampler(name)
    one, two, again = (
        policy.sample([edit("make it red", image)], sampler, **ONE_SEED)
        for image in (PICTURES[0], PICTURES[1], PICTURES[0].copy())
    )
    assert torch.equal(one.latents, again.latents)
    assert not torch.equal(one.final, two.final)
    keys = list(policy.text.known)
    assert len(keys) == 2 and [text for text, _ in keys] == ["make it red"] * 2
    first, second = (known["prompt_embeds"] for known in policy.text.known.values())
    assert torch.equal(first, second) == (not policy.family.sources.read)


@pytest.mark.parametrize("name", EDITING[:2])
def test_a_source_is_kept_once_and_belongs_to_its_rows(name):
    policy, sampler = tiny_policy(name, lora_rank=2), tiny_sampler(name)
    prompts = [edit("make it red", PICTURES[number]) for number in (0, 1, 0)]
    recording = policy.sample(prompts, sampler, **SEEDS)
    for call in recording.calls:
        kept, which = call.constant[APPENDED]
        assert len(kept) == 2 and which.tolist() == [0, 1, 0]
    for row in range(3):  # an image is the same alone
        seeds = {key: [values[row]] for key, values in SEEDS.items()}
        alone = policy.sample([prompts[row]], sampler, **seeds)
        torch.testing.assert_close(alone.final[0], recording.final[row], atol=1e-5, rtol=1e-4)
    rows, steps = torch.tensor([2, 1, 0, 1]), torch.tensor([3, 0, 1, 2])
    with torch.no_grad():
        found = policy.velocity(recording, rows, steps)
    torch.testing.assert_close(found, recording.velocities[rows, steps], atol=1e-5, rtol=1e-4)
    kept.copy_(kept.flip(0))  # as if the pictures had been mixed up
    with torch.no_grad():
        mixed = policy.velocity(recording, rows, steps)
    assert (mixed - found).abs().max() > 1e-3


@pytest.mark.parametrize("name", EDITING[:2])
def test_the_tokens_of_the_source_are_not_counted(name):
    policy = tiny_policy(name)
    recording = draw(policy, tiny_sampler(name))
    kept, _ = recording.calls[0].constant[APPENDED]
    tokens = recording.latents.shape[2]
    assert tokens == (16 if name == "flux-kontext" else 4) < kept.shape[1] + 1
    assert recording.velocities.shape[2] == tokens
    rows = torch.arange(3)
    found = policy.log_prob(recording, rows, torch.ones_like(rows))
    following = recording.latents[:, 2]
    normal = torch.distributions.Normal(found.mean, found.std.expand_as(found.mean))
    by_hand = normal.log_prob(following).flatten(1).mean(1)
    torch.testing.assert_close(found.log_prob, by_hand, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(recording.log_probs[:, 1], by_hand, atol=1e-4, rtol=1e-4)


def test_an_editing_model_wants_a_picture_and_a_size_it_knows():
    policy, sampler = tiny_policy("flux-kontext"), tiny_sampler("flux-kontext")
    with pytest.raises(ValueError, match="FluxKontextPipeline edits pictures, and 'a red circle'"):
        policy.sample(PROMPTS, sampler, **SEEDS)
    policy.world["source_area"] = 1024
    with pytest.raises(ValueError, match="does not scale pictures.*leave it out of world.json"):
        draw(policy, sampler)


def test_pictures_of_rows_are_no_business_of_a_text_to_image_model():
    policy, sampler = tiny_policy("flux"), tiny_sampler("flux")
    rows = [edit(text, "no/such/picture.png") for text in PROMPTS]
    recording = policy.sample(rows, sampler, **SEEDS)
    assert recording.prompts == PROMPTS
    assert torch.equal(recording.latents, draw(policy, sampler).latents)


def test_a_pipeline_that_draws_one_image_a_call_is_called_once_an_image():
    policy = tiny_policy("qwen-image-edit-plus")
    sampler = tiny_sampler("qwen-image-edit-plus")
    prompts = [edit(text, image) for text, image in zip(PROMPTS, PICTURES, strict=True)]
    with pytest.raises(ValueError, match="batch=1 for 3 images.*rollout_batch"):
        policy.sample(prompts, sampler, **SEEDS)
    recording = policy.sample(prompts, sampler, **SEEDS, keep_calls=False)
    assert len(policy.decode(recording)) == 3
    (first, *_), seeds = asked(policy)
    assert torch.equal(policy.sample([first], sampler, **seeds).final[0], recording.final[0])


def test_a_fresh_editing_policy_decodes_without_a_picture():
    for name in EDITING[:2]:
        recording = draw(tiny_policy(name), tiny_sampler(name))
        policy = load_policy(tiny_pipeline(name))
        (one, *_) = policy.decode(recording)
        assert one.size == (8, 8)


def test_sources_have_the_size_that_their_pipeline_was_trained_with():
    pipe, size = tiny_pipeline("flux-kontext"), tiny_policy("flux-kontext").family.sources.size
    assert size(pipe, 515, 262) == (514, 262)  # as the image: a whole number of tokens
    assert size(pipe, None, None) == (128, 128)
    pipe, size = (
        tiny_pipeline("qwen-image-edit"),
        tiny_policy("qwen-image-edit").family.sources.size,
    )
    assert size(pipe, 512, 512) == size(pipe, None, None) == (1024, 1024)  # a megapixel
    assert size(pipe, 512, 1024) == (736, 1440)
    with source_area(pipe, 512 * 512):
        assert size(pipe, 512, 512) == (512, 512)
    assert size(pipe, 512, 512) == (1024, 1024)
