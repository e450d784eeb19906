"""More labelled images than a folder of one's own has: from Debian packages (people made them) and from ComfyUI's templates (models did).

    apt-get download PACKAGE ... && dpkg-deb -x PACKAGE.deb DEBIAN/PACKAGE          # those of SETS; unzip openarena's *.pk3 beside them
    pip download --no-deps comfyui-workflow-templates-media-{image,api,other,video,assets-01,assets-02} && unzip -d COMFYUI *.whl
    python benchmarks/package_images.py --debian-dir DEBIAN --comfyui-dir COMFYUI --manifest DIR/MANIFEST.tsv --work WORK

Writes WORK/all.tsv: the manifest's rows and these, as `k2 synthetic fit --images / --manifest WORK/all.tsv` takes them. The packages are of
Debian 12, frozen in early 2023; most of their images are older than any generator. Templates are thumbnails of what a named model made, 300
to 1024 pixels a side; where the file moves the middle frame is taken, and the logos at the top of API templates are cut off. Inputs of
edits, 3-D, audio, upscaling, masks and depth are left out. A template of a model that the manifest has too joins that generator.
"""

import csv
import hashlib
import random
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

SETS = (  # package, parts of paths to take, to leave, kind, most images
    (
        "wesnoth-1.16-data",
        "/portraits/ /story/ /maps/background /images/",
        "/terrain/ /units/ icon misc/ buttons /footer halo",
        "illustration",
        160,
    ),
    ("mate-backgrounds", "/", "", "photo", 30),
    ("plasma-workspace-wallpapers", "/contents/images/", "", "illustration", 40),
    ("ukui-wallpapers", "/", "", "photo", 30),
    ("gnome-backgrounds", "/", "", "render", 16),
    ("lomiri-wallpapers", "/", "", "illustration", 4),
    ("sway-backgrounds", "/", "", "illustration", 4),
    ("opencv-doc", "/examples/data", "", "photo", 90),
    ("gimp-help-en", "/filters/examples /tutorials/ /using/", "", "photo", 100),
    ("hugin-data", "data/help", "", "photo", 15),
    ("openclipart-png", "/animals /people /food /buildings /transportation /plants /recreation /unsorted", "icons", "illustration", 120),
    ("hedgewars-data", "/Missions/ /Themes/ /Graphics/", "/Forts Hats icon", "illustration", 60),
    ("widelands-data", "/images/ /campaigns /pics", "/anim icon terrain", "illustration", 60),
    ("supertuxkart-data", "/tracks/ /textures /gui", "normal Normal _nm gloss editor icon", "render", 120),
    ("megaglest-data", "/tilesets /techs /tutorials /scenarios", "normal icon", "render", 60),
    ("tuxpaint-stamps-default", ".png", ".svg", "photo", 60),
    ("marble-data", "/doc/HTML/en/ /maps/", "", "illustration", 12),
    ("unknown-horizons", "/gui/ /content", "icon /anim atlas", "illustration", 50),
    ("desktop-base", "wallpaper grub", "", "illustration", 10),
    ("pingus-data", "/textures", "", "illustration", 25),
    ("flightgear-data-ai", "Models", "normal", "render", 30),
    ("lomiri-wallpapers-16.04", "/backgrounds", "", "photo", 15),
    ("lomiri-wallpapers-20.04", "/backgrounds", "", "illustration", 4),
    ("python3-skimage", "/skimage/data", "", "photo", 18),
    ("palapeli-data", "/collection", "", "photo", 10),
    ("extremetuxracer-data", "/env /terrains", "", "photo", 30),
    ("naev-data", "/planet/exterior", "", "illustration", 40),
    ("kstars-data", "/skycultures/western /textures", "", "illustration", 40),
    ("warmux-data", "/map/", "mask", "illustration", 40),
    ("supertux-data", "/background/", "", "illustration", 40),
    ("ardentryst", "/Data", "", "illustration", 30),
    ("flare-game", "/portraits /cutscenes", "", "art", 36),
    ("freecol", "/foundingFathers", "", "art", 25),
    ("freedroidrpg-data", "/graphics/backgrounds", "", "render", 20),
    ("lincity-ng-data", "/images/tiles", "", "render", 20),
    ("openarena-data", "/levelshots", "", "render", 22),
    ("freeorion-data", "/art/hulls_design /art/planets /art/nebulae /art/icons/building /art/icons/monsters", "", "render", 60),
)
NOT_A_PICTURE = re.compile(
    "^3d_|to_model|_model2uv|hunyuan3d|rodin|tripo|meshy|llm|audio|elevenlabs|elevenLabs|speech|segment|depth_|sdpose|stitch|color_adjust|"
    "mask_oper|utility|remove_video_back|green_screen|topaz|svg|vector|hitpaw|wavespeed|interpolation|datatype|switch_node|anthropic|"
    "openai_chat|openrouter|bytedance_seed-1|sonilo|ace_step|stability_upscale|magnific|lotus|part-1|retopo|smart_topology|gemini-1|text_gen|"
    "contact_sheet|dieline|logo|beeble|image_to_3d|vto|erase|expand|outpaint|inpaint|fill|replace_background|flshvsr|"
    "bria_guided|sfx|mirelo|openrouter_(gpt|grok|kimi)|openai_gpt6|marigold|moge3|sam3d|seedvr2|increase_resolution|enhance|upscale|lip_?sync|"
    "veed|to_svg|to_vector|background_removal|layer_separation|talking|voice|video_translate|multiangle|quiver|heygen_avatar"
)
FAMILIES = (  # the first that a template's name has, and the generator that it is
    *(("krea3", "Krea-3"), ("flux3", "FLUX.3"), ("minimax|hailuo|fasth3", "MiniMax"), ("mai_image", "MAI-Image")),
    *(
        ("muse_image", "Muse Image"),
        ("mage_flow", "Mage-Flow"),
        ("fibo|bria", "Bria"),
        ("moss_image", "MOSS-Image"),
        ("ming_image", "Ming-Image"),
        ("heygen", "HeyGen"),
    ),
    *(("hy_image|hunyuan", "Hunyuan"), ("pruna", "Pruna")),
    *(
        ("krea", "Krea-2 turbo"),
        ("nano_?banana|gemini|google", "Nano banana pro"),
        ("gpt_image|openai_image|openai_fashion", "gpt-image-2"),
    ),
    *(
        ("dall_e", "DALL-E"),
        ("sdxl", "SDXL"),
        ("sd3|stability", "SD3"),
        ("chroma", "Chroma"),
        ("flux2|flux_2", "FLUX.2"),
        ("flux", "FLUX.1"),
    ),
    *(("qwen", "Qwen-Image"), ("hidream", "HiDream"), ("z_image", "Z-Image"), ("wan", "Wan"), ("ltx", "LTX"), ("kling|king_o3", "Kling")),
    *(("veo", "Veo"), ("seedream|seedance|bytedance", "Seed"), ("ideogram", "Ideogram"), ("recraft", "Recraft")),
    *(("luma", "Luma"), ("runway", "Runway"), ("grok", "Grok"), ("vidu", "Vidu"), ("pixverse", "PixVerse")),
    *(("happyhorse", "HappyHorse"), ("reve", "Reve"), ("longcat", "LongCat"), ("kandinsky", "Kandinsky"), ("omnigen", "OmniGen")),
    *(("capybara", "Capybara"), ("lumina|newbie|anima", "Lumina/anime"), ("default", "SD 1.x/2.x (ComfyUI)")),
)
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
LEAST_SIDE, LEAST_SPREAD, MOST_ASPECT = 200, 18.0, 3.0


def debian(folder: Path) -> Iterator[tuple[str, str, str]]:
    """(path, source, kind) of pictures that are large enough, not flat, and not copies of each other."""
    rng, seen = random.Random(0), set()
    for package, take, leave, kind, most in SETS:
        files = [path for path in sorted((folder / package).rglob("*")) if path.suffix.lower() in SUFFIXES and not path.is_symlink()]
        files = [
            path for path in files if any(part in str(path) for part in take.split()) and not any(p in str(path) for p in leave.split())
        ]
        rng.shuffle(files)
        count = 0
        for path in files:
            try:
                with Image.open(path) as image:
                    width, height = image.size
                    small = image.convert("RGB").resize((32, 32))
            except OSError:
                continue
            look = hashlib.md5(np.asarray(small.resize((8, 8))).tobytes()).hexdigest()
            aspect = max(width, height) / min(width, height)
            if min(width, height) < LEAST_SIDE or aspect > MOST_ASPECT or np.asarray(small, float).std() < LEAST_SPREAD or look in seen:
                continue
            seen.add(look)
            count += 1
            yield str(path.resolve()), f"debian:{package}", kind
            if count == most:
                break


def comfyui(folder: Path, out: Path, known: set[str]) -> Iterator[tuple[str, str]]:
    """(path, generator) of templates' first pictures, written as PNG to `out`; generators that are not `known` get the prefix comfy."""
    out.mkdir(parents=True, exist_ok=True)
    for path in {path.name: path for path in sorted(folder.rglob("*-1.webp"))}.values():
        with Image.open(path) as image:
            if NOT_A_PICTURE.search(path.name) or min(image.size) < 256:
                continue
            image.seek(getattr(image, "n_frames", 1) // 2 if getattr(image, "n_frames", 1) > 1 else 0)
            pixels = np.asarray(image.convert("RGB"))
        if path.name.startswith("api_"):
            pixels = pixels[int(len(pixels) * 0.2) :]
        Image.fromarray(pixels).save(out / f"{path.stem}.png")
        generator = next((name for pattern, name in FAMILIES if re.search(pattern, path.name)), "other")
        yield str((out / f"{path.stem}.png").resolve()), generator if generator in known else f"comfy:{generator}"


def main(debian_dir: Path, comfyui_dir: Path, manifest: Path, work: Path) -> None:
    """Write WORK/all.tsv."""
    with manifest.open(newline="") as file:
        given = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    rows = [(str((manifest.parent / row["path"]).resolve()), row["label"], row["generator_or_source"], row["kind"]) for row in given]
    rows += [(path, "real", source, kind) for path, source, kind in debian(debian_dir)]
    known = {row["generator_or_source"] for row in given}
    rows += [(path, "synthetic", generator, "sample") for path, generator in comfyui(comfyui_dir, work / "comfyui", known)]
    lines = ["path\tlabel\tgenerator_or_source\tkind", *("\t".join(row) for row in rows)]
    (work / "all.tsv").write_text("\n".join(lines) + "\n")
    print(f"{work / 'all.tsv'}: {len(rows)} images, {len(rows) - len(given)} of packages")


if __name__ == "__main__":
    tyro.cli(main)
