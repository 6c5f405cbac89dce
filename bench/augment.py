"""Training views a CPU second: kladi's batched views beside torchvision v2 and lightly's SimCLR views of PIL images.

    python bench/augment.py [--quick]

Same images, sizes, strengths and number of threads (one); every pipeline starts from decoded 8-bit images in memory and
ends in normalised float32 tensors in one batch. The images are synthetic: the work does not depend on their content.
Rounds alternate between the pipelines, and the ratio is the median over rounds, so that a busy machine hurts all alike.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from lightly.transforms import SimCLRTransform
from PIL import Image
from torchvision.transforms import v2

from kladi import config
from kladi.data.views import augment

BATCH = 256
MEAN, STD = 0.5, 0.25


def images(count: int, side: int, channels: int) -> np.ndarray:
    """Smooth random images, uint8[count, channels, side, side], as the store holds them."""
    coarse = torch.rand((count, channels, 8, 8), generator=torch.Generator().manual_seed(0))
    fine = torch.nn.functional.interpolate(coarse, side, mode="bicubic").clamp(0, 1)
    return (fine * 255).to(torch.uint8).numpy()


def as_pil(pixels: np.ndarray) -> list[Image.Image]:
    return [Image.fromarray(one[0] if len(one) == 1 else np.moveaxis(one, 0, -1)) for one in pixels]


def ours(pixels: np.ndarray, strengths: config.Augment, size: int) -> Callable[[], torch.Tensor]:
    intensity = config.Intensity(size=size, channels=pixels.shape[1], mean=(MEAN,), std=(STD,))
    row_id = np.arange(len(pixels), dtype=np.uint64)
    extent = np.tile(np.array([0, 0, *pixels.shape[2:]]), (len(pixels), 1))
    return lambda: augment.apply(pixels, extent, augment.draw(strengths, 0, 0, row_id, 0), intensity)


def torchvision(pictures: list[Image.Image], a: config.Augment, size: int, channels: int) -> Callable[[], torch.Tensor]:
    class RandomGamma(v2.Transform):
        def make_params(self, flat_inputs: list) -> dict:  # noqa: ARG002 (torchvision's signature)
            return {"gamma": torch.empty(()).uniform_(-a.gamma, a.gamma).exp().item()}

        def transform(self, inpt: Image.Image, params: dict) -> Image.Image:
            return v2.functional.adjust_gamma(inpt, params["gamma"])

    radius = max(1, int(np.ceil(3 * augment.SIGMA_RANGE[1] * size)))
    blur = v2.GaussianBlur(2 * radius + 1, (augment.SIGMA_RANGE[0] * size, augment.SIGMA_RANGE[1] * size))
    steps = [
        v2.RandomRotation(a.rotation, interpolation=v2.InterpolationMode.BILINEAR) if a.rotation else None,
        v2.RandomResizedCrop(size, a.crop, a.ratio),
        v2.RandomHorizontalFlip(a.flip_horizontal) if a.flip_horizontal else None,
        v2.ColorJitter(a.brightness, a.contrast, a.saturation, a.hue),
        RandomGamma() if a.gamma else None,
        v2.RandomApply([blur], a.blur),
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize([MEAN] * channels, [STD] * channels),
    ]
    transform = v2.Compose([step for step in steps if step is not None])
    return lambda: torch.stack([transform(picture) for picture in pictures])


def lightly(pictures: list[Image.Image], a: config.Augment, size: int, channels: int) -> Callable[[], torch.Tensor]:
    both = SimCLRTransform(
        input_size=size,
        cj_prob=1.0,
        cj_strength=1.0,
        cj_bright=a.brightness,
        cj_contrast=a.contrast,
        cj_sat=a.saturation,
        cj_hue=a.hue,
        min_scale=a.crop[0],
        random_gray_scale=0.0,
        gaussian_blur=a.blur,
        sigmas=(augment.SIGMA_RANGE[0] * size, augment.SIGMA_RANGE[1] * size),
        vf_prob=a.flip_vertical,
        hf_prob=a.flip_horizontal,
        rr_prob=0.0,
        normalize={"mean": [MEAN] * channels, "std": [STD] * channels},
    )
    view = both.transforms[0]  # one of its two views, to count as the others do
    return lambda: torch.stack([view(picture) for picture in pictures])


def cpu_seconds(function: Callable[[], torch.Tensor]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer images and rounds (about 10 seconds)")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    rounds = 3 if quick else 7
    print(f"views a CPU second, one thread, batch {BATCH} (224 px: 64), median of {rounds} rounds")
    print("| size | channels | strengths | kladi | peer | peer's views | kladi / peer |")
    print("|---|---|---|---|---|---|---|")
    for size, channels in ((64, 1), (64, 3), (224, 1), (224, 3)):
        count = BATCH if size == 64 else 64
        pixels = images(count, -(-size * 8 // 7), channels)
        few = as_pil(pixels[: 32 if quick else 64 if size == 224 else 128])
        colour = {"saturation": 0.2, "hue": 0.05} if channels == 3 else {}
        default = config.Augment(**colour)
        simclr = config.Augment(**colour, rotation=0.0, gamma=0.0, flip_horizontal=0.5)
        for name, peer, strengths in (
            ("torchvision v2", torchvision, default),
            ("torchvision v2", torchvision, simclr),
            ("lightly SimCLR", lightly, simclr),
        ):
            mine, theirs = ours(pixels, strengths, size), peer(few, strengths, size, channels)
            mine(), theirs()
            pairs = [(count / cpu_seconds(mine), len(few) / cpu_seconds(theirs)) for _ in range(rounds)]
            fast, slow = (statistics.median(column) for column in zip(*pairs, strict=True))
            ratio = statistics.median(a / b for a, b in pairs)
            kind = "default" if strengths is default else "SimCLR"
            print(f"| {size} | {channels} | {kind} | {fast:,.0f} | {name} | {slow:,.0f} | {ratio:.1f} x |", flush=True)


if __name__ == "__main__":
    main()
