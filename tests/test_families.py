"""Every family of pipelines passes the same checks on a tiny random pipeline.

What cannot be replayed is refused with the reason.
"""

import pytest
import torch
from tiny import CHECKS, FAMILIES, draw, quiet, tiny_policy, tiny_sampler

from chunk_grpo_nb.models.families import FAMILIES as DECLARED
from chunk_grpo_nb.models.families import Family, family_of, register_family
from chunk_grpo_nb.models.guidance import plain

quiet()


@pytest.mark.parametrize(
    "check", CHECKS.values(), ids=[c.__name__.removeprefix("check_") for c in CHECKS.values()]
)
@pytest.mark.parametrize("name", FAMILIES)
def test_family(name, check):
    check(name)


@pytest.mark.parametrize("name", ["sd3", "flux2-klein", "qwen-image", "z-image", "sana", "lumina2"])
def test_guidance_off_is_one_branch(name):
    policy = tiny_policy(name, lora_rank=2)
    recording = draw(policy, tiny_sampler(name, guidance_scale=0.0))
    assert [call.branches for call in recording.calls] == [1]
    rows = torch.arange(3)
    assert torch.equal(policy.velocity(recording, rows, rows), recording.velocities[rows, rows])


def test_every_declared_pipeline_has_a_tiny_one():
    built = {type(tiny_policy(name).pipe).__name__ for name in FAMILIES}
    assert built == set(DECLARED)


def test_unknown_pipelines_are_refused_with_the_reason():
    class UnetPipeline:
        unet = None

    with pytest.raises(
        ValueError,
        match="UnetPipeline cannot be recorded and replayed: it has no `transformer`.*FluxPipeline",
    ):
        family_of(UnetPipeline())
    with pytest.raises(ValueError, match="not declared.*register_family"):
        family_of("HunyuanImagePipeline")


def test_a_new_family_is_one_declaration(monkeypatch):
    monkeypatch.setattr("chunk_grpo_nb.models.families.FAMILIES", dict(DECLARED))
    mine = register_family(Family("mine", ("MyPipeline",), row_args=("timestep",)))
    assert family_of("MyPipeline") is mine and "MyPipeline" not in DECLARED


def test_branches_that_nobody_declared_are_refused_in_words():
    two = [torch.zeros(1, 2), torch.ones(1, 2)]
    with pytest.raises(ValueError, match="2 branches of guidance, but its family declares none"):
        plain(two, 4.0)
