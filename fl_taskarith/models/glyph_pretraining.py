"""Pretrain `vit_glyph` on letters drawn from the fonts that matplotlib ships; no digit image or label is involved.

The letters are distorted and reduced to 8x8 pixels of 17 grey levels, which is how scikit-learn's handwritten digits
are stored (E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998: 32x32 bitmaps summed over
4x4 blocks). Some letters resemble digits (O 0, l 1, Z 2, Cyrillic Ze 3), but every class is a letter.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import safetensors.torch
import torch
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn
from torch.nn import functional

from fl_taskarith.errors import WeightsError
from fl_taskarith.models.vit_glyph import vit_glyph
from fl_taskarith.storage.files import write_atomically

# One word per class. Letters share a word where case or alphabet makes no visible difference at 8x8 pixels, since the
# distortions hide a letter's size and position on the line; letters drawn like another class in some font are left out.
LATIN = "A a B b Cc D d E e F f G g H h Il i J j Kk L Mm N n Oo Pp Q q R r Ss T t Uu Vv Ww Xx Y y Zz"
GREEK = "Γ Δ Θθ Ξ Π Σ Ψψ Ω β γ δ ε ζ λ μ ξ π σ ω"
CYRILLIC = "Б б Д Жж Зз И Л ФфΦφ Ц Ч Ш Щ Ы Ээ Юю Яя"
LETTER_CLASSES: tuple[str, ...] = tuple(f"{LATIN} {GREEK} {CYRILLIC}".split())

# Fonts whose character map claims letters but whose glyphs are boxes, brackets or calligraphy.
SYMBOL_FONTS = frozenset({"LastResortHE-Regular", "cmex10", "cmsy10"})
# A whole family is held out: its members resemble each other too much for holding out one style to be honest.
HELD_OUT_PREFIX = "STIX"

CANVAS = 32  # side of the distorted bitmap, pixels
INK = 28  # longer side of a letter's ink on the canvas before distortion, pixels
GREY_LEVELS = 16  # highest value of a scikit-learn digit's pixel
BATCH_SIZE = 256
HELD_OUT_DRAWS = 8  # distortions of each held-out letter when measuring accuracy


@dataclass(frozen=True)
class Glyph:
    """One letter of one font: `image` [1, 32, 32] in [0, 1] with bright ink, `label` an index of LETTER_CLASSES."""

    image: Tensor
    label: int
    character: str
    font: str


def render_alphabet() -> list[Glyph]:
    """Draw every letter of LETTER_CLASSES in every matplotlib font that has it, fonts in alphabetical order.

    Raises:
        WeightsError: matplotlib's fonts are gone.
    """
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    glyphs = []
    for path in sorted(folder.glob("*.ttf")):
        present = FT2Font(str(path)).get_charmap()
        if path.stem not in SYMBOL_FONTS and ord("A") in present:
            letters = [(label, letter) for label, word in enumerate(LETTER_CLASSES) for letter in word]
            glyphs += [Glyph(_draw(letter, path), label, letter, path.stem)
                       for label, letter in letters if ord(letter) in present]  # fmt: skip
    if not glyphs:
        raise WeightsError(f"No font with letters in {folder}: expected the .ttf files that matplotlib ships.")
    return glyphs


def _draw(character: str, font_path: Path) -> Tensor:
    """Draw one letter, its ink scaled to INK pixels along the longer side and centred: [1, CANVAS, CANVAS]."""
    size = 4 * CANVAS
    page = Image.new("L", (3 * size, 3 * size))  # room for what overhangs a letter's box
    ImageDraw.Draw(page).text((size, size), character, fill=255, font=ImageFont.truetype(str(font_path), size))
    box = page.getbbox()
    if box is None:
        raise WeightsError(f"Font {font_path.name} has no ink for {character!r}: reinstall matplotlib.")
    letter = ImageOps.pad(page.crop(box), (INK, INK), Image.Resampling.BOX)
    canvas = ImageOps.expand(letter, (CANVAS - INK) // 2)
    return torch.from_numpy(np.array(canvas, dtype=np.float32) / 255).unsqueeze(0)


def distort(images: Tensor, generator: torch.Generator) -> Tensor:
    """Vary letters [N, 1, 32, 32] in [0, 1] as handwriting does; return whole numbers 0..16, [N, 1, 8, 8]."""
    grid = _affine_grid(len(images), generator) + _elastic_shift(len(images), generator)
    warped = functional.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    inked = _change_thickness(warped, generator)
    blurred = functional.avg_pool2d(inked, 3, stride=1, padding=1)
    softened = torch.lerp(inked, blurred, _uniform(inked, 0.0, 1.0, generator))
    contrasted = (softened * _uniform(inked, 0.8, 2.0, generator)).clamp(0, 1)
    return (functional.avg_pool2d(contrasted, CANVAS // 8) * GREY_LEVELS).round()


def to_model_input(levels: Tensor) -> Tensor:
    """Turn grey levels 0..16, [N, 1, 8, 8], into model inputs [N, 3, 16, 16] in [-1, 1], as digits are prepared."""
    pixels = (levels * 255 / GREY_LEVELS).round()
    enlarged = functional.interpolate(pixels, size=(16, 16), mode="bicubic", antialias=True).clamp(0, 255)
    return ((enlarged / 255 - 0.5) / 0.5).expand(-1, 3, -1, -1)


def _uniform(images: Tensor, low: float, high: float, generator: torch.Generator) -> Tensor:
    """Draw one number per image, [N, 1, 1, 1]."""
    return low + (high - low) * torch.rand(len(images), 1, 1, 1, generator=generator)


def _affine_grid(count: int, generator: torch.Generator) -> Tensor:
    """Draw a rotation, slant, stretch and shift per image, as sampling positions [N, 32, 32, 2]."""
    unit = 2 * torch.rand(6, count, generator=generator) - 1
    angle, slant = unit[0] * math.radians(15), unit[1] * 0.35
    stretch_x, stretch_y = torch.exp(0.3 * unit[2]), torch.exp(0.12 * unit[3])
    cosine, sine = torch.cos(angle), torch.sin(angle)
    # The matrix leads from output to input positions, hence the division: a larger stretch gives a larger letter.
    rows = [[cosine / stretch_x, (slant * cosine - sine) / stretch_y, 0.12 * unit[4]],
            [sine / stretch_x, (slant * sine + cosine) / stretch_y, 0.08 * unit[5]]]  # fmt: skip
    matrix = torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)
    return functional.affine_grid(matrix, [count, 1, CANVAS, CANVAS], align_corners=False)


def _elastic_shift(count: int, generator: torch.Generator) -> Tensor:
    """Draw smooth displacements of up to a few pixels, [N, 32, 32, 2] in units of half the canvas."""
    strength = 0.12 * torch.rand(count, 1, 1, 1, generator=generator)
    coarse = strength * torch.randn(count, 2, 4, 4, generator=generator)
    return functional.interpolate(coarse, size=(CANVAS, CANVAS), mode="bicubic").permute(0, 2, 3, 1)


def _change_thickness(images: Tensor, generator: torch.Generator) -> Tensor:
    """Thin or thicken strokes by a random amount, from about one pixel less to two pixels more on each side."""
    ink = images.mean(dim=(1, 2, 3), keepdim=True)
    # Bold letters would fill up and hairlines vanish: the first are not thickened much, the second not thinned.
    amount = torch.where(ink > 0.25, _uniform(images, -0.8, 0.5, generator), _uniform(images, -0.8, 2.0, generator))
    thicker = functional.max_pool2d(images, 3, stride=1, padding=1)
    thickest = functional.max_pool2d(thicker, 3, stride=1, padding=1)
    thinner = -functional.max_pool2d(-images, 3, stride=1, padding=1)
    survives = thinner.mean(dim=(1, 2, 3), keepdim=True) > 0.5 * ink
    thinned = torch.where(survives, torch.lerp(images, thinner, (-amount).clamp(0, 1)), images)
    thickened = torch.lerp(torch.lerp(images, thicker, amount.clamp(0, 1)), thickest, (amount - 1).clamp(0, 1))
    return torch.where(amount < 0, thinned, thickened)


def pretrain_glyph(
    output: Path, *, seed: int = 0, steps: int = 4000, threads: int = 2, report: Callable[[str], None] = print
) -> dict[str, Any]:
    """Train `vit_glyph` on letters and write its backbone to `output` as safetensors, replacing a file there.

    On one machine, equal `seed`, `steps` and `threads` give equal bytes. Expect some minutes on two idle cores and far
    longer on busy ones.

    Returns:
        What the file says of it, among that "held_out_accuracy", in [0, 1], on distorted letters of held-out fonts.

    Raises:
        ValueError: `steps` is below 1.
        WeightsError: the letters cannot be drawn.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}, expected at least 1")
    output.parent.mkdir(parents=True, exist_ok=True)
    glyphs = render_alphabet()
    held_out = [glyph for glyph in glyphs if glyph.font.startswith(HELD_OUT_PREFIX)]
    training = [glyph for glyph in glyphs if not glyph.font.startswith(HELD_OUT_PREFIX)]
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model = _train(training, seed, steps, report)
        accuracy = _accuracy(model, held_out, seed)
    finally:
        torch.set_num_threads(threads_before)
    facts = {
        **{"held_out_accuracy": accuracy, "num_classes": len(LETTER_CLASSES), "steps": steps, "seed": seed},
        **{"num_fonts": len({glyph.font for glyph in training}), "matplotlib": matplotlib.__version__},
        "architecture": "vit_glyph",
    }
    # One metadata key, because safetensors writes several in random order.
    metadata = {"pretraining": json.dumps({name: str(value) for name, value in facts.items()}, sort_keys=True)}
    backbone = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("head.")}
    write_atomically(output, safetensors.torch.save(backbone, metadata))
    report(f"held-out fonts: {accuracy:.1%} right over {len(LETTER_CLASSES)} classes; wrote {output}")
    return facts


def _train(glyphs: list[Glyph], seed: int, steps: int, report: Callable[[str], None]) -> nn.Module:
    """Minimise the cross-entropy with AdamW; the learning rate warms up and decays along cosines."""
    with torch.random.fork_rng(devices=[]):  # timm draws initial weights from the global generator
        torch.manual_seed(seed)
        model: nn.Module = vit_glyph(num_classes=len(LETTER_CLASSES))
    images, labels = _stack(glyphs)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=2e-3, total_steps=steps + 1, pct_start=0.05, cycle_momentum=False
    )
    for step in range(1, steps + 1):
        chosen = torch.randint(len(glyphs), (BATCH_SIZE,), generator=generator)
        inputs = to_model_input(distort(images[chosen], generator))
        loss = functional.cross_entropy(model(inputs), labels[chosen], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 500 == 0 or step == steps:
            report(f"step {step}/{steps}: loss {loss.item():.3f}")
    return model


@torch.inference_mode()
def _accuracy(model: nn.Module, glyphs: list[Glyph], seed: int) -> float:
    """Return the share of letters classified rightly, over HELD_OUT_DRAWS distortions of each glyph."""
    images, labels = _stack(glyphs * HELD_OUT_DRAWS)
    inputs = to_model_input(distort(images, torch.Generator().manual_seed(seed + 1)))
    return int((model.eval()(inputs).argmax(dim=1) == labels).sum()) / len(labels)


def _stack(glyphs: list[Glyph]) -> tuple[Tensor, Tensor]:
    """Return images [N, 1, 32, 32] and labels [N]."""
    return torch.stack([glyph.image for glyph in glyphs]), torch.tensor([glyph.label for glyph in glyphs])
