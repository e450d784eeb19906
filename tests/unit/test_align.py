"""iREPA: the constants and shapes of the paper, gradients that reach the early blocks and the projector, and a hook that leaves."""

import numpy as np
import pytest
import torch
from small_k2 import SMALL, small_model

from k2model import optim
from k2model.align import Irepa, Projector, Tap, grid_of, loss, resampled, spatially_normalised, target


def inputs(seed=0, batch=2, rows=3, columns=5):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, SMALL.channels, 2 * rows, 2 * columns, generator=generator)
    text = torch.randn(batch, 4, SMALL.text_taps, SMALL.text_dim, generator=generator)
    mask = torch.tensor([[True, True, False, False], [True, True, True, True]])[:batch]
    return latents, torch.tensor([0.3, 0.8])[:batch], text, mask


def test_teacher_tokens_are_normalised_over_space_with_a_scalar_share_of_the_mean():
    tokens = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)) * 3 + 7
    found = spatially_normalised(tokens, 0.6)
    flat = tokens.numpy().astype(np.float64).reshape(2, 12, 5)
    wanted = (flat - 0.6 * flat.mean(1, keepdims=True)) / (flat.std(1, ddof=1, keepdims=True) + 1e-6)
    assert np.allclose(found.numpy().reshape(2, 12, 5), wanted, atol=1e-5)
    assert np.allclose(found.std((1, 2)).numpy(), 1, atol=1e-5), "every channel of every image has the same spread over space"
    flat_picture = spatially_normalised(torch.full((1, 2, 2, 3), 4.0), 1.0)
    assert torch.equal(flat_picture, torch.zeros_like(flat_picture)), "a flat picture has no place to tell, and no infinite value"


def test_the_projector_sees_three_by_three_tokens_of_a_rectangular_grid():
    projector = Projector(8, 6)
    tokens = torch.randn(1, 4 * 7, 8, generator=torch.Generator().manual_seed(0))
    moved = tokens.clone()
    moved[0, 2 * 7 + 5] += 1  # row 2, column 5, in raster order
    changed = (projector(moved, (4, 7)) != projector(tokens, (4, 7))).any(-1)[0]
    wanted = torch.zeros(4, 7, dtype=torch.bool)
    wanted[1:4, 4:7] = True
    assert torch.equal(changed, wanted)
    assert projector(tokens, (4, 7)).shape == (1, 4, 7, 6) and projector.conv.weight.shape == (6, 8, 3, 3)


def test_the_loss_is_minus_the_cosine_of_each_image():
    wanted = torch.randn(3, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    found = torch.stack([2 * wanted[0], -wanted[1], torch.roll(wanted[2], 1, -1)])
    direct = -(found[2] * wanted[2]).sum(-1) / (found[2].norm(dim=-1) * wanted[2].norm(dim=-1))
    values = loss(found, wanted)
    assert values.shape == (3,) and torch.allclose(values, torch.stack([torch.tensor(-1.0), torch.tensor(1.0), direct.mean()]), atol=1e-6)


def test_a_teacher_of_another_grid_is_laid_on_the_models():
    tokens = torch.arange(16.0).view(1, 4, 4, 1).expand(-1, -1, -1, 3)
    assert resampled(tokens, (4, 4)) is tokens
    halved = resampled(tokens, (2, 2))[0, :, :, 0]
    assert halved[0, 0] < halved[0, 1] < halved[1, 0] < halved[1, 1] and torch.isclose(halved.mean(), tokens.mean(), atol=1e-4)
    assert resampled(torch.full((1, 9, 9, 2), 3.0), (5, 16)).allclose(torch.tensor(3.0))
    assert torch.allclose(target(tokens, (4, 4), 1.0).mean((1, 2)), torch.zeros(3), atol=1e-6)


def test_a_tap_gives_the_image_tokens_of_its_block_with_their_gradient():
    model = small_model()
    latents, t, text, mask = inputs()
    seen = {}
    model.blocks[0].register_forward_hook(lambda block, given, output: seen.update(first=output[0]))
    tap = Tap(model, 1)
    model(latents, t, text, mask)
    tokens = tap.take()
    assert tokens is seen["first"] and tokens.shape == (2, 15, SMALL.width) and grid_of(latents, SMALL.patch) == (3, 5)
    tokens.square().mean().backward()
    assert model.first.weight.grad.abs().sum() > 0 and model.blocks[0].attn.wq.weight.grad.abs().sum() > 0
    assert model.blocks[1].attn.wq.weight.grad is None and model.last.linear.weight.grad is None, "later layers are not aligned"
    with pytest.raises(AssertionError):
        tap.take()
    tap.remove()
    model(latents, t, text, mask)
    with pytest.raises(AssertionError):
        tap.take()


def test_padding_of_the_text_does_not_reach_the_projector():
    model, projector = small_model(), Projector(SMALL.width, 4)
    latents, t, text, mask = inputs()
    tap = Tap(model, 2)
    found = []
    for noise in (0.0, 100.0):
        model(latents, t, torch.where(mask[:, :, None, None], text, text + noise), mask)
        found.append(projector(tap.take(), (3, 5)))
    assert torch.equal(*found)


def test_a_compiled_block_is_not_compiled_again_at_every_step():
    torch._dynamo.reset()
    model, plain = small_model(), small_model()
    compiled = []

    def backend(graph, example):
        compiled.append(graph)
        return graph.forward

    model.blocks[0].compile(backend=backend)
    tap, other = Tap(model, 1), Tap(plain, 1)
    counts = []
    for seed in range(4):
        batch = inputs(seed)
        model(*batch), plain(*batch)
        assert torch.allclose(tap.take(), other.take(), atol=1e-5)
        counts.append(len(compiled))
    assert counts[0] > 0 and counts[1] == counts[3]
    torch._dynamo.reset()


def test_alignment_is_learned_and_goes_on_from_its_state_exactly():
    latents, t, text, mask = inputs()
    teacher = torch.randn(2, 6, 10, 8, generator=torch.Generator().manual_seed(5))  # of a finer grid

    def start():
        model = small_model()
        torch.manual_seed(0)
        projector = Projector(SMALL.width, 8)
        return model, projector, optim.adamw(model, 1e-2, 0.0), optim.adamw(projector, 1e-2, 0.0), Tap(model, 1)

    def step(model, projector, optimizer, other, tap):
        model(latents, t, text, mask)
        value = loss(projector(tap.take(), (3, 5)), target(teacher, (3, 5), 0.6)).mean()
        optimizer.zero_grad(), other.zero_grad()
        value.backward()
        optimizer.step(), other.step()
        return value.item()

    straight = start()
    values = [step(*straight) for _ in range(12)]
    assert values[-1] < values[0] - 0.3
    first = start()
    assert [step(*first) for _ in range(6)] == values[:6]
    saved = [first[0].state_dict(), first[1].state_dict()], [optim.optimizer_tensors(first[i], first[i + 2]) for i in (0, 1)]
    again = start()
    for i in (0, 1):
        again[i].load_state_dict(saved[0][i])
        optim.load_optimizer_tensors(again[i], again[i + 2], {name: value.clone() for name, value in saved[1][i].items()})
    assert [step(*again) for _ in range(6)] == values[6:]


def test_wrong_descriptions_are_refused():
    for wrong in ({"block": 0}, {"block": 1, "gamma": 1.5}, {"block": 1, "weight": 0.0}):
        with pytest.raises(ValueError, match="block counts from 1"):
            Irepa(None, **wrong)
    with pytest.raises(ValueError, match="block 3 of a model that has 2"):
        Tap(small_model(), 3)
