"""Our DiT is the released one: the same tensors, and the same numbers as the implementation in diffusers."""

import pytest
import torch

from k2model.dit import K2, NANO, Config, DiT, train_flops

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
    shapes = {name: tuple(tensor.shape) for name, tensor in on_meta(config).items()}
    return diffusers.Krea2Transformer2DModel(
        in_channels=config.token_dim,
        num_layers=config.num_blocks,
        attention_head_dim=config.head_dim,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        intermediate_size=shapes["blocks.0.mlp.up.weight"][0],
        timestep_embed_dim=config.time_dim,
        text_hidden_dim=config.text_dim,
        num_text_layers=config.text_taps,
        text_num_attention_heads=config.text_heads,
        text_num_key_value_heads=config.text_heads,
        text_intermediate_size=shapes["txtfusion.refiner_blocks.0.mlp.up.weight"][0],
        num_layerwise_text_blocks=config.num_fusion_blocks,
        num_refiner_text_blocks=config.num_fusion_blocks,
        axes_dims_rope=config.rope_dims,
        rope_theta=config.rope_theta,
        norm_eps=config.eps,
    )


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


def pair() -> tuple[DiT, torch.nn.Module]:
    """Both models with the same random weights, none of them zero."""
    generator = torch.Generator().manual_seed(0)
    ours = DiT(SMALL)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    theirs = reference(SMALL)
    theirs.load_state_dict(single_file.convert_krea2_transformer_checkpoint_to_diffusers(dict(ours.state_dict())), strict=True)
    return ours, theirs


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 16, 8, 12, generator=generator)
    text = torch.randn(2, 7, SMALL.text_taps, SMALL.text_dim, generator=generator)
    mask = torch.tensor([[True] * 7, [True] * 3 + [False] * 4])
    return latents, torch.tensor([0.9, 0.2]), text, mask


def test_outputs_and_gradients_equal_diffusers():
    ours, theirs = pair()
    latents, t, text, mask = inputs()
    tokens = latents.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 2, 4, 1, 3, 5).reshape(2, 24, 64)
    grid = torch.cartesian_prod(torch.arange(4), torch.arange(6))
    positions = torch.cat([torch.zeros(7, 3), torch.cat([torch.zeros(24, 1), grid], 1)])
    expected = theirs(tokens, text, t, positions, mask, return_dict=False)[0]
    expected = expected.reshape(2, 4, 6, 16, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(latents.shape)
    found = ours(latents, t, text, mask)
    assert (found - expected).norm() / expected.norm() < 2e-6
    found.square().mean().backward()
    expected.square().mean().backward()
    for mine, reference_name in (("blocks.0.attn.wq", "transformer_blocks.0.attn.to_q"), ("first", "img_in"), ("tproj.1", "time_mod_proj")):
        gradient = ours.get_submodule(mine).weight.grad
        other = theirs.get_submodule(reference_name).weight.grad
        assert (gradient - other).norm() / other.norm() < 2e-5, mine


def test_padding_never_changes_a_valid_token():
    ours, _ = pair()
    latents, t, text, mask = inputs()
    with torch.no_grad():
        padded = ours(latents, t, text, mask)
        alone = ours(latents[1:], t[1:], text[1:, :3])
        text[1, 3:] = 1e3
        noisy_padding = ours(latents, t, text, mask)
    assert torch.allclose(padded[1:], alone, atol=2e-5)
    assert torch.equal(padded, noisy_padding)


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
