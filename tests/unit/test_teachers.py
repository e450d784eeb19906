"""Teachers answer with a grid over the whole picture, from weights that are on this disk."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from curation import compact
from curation.towers import Compact, EffNet, Siglip
from pipelines.teachers import Dino, TowerTeacher

DINO = "vit_small_patch16_dinov3"


def picture(height, width, noisy=True):
    """A picture that is flat but for noise in its upper right corner, uint8 (1, 3, H, W)."""
    rng = np.random.default_rng(0)
    pixels = np.full((height, width, 3), 120, np.uint8)
    if noisy:
        pixels[: height // 4, -width // 4 :] = rng.integers(0, 256, (height // 4, width // 4, 3))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


@pytest.mark.parametrize(
    ("tower", "size", "grid"),
    [(Compact(), (256, 256), (16, 16)), (Compact(), (208, 320), (13, 20)), (EffNet(), (256, 256), (8, 8)), (EffNet(), (208, 320), (7, 10))],
)
def test_towers_of_packages_see_the_whole_picture(tower, size, grid):
    teacher = TowerTeacher(tower)
    tokens = teacher.load("cpu")(picture(*size))
    assert tokens.shape == (1, *grid, teacher.dim) and not tokens.requires_grad and tokens.isfinite().all()
    changed = (tokens - teacher.load("cpu")(picture(*size, noisy=False)))[0].norm(dim=-1)
    row, column = divmod(int(changed.argmax()), grid[1])
    assert row <= grid[0] // 4 and column >= grid[1] - 1 - grid[1] // 4, "rows and columns of tokens lie where those of pixels do"


def test_the_compact_teacher_has_the_features_of_its_tower():
    images = picture(128, 128)
    wanted = compact.load()(images.float())
    found = TowerTeacher(Compact()).load("cpu")(images).mean((1, 2))
    assert torch.allclose(found, wanted[:, 64:256], atol=1e-4), "the mean over space of a crop's maps is the crop's feature"


def test_the_effnet_teacher_is_the_tower_on_the_same_pixels():
    images = picture(256, 256)
    square = torch.nn.functional.interpolate(images.float(), (256, 256))
    wanted = EffNet().load("cpu").forward(square)[1].detach()
    assert torch.equal(TowerTeacher(EffNet()).load("cpu")(images).flatten(1, 2), wanted)


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    """Random weights of a DINOv3 in timm's format."""
    import timm

    torch.manual_seed(0)
    network = timm.create_model(DINO, pretrained=False, num_classes=0).eval()
    path = tmp_path_factory.mktemp("dino") / "model.safetensors"
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, path)
    return network, str(path)


def test_a_dino_has_one_token_for_every_token_of_the_model(dino):
    network, path = dino
    teacher = Dino(DINO, path)
    tokens = teacher.load("cpu")
    found = tokens(picture(208, 320))
    assert found.shape == (1, 13, 20, teacher.dim) and teacher.dim == network.num_features
    images = picture(256, 256)
    mean, std = (torch.tensor(network.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        wanted = network.forward_features((images / 255 - mean) / std)[:, network.num_prefix_tokens :]
    assert torch.allclose(tokens(images).flatten(1, 2), wanted, atol=1e-4)


def test_missing_or_foreign_weights_say_what_to_do(dino, tmp_path):
    with pytest.raises(ValueError, match=r"no weights of .*hf download"):
        Dino(DINO, str(tmp_path / "none.safetensors")).load("cpu")
    with pytest.raises(ValueError, match="does not hold"):
        Dino("vit_base_patch16_dinov3", dino[1]).load("cpu")
    with pytest.raises(ValueError, match="timm has no DINO"):
        _ = Dino("resnet18", dino[1]).dim


def test_a_siglip_is_asked_for_patches_of_the_squashed_picture(tmp_path):
    import timm

    from curation.towers import vision_tower

    model = "ViT-B-32-SigLIP2-256"
    torch.manual_seed(0)
    trunk = timm.create_model("vit_base_patch32_siglip_gap_256", pretrained=False, num_classes=0)
    names = vision_tower(model).state_dict()
    own = {f"trunk.{name}": value for name, value in trunk.state_dict().items()}
    save_file(
        {f"visual.{name}": own.get(name, torch.randn(value.shape) * 0.02).contiguous() for name, value in names.items()},
        tmp_path / "s.safetensors",
    )
    tower = Siglip(model, str(tmp_path / "s.safetensors"))
    teacher = TowerTeacher(tower)
    images = picture(208, 320)
    found = teacher.load("cpu")(images)
    assert found.shape == (1, 8, 8, teacher.dim)
    array = images[0].permute(1, 2, 0).numpy()
    wanted = tower.load("cpu")([np.asarray(Image.fromarray(array))]).tokens
    assert torch.nn.functional.cosine_similarity(found.flatten(1, 2), torch.from_numpy(wanted), dim=-1).min() > 0.99
