"""Fine-tunes of several folds at once against one after the other: seconds of both, and that they do the same.

    python bench/finetune.py [--folds 5] [--steps 20] [--device cpu]

At once: the folds' parameters are stacked and the step is mapped over them (`torch.func.vmap`), which turns each
convolution into one of as many groups. CPU seconds of this process on a CPU; on a GPU seconds with synchronisation.
"""

from __future__ import annotations

import argparse
import copy
import time

import timm
import torch
from torch.func import functional_call, grad_and_value, stack_module_state, vmap
from torch.nn import functional

CASES = (
    ("resnet18", {"channels": [16, 32, 64, 128]}, 32, 32),
    ("resnet18", {}, 32, 64),
    ("test_convnext", {}, 32, 32),
    ("vit_tiny_patch16_224", {"img_size": 64, "patch_size": 8}, 32, 64),
)
"""Name, arguments of timm, batch, pixels."""


def seconds(work, device, *arguments):
    clock = time.process_time if device == "cpu" else time.perf_counter
    if device != "cpu":
        torch.cuda.synchronize()
    start = clock()
    result = work(*arguments)
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - start, result


def one_by_one(models, images, labels, steps):
    """Plain SGD, fold after fold."""
    last = []
    for fold, model in enumerate(models):
        for step in range(steps):
            loss = functional.cross_entropy(model(images[step, fold]), labels[step, fold])
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            with torch.no_grad():
                for p, g in zip(model.parameters(), gradients, strict=True):
                    p -= 0.01 * g
        last.append(loss.detach())
    return torch.stack(last)


def at_once(models, images, labels, steps):
    """The same steps, mapped over the folds."""
    shell = copy.deepcopy(models[0]).to("meta")
    parameters, buffers = stack_module_state(models)

    def loss_of(parameters, buffers, image, label):
        return functional.cross_entropy(functional_call(shell, (parameters, buffers), (image,)), label)

    step_of = vmap(grad_and_value(loss_of), randomness="different")
    for step in range(steps):
        gradients, losses = step_of(parameters, buffers, images[step], labels[step])
        with torch.no_grad():
            parameters = {name: p - 0.01 * gradients[name] for name, p in parameters.items()}
    return losses.detach()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    folds, steps, device = options.folds, options.steps, options.device
    print(f"{folds} folds, {steps} steps, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print("| model | pixels | one by one, s | at once, s | speed-up | greatest difference of the last loss |")
    print("|---" * 6 + "|")
    for name, args, batch, pixels in CASES:
        torch.manual_seed(0)
        models = [timm.create_model(name, num_classes=4, **args).to(device).train() for _ in range(folds)]
        images = torch.randn(steps, folds, batch, 3, pixels, pixels, device=device)
        labels = torch.randint(4, (steps, folds, batch), device=device)
        for work in (one_by_one, at_once):  # warm up
            work(copy.deepcopy(models), images, labels, 1)
        single, a = seconds(one_by_one, device, copy.deepcopy(models), images, labels, steps)
        together, b = seconds(at_once, device, copy.deepcopy(models), images, labels, steps)
        figures = f"{single:.2f} | {together:.2f} | {single / together:.2f} | {(a - b).abs().max():.1e}"
        print(f"| {name} {args or ''} | {pixels} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
