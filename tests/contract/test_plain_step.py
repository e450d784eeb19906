"""`k2 train`'s step is a plain training step of diffusers' class: the same loss, step after step, for 200 steps."""

from dataclasses import replace

import pytest
import small_krea
import torch
import torch.nn.functional as F
from packed_world import landscapes, make_packed

from k2model import flow
from k2model.data import Packed, to_pixels
from k2model.dit import NANO
from k2model.loader import Loader
from k2model.order import Order
from k2model.parallel import World
from k2model.vae import fit_pca
from pipelines.train_recipes import k2_nano
from pipelines.train_step import build, train_step

pytest.importorskip("diffusers", reason="the reference implementation is in the extra [train]")

STEPS = 200
SIDE = 64
TOLERANCE = 1e-5  # relative, measured: 2e-7


def recipe():
    """One phase; no decay, for a plain step decays biases and tables too."""
    whole = k2_nano()
    phase = replace(whole.phases[0], data="p64", resolution=SIDE, steps=STEPS)
    model = replace(NANO, width=64, num_blocks=2, num_heads=2, num_kv_heads=1)
    return replace(whole, model=model, phases=(phase,), weight_decay=0.0)


class Plain:
    """The step that one writes after diffusers' documentation: padded text, a mask, torch.optim.AdamW."""

    def __init__(self, model, plan, codec, encode):
        self.model = small_krea.diffusers_transformer(model).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), betas=plan.betas, eps=1e-8, weight_decay=0.0)
        self.plan, self.codec, self.encode = plan, codec, encode

    def step(self, batch, number: int, lr: float) -> float:
        plan, size = self.plan, SIDE // 16
        with torch.no_grad():
            clean = self.codec.encode(to_pixels(batch.images))
            draw = flow.draw(plan.seed, number, batch.uids, tuple(clean.shape[1:]), plan.phases[0].mu)
            captions = ["" if drop < plan.caption_dropout else own[0] for drop, own in zip(draw.drop, batch.captions, strict=True)]
            text, mask = self.encode(captions)
        t = draw.t[:, None, None, None]

        def tokens(latents: torch.Tensor) -> torch.Tensor:
            return latents.unflatten(3, (size, 2)).unflatten(2, (size, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

        grid = torch.cartesian_prod(torch.arange(size), torch.arange(size))
        places = torch.cat([torch.zeros(text.shape[1], 3), torch.cat([torch.zeros(len(grid), 1), grid], 1)])
        out = self.model(tokens((1 - t) * clean + t * draw.noise), text, draw.t, places, mask, return_dict=False)[0]
        loss = F.mse_loss(out, tokens(draw.noise - clean))
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), plan.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        return float(loss.detach())


@pytest.fixture(scope="module")
def order(tmp_path_factory) -> Order:
    packed = Packed(make_packed(tmp_path_factory.mktemp("run") / "p64", landscapes(40, [(SIDE, SIDE)]), SIDE, 4))
    return Order([packed], [1.0], 1, seed=0)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def curves(order: Order, plan, steps: int, changed=lambda parts: None) -> tuple[list[float], list[float]]:
    """Losses of both, from the same weights on the same batches."""
    phase = plan.phases[0]
    codec = fit_pca(to_pixels(order.sets[0].read(group).images) for group in order.sets[0].groups)
    parts = build(plan, phase, order, plan.text.load("cpu"), codec, World(0, 1, torch.device("cpu")), None, aligned=False)
    plain = Plain(parts.model, plan, codec, parts.encode)
    changed(parts)
    ours, theirs = [], []
    with Loader(order) as loader:
        for (batch,), index in loader:
            if index == steps:
                return ours, theirs
            lr = 1e-3 * min(1.0, (index + 1) / 20)
            ours.append(train_step(parts, plan, phase, [batch], order.num_images(index), index, lr).loss)
            theirs.append(plain.step(batch, index, lr))
    raise AssertionError("unreachable")


def test_two_hundred_steps_have_the_losses_of_a_plain_step_of_diffusers(order):
    ours, theirs = curves(order, recipe(), STEPS)
    apart = [abs(a - b) / b for a, b in zip(ours, theirs, strict=True)]
    assert apart[0] < 2e-6 and max(apart) < TOLERANCE, (max(apart), apart.index(max(apart)))
    assert sum(theirs[-20:]) < 0.8 * sum(theirs[:20]), "something was learned, so there was something to drift apart"


def test_a_learning_rate_one_percent_off_is_seen(order):
    """The tolerance is not so wide that a wrong step passes."""

    def faster(parts):
        whole = parts.optimizer.step

        def step():
            for group in parts.optimizer.param_groups:
                group["lr"] *= 1.01
            whole()

        parts.optimizer.step = step

    ours, theirs = curves(order, recipe(), 60, faster)
    assert max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True)) > TOLERANCE
