"""A policy without a network: what rollout and evaluation need of one, in milliseconds."""

from types import SimpleNamespace

import torch
from PIL import Image


class StubPolicy:
    """Latents and pictures follow from the seeds alone; remembers what it was asked for."""

    def __init__(self):
        self.batches: list[list[str]] = []

    def sample(self, prompts, sampler, initial, noise, keep_calls=True, hybrid_steps=None):
        self.batches.append([prompt.text for prompt in prompts])
        rows = []
        for first, second in zip(initial, noise, strict=True):
            generator = torch.Generator().manual_seed(first ^ second)
            rows.append(torch.rand(5, 3, 2, 2, generator=generator) + 0.1)
        latents = torch.stack(rows)
        return SimpleNamespace(latents=latents, log_probs=latents[:, :3].mean((2, 3, 4)))

    def decode(self, recording):
        last = (recording.latents[:, -1].permute(0, 2, 3, 1) * 200).byte().numpy()
        return [Image.fromarray(picture) for picture in last]
