"""Our DiT is the released one: the same tensors, and the same numbers as the implementation in diffusers."""

import dataclasses

import pytest
import torch

from k2model import attention, dit
from k2model.dit import K2, K2_1B, NANO, Config, DiT
from k2model.flops import train_flops
from k2model.layouts import diffusers_config

diffusers = pytest.importorskip("diffusers", reason="the reference implementation is in the extra [train]")
single_file = pytest.importorskip("diffusers.loaders.single_file_utils")

SMALL = Config(
    width=128, num_blocks=2, num_heads=4, num_kv_heads=2, text_dim=64, text_taps=3, text_heads=2, num_fusion_blocks=2, time_dim=32
)


def on_meta(config: Config) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return DiT(config).state_dict()


def reference(config: Config) -> torch.nn.Module:
    """diffusers' class with the sizes of `config`."""
    return diffusers.Krea2Transformer2DModel.from_config(diffusers_config(config))


def test_the_released_model_has_430_tensors_of_12820073036_values():
    tensors = on_meta(K2)
    assert (len(tensors), sum(tensor.numel() for tensor in tensors.values())) == (430, 12_820_073_036)
    assert tensors["blocks.27.attn.wk.weight"].shape == (1536, 6144) and tensors["blocks.0.mod.lin"].shape == (36864,)
    assert tensors["txtfusion.projector.weight"].shape == (1, 12) and tensors["last.modulation.lin"].shape == (2, 6144)


def test_every_tensor_of_the_released_layout_has_its_place_and_shape_in_diffusers():
    with torch.device("meta"):
        theirs = {name: tuple(tensor.shape) for name, tensor in reference(K2).state_dict().items()}
    converted = single_file.convert_krea2_transformer_checkpoint_to_diffusers(dict(on_meta(K2)))
    assert {name: tuple(tensor.shape) for name, tensor in converted.items()} == theirs


def pair(config: Config = SMALL) -> tuple[DiT, torch.nn.Module]:
    """Both models with the same random weights, none of them zero."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    ours = DiT(config)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    theirs = reference(config)
    theirs.load_state_dict(single_file.convert_krea2_transformer_checkpoint_to_diffusers(dict(ours.state_dict())), strict=True)
    return ours, theirs


def inputs(config: Config = SMALL, lengths: tuple[int, ...] = (7, 3), size: tuple[int, int] = (8, 12)) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(len(lengths), 16, *size, generator=generator)
    text = torch.randn(len(lengths), max(lengths), config.text_taps, config.text_dim, generator=generator)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return latents, torch.linspace(0.9, 0.2, len(lengths)), text, mask


def of_diffusers(theirs: torch.nn.Module, latents: torch.Tensor, t: torch.Tensor, text: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The velocity that diffusers' class gives, in our shape."""
    batch, channels, height, width = latents.shape
    rows, columns = height // 2, width // 2
    tokens = latents.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, -1)
    grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    positions = torch.cat([torch.zeros(text.shape[1], 3), torch.cat([torch.zeros(len(grid), 1), grid], 1)])
    found = theirs(tokens, text, t, positions, mask, return_dict=False)[0]
    return found.reshape(batch, rows, columns, channels, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(latents.shape)


def difference(ours: DiT, theirs: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> tuple[float, float]:
    """Relative errors (L2) of the output and of the worst gradient of any parameter."""
    expected, found = of_diffusers(theirs, *given), ours(*given)
    found.square().mean().backward()
    expected.square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    mine = single_file.convert_krea2_transformer_checkpoint_to_diffusers({name: p.grad for name, p in ours.named_parameters()})
    worst = max(float((mine[name] - g).norm() / g.norm()) for name, g in gradients.items())
    return float((found - expected).norm() / expected.norm()), worst


SHAPES = {
    "gqa 4, heads of 64": Config(256, 2, 4, 1, 64, 3, 2, 2, time_dim=32),
    "mha, heads of 32": Config(128, 2, 4, 4, 64, 12, 2, 1, time_dim=64),
    "gqa 2, heads of 128": Config(512, 1, 4, 2, 96, 4, 4, 1, time_dim=32),
}


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("lengths, size", [((7, 3), (8, 12)), ((1, 9, 4), (2, 6)), ((5, 5), (10, 4)), ((6,), (6, 6))])
def test_outputs_and_all_gradients_equal_diffusers(config, lengths, size):
    output, gradient = difference(*pair(config), inputs(config, lengths, size))
    assert output < 2e-6 and gradient < 2e-5


def no_rotation(x, rope):
    return x


def columns_first(config, rows, columns, device, table=dit.rope_table):
    """Positions (column, row) for the same tokens."""
    return table(config, columns, rows, device).unflatten(0, (columns, rows)).transpose(0, 1).flatten(0, 1)


MUTATIONS = {
    "rope theta": lambda patch: patch.setattr(Config, "rope_theta", 1e4),
    "no rope": lambda patch: patch.setattr(attention, "rotate", no_rotation),
    "rope turned the other way": lambda patch: patch.setattr(
        attention, "rotate", lambda x, rope, rotate=attention.rotate: rotate(x, rope.conj())
    ),
    "rows for columns": lambda patch: patch.setattr(dit, "rope_table", columns_first),
    "another split of the head over the axes": lambda patch: patch.setattr(
        Config, "rope_dims", property(lambda c: (c.rope_dims_of_k2[0] + 4, c.rope_dims_of_k2[1] - 4, c.rope_dims_of_k2[2]))
    ),
    "sine before cosine": lambda patch: patch.setattr(dit, "time_features", lambda t, n, f=dit.time_features: f(t, n).roll(n // 2, -1)),
    "time not times 1000": lambda patch: patch.setattr(dit, "time_features", lambda t, n, f=dit.time_features: f(t / 1000, n)),
    "no attention gate": lambda patch: patch.setattr(torch, "sigmoid", torch.ones_like),
    "norm scale without its one": lambda patch: patch.setattr(
        dit.RMSNorm, "forward", lambda norm, x: torch.nn.functional.rms_norm(x, norm.scale.shape, norm.scale, norm.eps)
    ),
    "another eps": lambda patch: patch.setattr(
        torch.nn.functional, "rms_norm", lambda x, s, w=None, eps=0, f=torch.rms_norm: f(x, s, w, 1e-3)
    ),
    "keys of another head": lambda patch: patch.setattr(
        dit, "by_segment", lambda q, k, v, tokens, f=dit.by_segment: f(q, k.flip(1), v, tokens)
    ),
    "gelu without tanh": lambda patch: patch.setattr(torch.nn.GELU, "forward", lambda _, x: torch.nn.functional.gelu(x)),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_parity_refuses_a_wrong_model(name, monkeypatch):
    config = Config(256, 2, 4, 2, 64, 3, 2, 2, time_dim=32)
    ours, theirs = pair(config)
    given = inputs(config)
    expected = of_diffusers(theirs, *given)
    monkeypatch.setattr(Config, "rope_dims_of_k2", Config.rope_dims, raising=False)
    MUTATIONS[name](monkeypatch)
    if name == "rope theta":
        ours.config = dataclasses.replace(config, rope_theta=1e4)
    with torch.no_grad():
        found = ours(*given, kernel=dit.by_segment)
    assert (found - expected).norm() / expected.norm() > 2e-5


def test_padding_never_changes_a_valid_token():
    ours, _ = pair()
    latents, t, text, mask = inputs()
    with torch.no_grad():
        padded = ours(latents, t, text, mask)
        alone = ours(latents[1:], t[1:], text[1:, :3])
        text[1, 3:] = float("nan")
        unread = ours(latents, t, text, mask)
        text, mask = text[1:].flip(1), mask[1:].flip(1)  # padding first: text has no positions
        moved = ours(latents[1:], t[1:], text.flip(1)[:, [3, 0, 4, 1, 2]], torch.tensor([[False, True, False, True, True]]))
    assert torch.allclose(padded[1:], alone, atol=2e-5)
    assert torch.equal(padded, unread)
    assert torch.allclose(moved, alone, atol=2e-5)


def test_a_batch_of_one_length_is_the_batch_of_its_samples():
    ours, _ = pair()
    latents, t, text, mask = inputs(lengths=(5, 5, 5))
    with torch.no_grad():
        together = ours(latents, t, text)
        apart = torch.cat([ours(latents[i : i + 1], t[i : i + 1], text[i : i + 1], mask[i : i + 1]) for i in range(3)])
    assert torch.allclose(together, apart, atol=2e-5)


def test_the_small_model_has_about_1350_million_values_and_a_cheap_text_fusion():
    tensors = on_meta(K2_1B)
    assert 1.30e9 < sum(tensor.numel() for tensor in tensors.values()) < 1.40e9
    text = (train_flops(K2_1B, 160, 256) - train_flops(dataclasses.replace(K2_1B, num_fusion_blocks=0), 160, 256)) / train_flops(
        K2_1B, 160, 256
    )
    assert text < 0.2


def test_flops_are_those_of_a_count_by_hand():
    # The report's notes: 32.9, 91.5 and 350.0 TFLOP per sample at 256, 512 and 1024 px with 160 text tokens.
    assert [train_flops(K2, 160, tokens) / 1e12 for tokens in (256, 1024, 4096)] == pytest.approx([32.9, 91.5, 350.0], rel=2e-3)


def test_flops_of_the_linear_layers_equal_what_pytorch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    model = DiT(NANO)
    text = torch.randn(1, 6, NANO.text_taps, NANO.text_dim)
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(1, 16, 16, 16), torch.tensor([0.5]), text).sum().backward()
    # PyTorch leaves out the gradient with respect to the inputs of the first layers, and counts fused attention's own way.
    assert counter.get_total_flops() == pytest.approx(train_flops(NANO, 6, 64), rel=0.05)
