"""The policy: recording and replay, precision, reference, text, files, bad input.

Families are tested in test_families.
"""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import (
    PROMPTS,
    SEEDS,
    all_pairs,
    check_lora_loads_in_stock,
    disturb,
    draw,
    quiet,
    same_images,
    stock_images,
    tiny_policy,
    tiny_sampler,
)

import chunk_grpo_nb.models.policy as policy_module
from chunk_grpo_nb.models.adapters import LORA_FILE, LoraSize, read_lora_file
from chunk_grpo_nb.models.pipelines import flow_scheduler
from chunk_grpo_nb.models.policy import Policy, ReplayError, Sampler, check_replay, load_policy
from chunk_grpo_nb.models.sampler import window_steps
from chunk_grpo_nb.models.tiny import tiny_pipeline
from chunk_grpo_nb.objective import kl_to_reference
from chunk_grpo_nb.schedules import sigma_schedule

quiet()


def same_weights(one: Policy, two: Policy) -> bool:
    """Whether two policies have the same trained weights, bit for bit."""
    pairs = zip(one.trainable_parameters(), two.trainable_parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.fixture(scope="module")
def flux() -> Policy:
    return tiny_policy("flux", lora_rank=2)


@pytest.fixture(scope="module")
def recording(flux):
    return draw(flux, tiny_sampler())


# -- what a recording holds --


def test_shapes_dtypes_and_what_is_stored_once(flux, recording):
    assert recording.latents.shape == (3, 6, 16, 4) and recording.latents.dtype == torch.float32
    assert recording.sigmas.shape == (6,) and recording.sigmas[0] == 1 and recording.sigmas[-1] == 0
    assert recording.log_probs.shape == (3, 4) and recording.velocities.shape == (3, 5, 16, 4)
    (call,) = recording.calls
    assert {name: len(values) for name, (values, _) in call.constant.items()} == {
        "guidance": 2,
        "pooled_projections": 2,
        "encoder_hidden_states": 2,
    }
    assert set(call.varying) == {"timestep"} and "hidden_states" not in {
        *call.shared,
        *call.constant,
        *call.varying,
    }


@pytest.mark.parametrize("kind", ["flow", "dance", "cps"])
def test_last_transition_is_an_ode_step_for_every_kind(flux, kind):
    drawn = draw(flux, tiny_sampler(kind=kind))
    x, v, sigma = drawn.latents[:, -2], drawn.velocities[:, -1], drawn.sigmas
    assert torch.equal(drawn.final, x + v * (sigma[-1] - sigma[-2]))
    with pytest.raises(ValueError, match="step 4.*not trained"):
        flux.log_prob(drawn, torch.tensor([0]), torch.tensor([4]))
    report = check_replay(flux, drawn)
    assert report["log_prob_error"] == 0 and report["ratio_error"] == 0


def test_an_image_depends_on_its_own_seeds_only(flux, recording):
    alone = flux.sample(PROMPTS[2:], tiny_sampler(), [3], [6])
    torch.testing.assert_close(alone.latents[0], recording.latents[2], rtol=1e-4, atol=1e-5)
    other = flux.sample(PROMPTS[2:], tiny_sampler(), [3], [7])
    assert torch.equal(other.latents[:, 0], alone.latents[:, 0]) and not torch.allclose(
        other.latents[:, 1], alone.latents[:, 1]
    )


def test_the_same_seeds_give_the_same_bits(flux, recording):
    again = draw(flux, tiny_sampler())
    assert torch.equal(again.latents, recording.latents) and torch.equal(
        again.log_probs, recording.log_probs
    )


def test_sampling_leaves_the_pipeline_as_it_was(flux):
    scheduler, hooks = flux.pipe.scheduler, len(flux.transformer._forward_pre_hooks)
    draw(flux, tiny_sampler())
    assert flux.pipe.scheduler is scheduler and len(flux.transformer._forward_pre_hooks) == hooks
    with pytest.raises(ValueError, match="init_seeds"):
        flux.sample(PROMPTS, tiny_sampler(), [1], [2])
    assert flux.pipe.scheduler is scheduler


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_shift_none_is_the_pipelines_own_and_a_number_is_static(name):
    policy = tiny_policy(name, lora_rank=2)
    own = draw(policy, tiny_sampler(name)).sigmas
    stock_images(policy, name, output_type="latent")
    torch.testing.assert_close(
        draw(policy, tiny_sampler(name, shift=3.0)).sigmas, sigma_schedule(5, 3.0).float()
    )
    scheduler = flow_scheduler(policy.pipe)
    options = (
        {"sigmas": [1, 0.8, 0.6, 0.4, 0.2], "mu": 0.4567}
        if name == "flux"
        else {"num_inference_steps": 5}
    )
    scheduler.set_timesteps(**options)
    assert own.shape == scheduler.sigmas.shape
    if name == "sd3":
        assert torch.equal(own, scheduler.sigmas)
    assert not torch.allclose(own, sigma_schedule(5, 3.0).float())


def test_guidance_scale_reaches_the_pipeline():
    policy = tiny_policy("sd3", lora_rank=2)
    assert draw(policy, tiny_sampler("sd3")).guidance == 7.0
    weak, strong = (draw(policy, tiny_sampler("sd3", guidance_scale=g)) for g in (2.0, 9.0))
    assert weak.guidance == 2.0 and not torch.allclose(weak.final, strong.final)
    assert check_replay(policy, weak)["velocity_error"] == 0


def test_velocities_of_one_group_share_a_prompt_row(flux, recording):
    rows, steps = all_pairs(recording)
    found = flux.velocity(recording, rows, steps)
    torch.testing.assert_close(found, recording.velocities[rows, steps], rtol=1e-4, atol=1e-5)


# -- precision and memory --


def test_gradient_checkpointing_gives_the_same_gradient(recording):
    rows, steps = all_pairs(recording)
    gradients = []
    for checkpointing in (False, True):
        policy = tiny_policy("flux", lora_rank=2, gradient_checkpointing=checkpointing)
        disturb(policy)
        policy.log_prob(recording, rows, steps)[0].mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.trainable_parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_bfloat16_keeps_float32_states_and_log_probs(how):
    pipe = tiny_pipeline("flux")
    policy = (
        load_policy(pipe.to(dtype=torch.bfloat16), lora_rank=2)
        if how == "weights"
        else load_policy(pipe, lora_rank=2, autocast="bfloat16")
    )
    drawn = draw(policy, tiny_sampler())
    assert drawn.latents.dtype == drawn.log_probs.dtype == torch.float32
    assert not torch.equal(drawn.latents[:, 1], drawn.latents[:, 1].bfloat16().float())
    assert {p.dtype for p in policy.trainable_parameters()} == {torch.float32}
    equal, single = check_replay(policy, drawn), check_replay(policy, drawn, batch=1)
    assert equal["log_prob_error"] == 0 and single["log_prob_error"] < 5e-3
    assert policy.decode(drawn)[0].size == (8, 8)


def test_trajectories_off_the_device_and_text_encoders_off(recording):
    with pytest.raises(ValueError, match="store_on='disk'"):
        tiny_policy("flux", lora_rank=2, store_on="disk")
    policy = tiny_policy("flux", lora_rank=2, store_on="cpu", offload_text=True, vae_tiling=True)
    drawn = draw(policy, tiny_sampler())
    assert torch.equal(drawn.latents, recording.latents) and drawn.latents.device.type == "cpu"
    assert policy.decode(drawn)[0].size == (8, 8)


def test_no_dropout_even_if_the_trainer_calls_train(flux, recording):
    rows, steps = all_pairs(recording)
    expected = flux.velocity(recording, rows, steps)
    flux.module.train()
    assert torch.equal(flux.velocity(recording, rows, steps), expected) and not flux.module.training


# -- reference, hybrid, full training --


def test_reference_needs_a_base():
    policy = tiny_policy("flux")
    with pytest.raises(ValueError, match="keep_reference=True"), policy.reference():
        pass


def test_full_training_reference_swaps_weights_in_and_out():
    policy = tiny_policy("flux", keep_reference=True)
    plain = tiny_sampler(kind="ode")
    before, drawn = draw(policy, plain).final, draw(policy, tiny_sampler())
    disturb(policy, scale=0.02)
    after = draw(policy, plain).final
    rows, steps = all_pairs(drawn)
    velocity = policy.velocity(drawn, rows, steps)
    with policy.reference(), policy.reference(), torch.no_grad():  # nested is fine
        assert torch.equal(draw(policy, plain).final, before)
        base = policy.velocity(drawn, rows, steps)
    (velocity - base).square().mean().backward()  # the graph survives the swap
    assert torch.equal(draw(policy, plain).final, after) and not torch.equal(after, before)
    assert all(p.grad is not None for p in policy.trainable_parameters())


def test_hybrid_inference_ends_with_the_base():
    policy = tiny_policy("flux", lora_rank=2)
    disturb(policy, 0.3)
    plain = tiny_sampler(kind="ode")
    trained, hybrid = draw(policy, plain), draw(policy, plain, hybrid_steps=2)
    assert torch.equal(hybrid.latents[:, :3], trained.latents[:, :3]) and not torch.equal(
        hybrid.latents[:, 3], trained.latents[:, 3]
    )
    with policy.reference():
        base = draw(policy, plain)
    assert torch.equal(draw(policy, plain, hybrid_steps=0).latents, base.latents)
    assert torch.equal(draw(policy, plain, hybrid_steps=5).latents, trained.latents)
    assert not torch.equal(draw(policy, plain).latents, base.latents)  # adapters are back on


def test_lora_starts_as_the_base_and_depends_on_its_seed():
    one, two, three = (tiny_policy("flux", lora_rank=2, seed=seed) for seed in (0, 0, 1))
    assert same_weights(one, two) and not same_weights(one, three)
    plain = tiny_sampler(kind="ode")
    with one.reference():
        base = draw(one, plain).final
    assert torch.equal(draw(three, plain).final, base)


# -- files --


def test_lora_round_trip(tmp_path):
    policy = tiny_policy("flux", lora_rank=2, lora_alpha=5)
    disturb(policy)
    policy.save(tmp_path)
    other = tiny_policy("flux", lora_rank=2, lora_alpha=5)
    other.load_weights(tmp_path)
    assert torch.equal(draw(other, tiny_sampler()).latents, draw(policy, tiny_sampler()).latents)
    with pytest.raises(ValueError, match="same lora_rank"):
        tiny_policy("flux", lora_rank=4).load_weights(tmp_path)
    with pytest.raises(FileNotFoundError, match="pytorch_lora_weights"):
        other.load_weights(tmp_path / "nothing")


def test_full_weights_load_in_plain_diffusers(tmp_path):
    policy = tiny_policy("flux")
    disturb(policy, 0.02)
    policy.save(tmp_path)
    images = policy.decode(draw(policy, tiny_sampler(kind="ode")))
    stock = tiny_pipeline("flux")
    stock.register_modules(
        transformer=type(stock.transformer).from_pretrained(tmp_path, subfolder="transformer")
    )
    assert same_images(stock_images(policy, "flux", stock), images)
    fresh = tiny_policy("flux")
    fresh.load_weights(tmp_path)
    assert same_weights(fresh, policy)


def test_lora_in_stock_flux_is_in_the_family_checks():
    assert check_lora_loads_in_stock.__doc__


def test_folder_with_world_json(tmp_path):
    tiny_pipeline("flux").save_pretrained(tmp_path)
    (tmp_path / "world.json").write_text(
        json.dumps({"height": 16, "width": 8, "max_sequence_length": 12})
    )
    policy = load_policy(str(tmp_path), lora_rank=2)
    drawn = policy.sample(PROMPTS, Sampler(num_steps=3), **SEEDS)
    assert policy.decode(drawn)[0].size == (8, 16) and (
        drawn.sampler.height,
        drawn.sampler.width,
    ) == (16, 8)
    assert policy.decode(drawn.final)[0].size == (8, 16)
    assert drawn.calls[0].constant["encoder_hidden_states"][0].shape[1] == 12
    assert check_replay(policy, drawn)["velocity_error"] == 0


# -- text --


def test_prompts_are_encoded_once(flux, monkeypatch):
    policy, calls = tiny_policy("flux", lora_rank=2), []
    encode = policy.pipe.encode_prompt
    monkeypatch.setattr(
        policy.pipe,
        "encode_prompt",
        lambda **options: (calls.append(options.get("prompt")), encode(**options))[1],
    )
    draw(policy, tiny_sampler())
    draw(policy, tiny_sampler())
    assert [c for c in calls if c is not None] == [[PROMPTS[0]], [PROMPTS[2]]]


def test_truncated_prompts_are_listed(flux):
    long = "a red circle and " * 10
    assert flux.truncated_prompts(["a red circle", long, "two blue square", long]) == [long]


def test_pipelines_without_encoders_ask_for_embeddings():
    policy = tiny_policy("flux2", prompts=["known"], lora_rank=2)
    with pytest.raises(ValueError, match="set_embeddings"):
        policy.sample(["unknown"], tiny_sampler("flux2"), [1], [2])
    assert policy.truncated_prompts(["known"]) == []


# -- bad input --


def test_missing_and_broken_models_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_policy("./nowhere")
    with pytest.raises(FileNotFoundError, match="model_index.json"):
        load_policy(str(tmp_path))
    (tmp_path / "model_index.json").write_text(
        '{"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}'
    )
    with pytest.raises(ValueError, match="broken or incomplete"):
        load_policy(str(tmp_path))
    with pytest.raises(ValueError, match="float99"):
        load_policy(tiny_pipeline("flux"), autocast="float99")


def test_inverted_schedules_are_refused():
    pipe = tiny_pipeline("flux")
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, invert_sigmas=True)
    with pytest.raises(ValueError, match="invert_sigmas"):
        load_policy(pipe)


def test_ode_recordings_have_no_log_probs(flux):
    drawn = draw(flux, tiny_sampler(kind="ode"))
    with pytest.raises(ValueError, match="ODE rollout"):
        flux.log_prob(drawn, torch.tensor([0]), torch.tensor([0]))
    assert check_replay(flux, drawn)["ratio_error"] == 0
    with pytest.raises(ValueError, match="keep_calls=True"):
        flux.velocity(
            draw(flux, tiny_sampler(), keep_calls=False), torch.tensor([0]), torch.tensor([0])
        )


# -- the check of a run catches what it should --


def test_check_replay_sees_moved_weights(recording):
    policy = tiny_policy("flux", lora_rank=2)
    disturb(policy, 0.3)
    with pytest.raises(ReplayError, match="does not reproduce"):
        check_replay(policy, recording)


def test_check_replay_sees_a_wrong_family():
    import dataclasses

    from chunk_grpo_nb.models.families import cond_first

    policy = tiny_policy("sd3", lora_rank=2)
    drawn = draw(policy, tiny_sampler("sd3"))
    policy.family = dataclasses.replace(policy.family, combine=cond_first)
    with pytest.raises(ReplayError, match="velocity_error"):
        check_replay(policy, drawn)


def test_check_replay_sees_missing_gradients(recording):
    policy = tiny_policy("flux", lora_rank=2)
    for p in policy.trainable_parameters():
        p.requires_grad_(False)
    with pytest.raises(ReplayError, match="no gradient"):
        check_replay(policy, recording)


def test_undeclared_tensor_arguments_are_refused(monkeypatch):
    import dataclasses

    from chunk_grpo_nb.models import families

    less = dataclasses.replace(families.FLUX, shared_args=("txt_ids",))
    monkeypatch.setitem(families.FAMILIES, "FluxPipeline", less)
    with pytest.raises(ReplayError, match="'img_ids'.*declare it"):
        draw(tiny_policy("flux", lora_rank=2), tiny_sampler())


def test_guidance_that_stops_along_the_way_is_refused(monkeypatch):
    import dataclasses

    from chunk_grpo_nb.models import families

    cut = dataclasses.replace(families.LUMINA2, call_options={"cfg_trunc_ratio": 0.5})
    monkeypatch.setitem(families.FAMILIES, "Lumina2Pipeline", cut)
    with pytest.raises(ReplayError, match="truncation"):
        draw(tiny_policy("lumina2", lora_rank=2), tiny_sampler("lumina2"))


# -- schedules that miss their ends by rounding --


@pytest.mark.parametrize("shift", [1.18, 1.32])
@pytest.mark.parametrize("name", ["flux", "sd3", "sana", "lumina2", "z-image"])
@pytest.mark.parametrize("own", [False, True])
def test_a_first_level_that_is_almost_one_acts_as_one(name, shift, own):
    pipe = tiny_pipeline(name)
    if own:  # the pipeline's own schedule has the shift
        settings = {"shift": shift, "flow_shift": shift, "use_dynamic_shifting": False}
        known = {key: value for key, value in settings.items() if key in pipe.scheduler.config}
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **known)
    policy = tiny_policy(name, pipe=pipe, lora_rank=2)
    options = {} if own else {"shift": shift}
    drawn = draw(policy, tiny_sampler(name, **options))
    first = policy.sampled(drawn, torch.arange(3), torch.zeros(3).long())
    torch.testing.assert_close(first.std.flatten(), torch.full((3,), 0.7))
    assert drawn.latents.abs().max() < 100
    assert check_replay(policy, drawn)["ratio_error"] == 0
    if own:
        plain = draw(policy, tiny_sampler(name, kind="ode"))
        assert torch.equal(plain.final, stock_images(policy, name, output_type="latent"))


# -- a window of noise --


def test_a_window_of_steps_has_noise_and_the_rest_is_the_ode(flux):
    window = tiny_sampler(sde_steps=window_steps(5, 1, 2))
    assert window.stochastic == (False, True, True, False)
    drawn, plain, full = (
        draw(flux, window),
        draw(flux, tiny_sampler(kind="ode")),
        draw(flux, tiny_sampler()),
    )
    assert torch.equal(drawn.latents[:, :2], plain.latents[:, :2])  # ODE steps of the pipeline
    for step in (0, 3, 4):
        x, v = drawn.latents[:, step], drawn.velocities[:, step]
        stride = drawn.sigmas[step + 1] - drawn.sigmas[step]
        assert torch.equal(drawn.latents[:, step + 1], x + v * stride)
    assert drawn.log_probs.isnan().tolist() == [[True, False, False, True]] * 3
    report = check_replay(flux, drawn)
    assert report["log_prob_error"] == 0 and report["gradient_norm"] > 0

    def noise(recording, step):
        rows = torch.arange(3)
        transition = flux.sampled(recording, rows, torch.full_like(rows, step))
        return (recording.latents[:, step + 1] - transition.mean) / transition.std

    torch.testing.assert_close(noise(drawn, 1), noise(full, 1), rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="step 3 was taken without noise"):
        flux.log_prob(drawn, torch.tensor([0]), torch.tensor([3]))


def test_a_window_of_all_steps_is_the_plain_rollout(flux, recording):
    every = draw(flux, tiny_sampler(sde_steps=(True,) * 4))
    assert torch.equal(every.latents, recording.latents)
    none = draw(flux, tiny_sampler(sde_steps=(False,) * 4))
    assert torch.equal(none.latents, draw(flux, tiny_sampler(kind="ode")).latents)
    assert none.log_probs.shape == (3, 0)


@pytest.mark.parametrize("start, size", [(-1, 2), (0, 0), (3, 2), (0, 5)])
def test_windows_that_do_not_fit_are_refused(start, size):
    with pytest.raises(ValueError, match="does not fit the 4 trained steps"):
        window_steps(5, start, size)


# -- what the old policy was --


def test_the_sampled_transition_is_that_of_the_rollout(flux, recording):
    rows, steps = all_pairs(recording)
    old = flux.sampled(recording, rows, steps)
    following = recording.latents[rows, steps + 1]
    torch.testing.assert_close(old.log_prob(following), recording.log_probs[rows, steps])
    found = flux.log_prob(recording, rows, steps)
    torch.testing.assert_close(found.mean, old.mean, rtol=1e-4, atol=1e-5)
    assert kl_to_reference(found.mean, old.mean, old.std).abs().max() < 1e-6


# -- weights that are not finite --


@pytest.mark.parametrize("keep_calls", [True, False])
def test_nan_weights_are_refused_by_sample_with_step_and_sample(keep_calls):
    policy = tiny_policy("flux", lora_rank=2)
    policy.trainable_parameters()[0].data[0] = float("nan")
    for kind in ("flow", "ode"):
        with pytest.raises(FloatingPointError, match="sample 0 .*red circle.*step 0 are not"):
            draw(policy, tiny_sampler(kind=kind), keep_calls=keep_calls)


def test_nan_that_comes_later_is_named_by_its_step(flux, monkeypatch):
    policy, calls = tiny_policy("flux", lora_rank=2), []

    def spoil(module, args, output):
        calls.append(1)
        if len(calls) == 3:
            output[0][1] = float("inf")
        return output

    handle = policy.transformer.register_forward_hook(spoil)
    with pytest.raises(FloatingPointError, match="sample 1 .*step 2 are not finite"):
        draw(policy, tiny_sampler())
    handle.remove()


def test_decode_refuses_what_is_not_finite(flux, recording):
    bad = recording.final.clone()
    bad[1, 0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="sample 1"):
        flux.decode(bad, height=8, width=8)
    policy = tiny_policy("flux", lora_rank=2)
    next(policy.pipe.vae.decoder.parameters()).data[:] = float("inf")
    with pytest.raises(FloatingPointError, match="sample 0 .*pixels"):
        policy.decode(recording)


def test_decode_counts_samples_over_its_batches(recording, monkeypatch):
    policy, sizes = tiny_policy("flux", lora_rank=2), []
    decode = policy_module.decode_latents

    def spoiled(pipe, latents, *args):
        pixels = decode(pipe, latents, *args)
        sizes.append(len(pixels))
        if len(sizes) == 2:
            pixels[0] = float("nan")
        return pixels

    monkeypatch.setattr(policy_module, "decode_latents", spoiled)
    with pytest.raises(FloatingPointError, match="sample 2 .*two blue.*pixels"):
        policy.decode(recording, batch=2)
    assert sizes == [2, 1]


def test_nan_velocities_do_not_pass_the_check_of_a_run(recording):
    policy = tiny_policy("flux", lora_rank=2)
    policy.trainable_parameters()[0].data[0] = float("nan")
    with pytest.raises(ReplayError, match="velocity_error is nan"):
        check_replay(policy, recording)


# -- a limit on the batch --


def test_a_batch_limit_is_kept(flux, monkeypatch):
    sizes, call = [], policy_module.record

    def counting(pipe, text, *args, **options):
        sizes.append(len(text.prompts))
        return call(pipe, text, *args, **options)

    monkeypatch.setattr(policy_module, "record", counting)
    parts = draw(flux, tiny_sampler(), keep_calls=False, batch=2)
    assert sizes == [2, 1] and parts.prompts == PROMPTS
    whole = draw(flux, tiny_sampler(), keep_calls=False)
    torch.testing.assert_close(parts.latents, whole.latents, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(parts.log_probs, whole.log_probs, rtol=1e-4, atol=1e-5)
    assert len(flux.decode(parts, batch=2)) == 3
    with pytest.raises(ValueError, match="batch=2 for 3 images"):
        draw(flux, tiny_sampler(), batch=2)
    with pytest.raises(ValueError, match="batch=0"):
        draw(flux, tiny_sampler(), keep_calls=False, batch=0)


# -- LoRA strength and files --


def test_lora_strength_is_twice_the_rank_everywhere(tmp_path):
    policy = tiny_policy("flux", lora_rank=3)
    assert policy.transformer.peft_config["default"].lora_alpha == 6
    policy.save(tmp_path)
    assert read_lora_file(tmp_path / LORA_FILE).size == LoraSize(3, 6)
    tiny_policy("flux", lora_rank=3, lora_alpha=6).load_weights(tmp_path)


@pytest.mark.parametrize("alpha", [0, -1, float("nan"), float("inf")])
def test_a_lora_without_strength_is_refused(alpha):
    with pytest.raises(ValueError, match="lora_alpha="):
        tiny_policy("flux", lora_rank=2, lora_alpha=alpha)


@pytest.mark.parametrize("rank", [-1, 1.5, True])
def test_odd_ranks_are_refused(rank):
    with pytest.raises(ValueError, match="lora_rank="):
        tiny_policy("flux", lora_rank=rank)


def test_a_file_of_another_strength_or_rank_is_refused_naming_both(tmp_path):
    tiny_policy("flux", lora_rank=2, lora_alpha=5).save(tmp_path)
    both = "has lora_rank=2, lora_alpha=5, this policy has lora_rank=2, lora_alpha=3"
    with pytest.raises(ValueError, match=both):
        tiny_policy("flux", lora_rank=2, lora_alpha=3).load_weights(tmp_path)
    with pytest.raises(ValueError, match="lora_rank=2, lora_alpha=5.*lora_rank=4, lora_alpha=8"):
        tiny_policy("flux", lora_rank=4).load_weights(tmp_path)


def test_a_file_without_metadata_counts_as_diffusers_counts_it(tmp_path):
    policy = tiny_policy("flux", lora_rank=2, lora_alpha=2)
    disturb(policy)
    policy.save(tmp_path)
    weights = load_file(tmp_path / LORA_FILE)
    save_file(weights, tmp_path / LORA_FILE)  # no metadata: alpha = rank
    tiny_policy("flux", lora_rank=2, lora_alpha=2).load_weights(tmp_path)
    with pytest.raises(ValueError, match="lora_alpha=2, this policy has lora_rank=2, lora_alpha=4"):
        tiny_policy("flux", lora_rank=2).load_weights(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"transformer.use_rslora": True}, "use_rslora = True: such a LoRA is scaled otherwise"),
        ({"transformer.alpha_pattern": {"x": 9}}, "alpha_pattern"),
        ({"transformer.rank_pattern": {"x": 9}}, "rank_pattern"),
        ({"transformer.use_dora": True}, "use_dora"),
        ({"transformer.lora_alpha": 2.5}, "has lora_rank=2, lora_alpha=2.5, this policy"),
        ({"transformer.lora_alpha": "four"}, "lora_adapter_metadata"),
        ({"transformer.lora_alpha": -4}, "lora_alpha=-4: must be a number above 0"),
        ({"transformer.lora_alpha": None, "transformer.r": 2.5}, "lora_rank=2.5"),
        ("{", "lora_adapter_metadata"),
        ("3", "lora_adapter_metadata"),
        ("[" * 100_000, "lora_adapter_metadata"),
    ],
)
def test_notes_of_a_lora_that_mean_another_strength_are_refused(tmp_path, change, message):
    path = tiny_policy("flux", lora_rank=2).save(tmp_path) / LORA_FILE
    weights = load_file(path)
    with safe_open(path, "pt") as file:
        notes = file.metadata()
    if isinstance(change, dict):
        change = json.dumps(json.loads(notes["lora_adapter_metadata"]) | change)
    save_file(weights, path, {**notes, "lora_adapter_metadata": change})
    with pytest.raises(ValueError, match=message) as refusal:
        tiny_policy("flux", lora_rank=2).load_weights(tmp_path)
    assert str(path) in str(refusal.value)


def test_a_lora_is_the_same_bytes_in_every_process(tmp_path):
    """The names of its layers are a set in peft, which comes in another order every time."""
    policy = tiny_policy("flux", lora_rank=2)
    config = policy.transformer.peft_config["default"]
    files = []
    for number, reverse in enumerate((False, True)):
        config.target_modules = sorted(config.target_modules, reverse=reverse)
        folder = policy.save(tmp_path / str(number))
        files.append((folder / LORA_FILE).read_bytes())
    assert files[0] == files[1]


@pytest.mark.parametrize("prefix", ["diffusion_model.", "base_model.model.", "lora_unet_", "unet."])
def test_keys_of_another_trainer_are_named_by_their_prefix(tmp_path, prefix):
    policy = tiny_policy("flux", lora_rank=2)
    policy.save(tmp_path)
    weights = load_file(tmp_path / LORA_FILE)
    renamed = {prefix + name.removeprefix("transformer."): v for name, v in weights.items()}
    save_file(renamed, tmp_path / LORA_FILE)
    with pytest.raises(ValueError, match=f"prefix '{prefix}', expected 'transformer.'"):
        policy.load_weights(tmp_path)


def test_a_broken_lora_file_is_named(tmp_path):
    (tmp_path / LORA_FILE).write_bytes(b"not safetensors at all")
    with pytest.raises(ValueError, match="cannot be read"):
        tiny_policy("flux", lora_rank=2).load_weights(tmp_path)


def test_reference_leaves_a_second_frozen_adapter_frozen():
    from peft import LoraConfig

    policy = tiny_policy("flux", lora_rank=2)
    policy.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), adapter_name="style")
    policy.transformer.set_adapters(["default", "style"])
    for name, p in policy.transformer.named_parameters():
        p.requires_grad_(".default." in name)
    before = [p.requires_grad for p in policy.transformer.parameters()]
    with policy.reference():
        pass
    assert [p.requires_grad for p in policy.transformer.parameters()] == before
    assert not any(
        p.requires_grad for name, p in policy.transformer.named_parameters() if ".style." in name
    )


# -- limits and bad input --


def test_a_call_with_more_prompts_than_the_cache_keeps(monkeypatch):
    policy = tiny_policy("flux", lora_rank=2)
    policy.text.size = 1
    drawn = draw(policy, tiny_sampler())
    assert drawn.prompts == PROMPTS and len(policy.text.known) == 1
    assert check_replay(policy, drawn)["velocity_error"] == 0


@pytest.mark.parametrize(
    "options, name",
    [
        ({"num_steps": 1}, "num_steps=1"),
        ({"num_steps": 1e18}, "num_steps="),
        ({"num_steps": 2.5}, "num_steps=2.5"),
        ({"kind": "vp"}, "kind='vp'"),
        ({"noise_level": -0.1}, "noise_level=-0.1"),
        ({"noise_level": float("nan")}, "noise_level=nan"),
        ({"kind": "cps", "noise_level": 2.0}, "noise_level=2.0"),
        ({"shift": 0.0}, "shift=0.0"),
        ({"guidance_scale": float("inf")}, "guidance_scale=inf"),
        ({"height": -16}, "height=-16"),
        ({"width": 0}, "width=0"),
        ({"sde_steps": (True,)}, "sde_steps has 1"),
    ],
)
def test_settings_that_no_rollout_has_are_refused_at_once(options, name):
    with pytest.raises(ValueError, match=name):
        Sampler(**options)


def test_devices_and_paths_that_are_not_there_are_named(tmp_path):
    with pytest.raises(ValueError, match="device='warp'"):
        load_policy(tiny_pipeline("flux"), device="warp")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_policy("x" * 300)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_policy("~/no/such/folder")
    tiny_pipeline("flux").save_pretrained(tmp_path)
    (tmp_path / "world.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="world.json is not JSON"):
        load_policy(str(tmp_path))
    with pytest.raises(ValueError, match="one prompt per image"):
        tiny_policy("flux").sample("a red circle", tiny_sampler(), [1], [2])
