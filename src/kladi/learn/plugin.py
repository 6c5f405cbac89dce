"""A loss from the user's own file: `--objective.name my_file:MyLoss`.

The file is run as Python, so its name must stand on the command line or in the user's own TOML. A checkpoint never
brings one: `kladi.load` builds encoders only.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from kladi.errors import UserError, suggestion


def loss(name: str, args: Mapping[str, Any], facts: Mapping[str, Any]) -> tuple[nn.Module, str]:
    """The loss, and the target it reads: "label" where its forward takes one, "" where it takes z alone.

    Args:
        name: `my_file:MyLoss`, the file relative to the working directory, with or without .py. A class attribute
            `target = "metadata"` makes it read label-set class ids.
        args: keyword arguments of the class.
        facts: further arguments that are passed if the class has a parameter of that name (`tax`, `dim`).

    Raises:
        UserError: no such file or class, an argument that the class does not take, or the class refuses.
    """
    file, _, class_name = name.rpartition(":")
    if not Path(file).name:
        raise UserError(f'--objective.name "{name}" is my_file:MyLoss without a file')
    kind = _class(Path(file).with_suffix(".py"), class_name)
    known = inspect.signature(kind).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in known.values()):
        for key in args:
            if key not in known:
                raise UserError(f"--objective.args.{key} is no argument of {class_name}" + suggestion(key, known))
    filled = {key: value for key, value in facts.items() if key in known and key not in args}
    try:
        made = kind(**filled, **args)
    except (TypeError, ValueError) as error:
        raise UserError(f"--objective.name {name}: {error}") from error
    takes = len(inspect.signature(made.forward).parameters)
    target = getattr(made, "target", "label" if takes > 1 else "")
    return made, str(target)


def term_name(name: str) -> str:
    """What the term is called in logs."""
    return name.rpartition(":")[2].lower()


def _class(file: Path, class_name: str) -> type[nn.Module]:
    if not file.is_file():
        raise UserError(f"--objective.name: there is no file {file}")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise UserError(f"--objective.name: {file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kinds = {n: k for n, k in vars(module).items() if inspect.isclass(k) and issubclass(k, nn.Module)}
    if class_name not in kinds:
        raise UserError(f'--objective.name: {file} has no module "{class_name}"' + suggestion(class_name, kinds))
    return kinds[class_name]
