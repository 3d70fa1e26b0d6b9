"""Backends in one process: exact state, no step where there is nothing to step along."""

from types import SimpleNamespace

import pytest
import torch

from chunk_grpo_nb.training.backends import DeepSpeed, FullySharded, make_backend
from chunk_grpo_nb.training.config import make_config
from chunk_grpo_nb.training.state import make_optimizer


def policy_of(model: torch.nn.Module):
    """What a backend asks of a policy."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return SimpleNamespace(transformer=model, trainable_parameters=lambda: trained)


class Model(torch.nn.Module):
    """One layer that is used, one that never gets a gradient, one that is frozen."""

    def __init__(self):
        super().__init__()
        self.used, self.unused, self.frozen = (torch.nn.Linear(3, 1) for _ in range(3))
        self.frozen.requires_grad_(False)


def fresh(seed: int = 0, **settings):
    torch.manual_seed(seed)
    config = make_config(device="cpu", weight_decay=0.1, learning_rate=0.1, **settings)
    policy = policy_of(Model())
    return policy, make_optimizer(config, policy.trainable_parameters())


@pytest.fixture(scope="module")
def backend():
    return make_backend(make_config(device="cpu"), "runs")


def steps(backend, policy, optimizer, count: int = 2):
    for x in torch.randn(count, 3, generator=torch.Generator().manual_seed(5)):
        optimizer.zero_grad()
        backend.backward(policy.transformer.used(x).square().sum())
        backend.step(policy, optimizer, max_norm=1.0, moves=True)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_saved_and_loaded_state_goes_on_alike(backend, tmp_path, optimizer):
    here = fresh(optimizer=optimizer)
    steps(backend, *here)
    state = backend.save(tmp_path, 1, *here)
    assert not any(name.startswith("frozen") for name in state["model"])
    there = fresh(seed=1, optimizer=optimizer)
    torch.save(state, tmp_path / "state.pt")
    backend.load(tmp_path, torch.load(tmp_path / "state.pt"), *there)
    for pair in (here, there):
        steps(backend, *pair)
    pairs = zip(here[0].trainable_parameters(), there[0].trainable_parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_parameter_without_gradient_is_left_alone(backend):
    policy, optimizer = fresh()
    before = policy.transformer.unused.weight.clone()
    steps(backend, policy, optimizer)
    assert torch.equal(policy.transformer.unused.weight, before)
    assert len(optimizer.state) == 2


def test_no_step_where_nothing_moves(backend):
    policy, optimizer = fresh()
    steps(backend, policy, optimizer)
    before = [p.clone() for p in policy.trainable_parameters()]
    optimizer.zero_grad()
    backend.backward(0 * policy.transformer.used(torch.ones(3)).sum())
    assert backend.step(policy, optimizer, max_norm=1.0, moves=False) == 0
    pairs = zip(before, policy.trainable_parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


class Engine:
    """Stands in for DeepSpeed's: steps an optimiser along what it has gathered."""

    def __init__(self, policy, optimizer):
        self.policy, self.optimizer, self.boundary = policy, optimizer, False

    def set_gradient_accumulation_boundary(self, last: bool):
        self.boundary = last

    def backward(self, loss):
        loss.backward()

    def step(self):
        assert self.boundary, "all passes were made"
        self.norm = torch.nn.utils.get_total_norm(
            [p.grad for p in self.policy.trainable_parameters() if p.grad is not None]
        )
        self.optimizer.step()
        self.optimizer.zero_grad()

    def get_global_grad_norm(self):
        return self.norm


def test_the_engine_of_deepspeed_makes_no_step_where_nothing_moves(backend):
    policy, optimizer = fresh()
    config = make_config(device="cpu")
    deep = DeepSpeed(config, backend.accelerator)
    deep.engine = Engine(policy, optimizer)

    def update(scale: float, moves: bool) -> float:
        assert deep.agree_on_passes(2) == 2
        for _ in range(2):
            deep.backward(scale * policy.transformer.used(torch.ones(3)).sum())
        return deep.step(policy, optimizer, max_norm=1.0, moves=moves)

    assert update(1.0, moves=True) > 0
    before = [p.clone() for p in policy.trainable_parameters()]
    assert update(0.0, moves=False) == 0
    pairs = zip(before, policy.trainable_parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs), "momentum and weight decay wait"
    assert update(1.0, moves=True) > 0


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_no_step_along_a_gradient_that_is_not_finite(backend, value):
    policy, optimizer = fresh()
    before = policy.transformer.used.weight.clone()
    backend.backward(value * policy.transformer.used(torch.ones(3)).sum())
    norm = backend.step(policy, optimizer, max_norm=1.0, moves=True)
    assert not norm < float("inf")
    assert torch.equal(policy.transformer.used.weight, before)


def test_weights_that_are_not_finite_are_found(backend):
    policy, _ = fresh()
    assert backend.weights_are_finite(policy)
    policy.transformer.unused.bias.data.fill_(float("inf"))
    assert not backend.weights_are_finite(policy)


def test_another_models_state_is_refused(backend, tmp_path):
    policy, optimizer = fresh()
    state = backend.save(tmp_path, 1, policy, optimizer)
    state["model"] = {"other": torch.zeros(1)}
    with pytest.raises(ValueError, match="holds 1 tensors"):
        backend.load(tmp_path, state, policy, optimizer)
    with pytest.raises(ValueError, match="written with DeepSpeed"):
        backend.load(tmp_path, {"model": "deepspeed_000001"}, policy, optimizer)


@pytest.mark.parametrize(
    "kind, settings, words",
    [
        (FullySharded, {"ema_decay": 0.9}, "ema_decay"),
        (FullySharded, {"kl_weight": 0.1}, "needs a LoRA"),
        (DeepSpeed, {"kl_weight": 0.1, "lora_rank": 2}, "DeepSpeed"),
    ],
)
def test_unsupported_settings_are_refused(backend, kind, settings, words):
    with pytest.raises(ValueError, match=words):
        kind(make_config(settings), backend.accelerator)


def test_images_that_processes_cannot_share_are_refused(backend):
    three = SimpleNamespace(num_processes=3)
    with pytest.raises(ValueError, match="cannot be shared equally by 3 processes"):
        type(backend)(make_config(prompts_per_iteration=2, group_size=4), three)
