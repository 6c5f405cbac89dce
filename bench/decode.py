"""Images a second, one core: file -> square of the encoder's size. Ours beside Pillow's and torchvision's usual lines.

    python bench/decode.py FOLDER [--size 64]

FOLDER holds PNG and JPEG files. Ours does more: it finds the format, checks bounds and damage, turns by EXIF, finds
grey and blank pictures, keeps the aspect, pads, and hashes the pixels. The last line is the whole store: hashing the
files, decoder processes on all cores, writing.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torchvision.io
from PIL import Image
from torchvision.transforms import v2

from kladi.config import Intensity
from kladi.data.decoded import store
from kladi.data.decoded.decoder import digest_of
from kladi.data.pixels import decode
from kladi.data.pixels.intensity import fit, store_side


def rate(work: Callable[[Path], object], paths: list[Path]) -> float:
    work(paths[0])
    start = time.process_time()
    for path in paths:
        work(path)
    return len(paths) / (time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, default=64)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    paths = sorted(p for p in arguments.folder.rglob("*") if p.suffix.lower() in {".png", ".jpg", ".jpeg"})
    pipeline = Intensity(size=arguments.size)
    side = store_side(arguments.size)

    def ours(path: Path) -> object:
        found = decode.decode(path, -1, pipeline)
        return fit(found.pixels, side), digest_of(found.pixels)

    def pillow(path: Path) -> object:
        with Image.open(path) as image:
            return np.asarray(image.convert("L").resize((side, side), Image.Resampling.BILINEAR))

    def vision(path: Path) -> object:
        image = torchvision.io.read_image(str(path), torchvision.io.ImageReadMode.GRAY)
        return v2.functional.resize(image, [side, side], antialias=True)

    print(f"{'what':<28}{'PNG':>10}{'JPEG':>10}   images a second on one core, size {arguments.size}")
    groups = [[p for p in paths if (p.suffix.lower() == ".png") == png] for png in (True, False)]
    for name, work in (("kladi decode + fit", ours), ("Pillow open, L, resize", pillow), ("torchvision", vision)):
        cells = [f"{rate(work, group):10.0f}" if group else f"{'-':>10}" for group in groups]
        print(f"{name:<28}{''.join(cells)}")
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        store.build(paths, [-1] * len(paths), pipeline, folder)
        print(f"{'store.build, all cores':<28}{len(paths) / (time.perf_counter() - start):10.0f} of both kinds")


if __name__ == "__main__":
    main()
