"""The command line: a verb, DATA, and `--dotted.key value`. It parses, calls `kladi.commands`, and words mistakes.

Nothing heavy is imported here, so that `--help` and a misspelt key are answered at once. Messages go to stderr, results
to stdout. Exit codes: 0 done; 1 the data cannot be trained on, or the run stopped for an outside cause; 2 a mistake in
arguments, configuration, manifest or taxonomy; 130 and 143 stopped by INT and TERM after saving.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import cyclopts
from cyclopts import App, Parameter

from kladi import __version__
from kladi.errors import RunStopped, UserError, suggestion

app = App(
    name="kladi",
    help="Pretrain image encoders with the structure medical data already carries, and measure what it bought.\n\n"
    "Start with: kladi check FOLDER",
    version=__version__,
    help_format="plaintext",
    suppress_keyboard_interrupt=False,  # `main` says that it stopped
)

Data = Annotated[
    Path, Parameter(help="A manifest (.csv, .tsv, .parquet), a folder of images, or a folder of DICOM files.")
]
Run = Annotated[Path, Parameter(help="A run folder that `kladi pretrain` wrote.")]
Taxonomy = Annotated[Path | None, Parameter(help="Label tree: .csv, .tsv, .json, .nwk or .obo.")]
ConfigFile = Annotated[Path | None, Parameter(help="A plan that `kladi plan` wrote; edit it freely.")]
Overrides = Annotated[
    str,
    Parameter(
        help="Any key of the plan, as --section.key value; kladi list keys names them.",
        allow_leading_hyphen=True,
        negative=(),
    ),
]


Switch = Annotated[bool, Parameter(negative=())]


@app.command
def check(
    data: Data, /, *overrides: Overrides, taxonomy: Taxonomy = None, config: ConfigFile = None, out: Path | None = None
) -> int:
    """What is wrong with this data, all of it at once. Example: kladi check scans/manifest.csv --taxonomy tree.csv

    Answers 1 when the data cannot be trained on.

    Parameters
    ----------
    out:
        Also write every problem with its rows to this CSV file.
    """
    from kladi import commands

    return commands.check(data, _settings(overrides, config, taxonomy), out)


@app.command
def plan(
    data: Data,
    /,
    *overrides: Overrides,
    out: Path = Path("plan.toml"),
    taxonomy: Taxonomy = None,
    config: ConfigFile = None,
    smoke: bool = True,
) -> int:
    """Choose every setting from the data, with a reason each. Example: kladi plan scans/ --out plan.toml

    Parameters
    ----------
    out:
        Where the plan goes. A key that you changed in an earlier plan stays changed: pass that plan as --config.
    smoke:
        Prove the plan by 20 training steps before hours are spent.
    """
    from kladi import commands

    return commands.plan(data, out, config, _overrides(overrides, taxonomy), smoke=smoke)


@app.command
def pretrain(
    data: Data,
    /,
    *overrides: Overrides,
    out: Path,
    config: ConfigFile = None,
    taxonomy: Taxonomy = None,
    resume: Switch = False,
    force_unlock: Switch = False,
    dry_run: Switch = False,
) -> int:
    """Train an encoder. Example: kladi pretrain scans/ --config plan.toml --out runs/a

    Parameters
    ----------
    out:
        The run folder; it must be new or empty unless --resume is given.
    resume:
        Go on where the run in --out stopped: same data, same settings, same bits.
    force_unlock:
        Take over a run folder whose lock belongs to a machine that is gone.
    dry_run:
        Say what would be done, and write nothing.
    """
    from kladi import commands

    settings = _settings(overrides, config, taxonomy)
    return commands.pretrain(data, settings, out, resume=resume, force_unlock=force_unlock, dry_run=dry_run)


@app.command
def embed(run: Run, data: Data, /, *overrides: Overrides, out: Path, taxonomy: Taxonomy = None) -> int:
    """Write embeddings.npz, one row an image. Example: kladi embed runs/a scans/ --out embeddings/

    Parameters
    ----------
    out:
        Folder for embeddings.npz.
    """
    from kladi import commands

    return commands.embed(run, data, out, _overrides(overrides, taxonomy))


@app.command
def evaluate(run: Run, data: Data, /, *overrides: Overrides, out: Path, taxonomy: Taxonomy = None) -> int:
    """Measure an encoder against its controls. Example: kladi evaluate runs/a scans/ --out runs/a/eval

    Linear probe, nearest neighbours, retrieval, prototypes and the metrics of the label tree go to results.json, and
    report.html shows them.

    Parameters
    ----------
    out:
        Folder for results.json, results.csv, embeddings.npz and report.html.
    """
    from kladi import commands

    return commands.evaluate(run, data, out, _overrides(overrides, taxonomy))


@app.command
def export(run: Run, /, *, out: Path, format: str = "timm") -> int:  # noqa: A002  the word that users type
    """Write the encoder for somebody who has no kladi. Example: kladi export runs/a --format onnx --out exported/

    Parameters
    ----------
    out:
        A new folder: the network, config.json with its intensity pipeline, and two images with their features.
    format:
        timm, torchvision or onnx.
    """
    from kladi import commands

    return commands.export(run, out, format)


@app.command
def compare(study: Path, /, *, out: Path, workers: int = 1, force_unlock: Switch = False) -> int:
    """Compare initialisations under one protocol. Example: kladi compare study.toml --out studies/a

    Runs what is missing, so that a killed study goes on with the same command.

    Parameters
    ----------
    study:
        A TOML file of methods, tasks, regimes, folds and controls; docs/study.md has one to start from.
    out:
        Folder of runs, cells, results.json and report.html.
    workers:
        Processes that train and measure side by side.
    force_unlock:
        Take over a folder whose lock belongs to a machine that is gone.
    """
    from kladi import commands

    return commands.compare(study, out, workers=workers, force_unlock=force_unlock)


@app.command
def factors(
    *tables: Path,
    out: Path,
    ranks: str = "auto",
    key: str = "",
    leave_out: str = "",
    levels: str = "",
    outcome: str = "",
    resamples: int = 20,
    seed: int = 0,
) -> int:
    """Factors that tables of the same patients share, partly share, or have alone.

    Example: kladi factors rna.csv protein.csv clinic.csv --out factors/

    Parameters
    ----------
    tables:
        .csv, .tsv or .parquet, a row a patient, joined by patient id; or embeddings.npz, with --key row.
    out:
        Folder for factors.json, factors.csv and report.html.
    ranks:
        Factors of every set of tables, or of each: 0+1+2=3,0+1=2 (tables by their number, from 0); auto: from the data.
    key:
        Column of patient ids in every table; found by its name unless given; row: by the number of the row.
    leave_out:
        Columns that are not used, with commas between.
    levels:
        Columns of text that become one column a value, with commas between.
    outcome:
        A column of one table that factors are asked about: numbers, or two words.
    resamples:
        Halves of the patients that are fitted beside all of them.
    seed:
        Of halves, and of the ranks.
    """
    from kladi import commands

    asked = [[name for name in text.split(",") if name] for text in (leave_out, levels)]
    return commands.factors(list(tables), out, ranks, key, asked[0], asked[1], outcome, resamples, seed)


@app.command
def report(path: Path, /, *, out: Path | None = None) -> int:
    """Draw report.html again from results.json alone. Example: kladi report runs/a/eval

    Parameters
    ----------
    path:
        results.json, or the folder that holds it.
    out:
        Where the page goes; beside results.json unless given.
    """
    from kladi import commands

    return commands.report(path, out)


@app.command(name="list")
def list_(what: str = "", pattern: str = "*", /) -> int:
    """Name what there is. Example: kladi list objectives; kladi list backbones "resnet*"

    Parameters
    ----------
    what:
        objectives, backbones, metrics or keys.
    pattern:
        Only names that match.
    """
    from kladi import commands

    return commands.list_names(what, pattern)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit code, and words every mistake in one line on stderr."""
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in tokens
    tokens = [t for t in tokens if t != "--debug"]
    if debug:
        return _called(tokens)
    try:
        return _called(tokens)
    except cyclopts.CycloptsError as error:
        return _said(_worded(error), 2)
    except UserError as error:
        return _said(str(error), 2)
    except RunStopped as error:
        return _said(str(error), 1)
    except BrokenPipeError:
        sys.stderr.close()  # `kladi ... | head`: the reader has had enough, which is no mistake
        return 0
    except KeyboardInterrupt:
        return _said("stopped", 130)
    except Exception as error:  # noqa: BLE001  the last fence: a fault of ours, worded, never a traceback
        if isinstance(error, OSError) and error.filename:  # a folder that cannot be made, a disk that is full
            return _said(f"{error.filename2 or error.filename}: {error.strerror}; --debug shows where", 1)
        return _said(f"a fault of kladi's own ({type(error).__name__}: {error}); --debug shows where", 1)


def _called(tokens: list[str]) -> int:
    result = app(tokens, exit_on_error=False, print_error=False, result_action="return_value")
    return result if isinstance(result, int) else 0


def _said(message: str, code: int) -> int:
    from kladi.data.findings import visible

    if code == 2 and int(os.environ.get("LOCAL_RANK") or 0) > 0:
        return code  # one of several processes of a run: the first says it for all
    lines = [visible(line) for line in message.splitlines()] or [""]  # whatever a name or a file brought with it
    print("kladi: " + "\n       ".join(lines), file=sys.stderr)
    return code


def _worded(error: cyclopts.CycloptsError) -> str:
    verb = " ".join(error.command_chain or ())
    if isinstance(error, cyclopts.MissingArgumentError) and error.argument is not None:
        return f"{verb} needs {error.argument.name}; kladi {verb} --help shows an example"
    return " ".join(str(error).split())


def _settings(tokens: tuple[str, ...], file: Path | None, taxonomy: Path | None) -> Any:
    from kladi import config

    settings = config.read(file) if file else config.Config()
    return config.override(settings, _overrides(tokens, taxonomy))


def _overrides(tokens: tuple[str, ...], taxonomy: Path | None) -> dict[str, str]:
    """`--a.b value` and `--a.b=value` as {"a.b": "value"}; `--taxonomy T` is short for `--data.taxonomy T`."""
    from kladi import config

    values = {"data.taxonomy": str(taxonomy)} if taxonomy else {}
    rest = list(tokens)
    while rest:
        token = rest.pop(0)
        if not token.startswith("--"):
            raise UserError(f'"{token}" is one argument too many; a setting is written --section.key value')
        key, equals, value = token[2:].partition("=")
        if "." not in key:
            options = [
                *config.keys(),
                "out",
                "config",
                "taxonomy",
                "resume",
                "force-unlock",
                "dry-run",
                "smoke",
                "debug",
            ]
            options = [option for option in options if option != key]  # another command may have it
            raise UserError(
                f"--{key} is no option of this command" + suggestion(key, options).replace('"', "--", 1).rstrip('"')
            )
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"--{key} lacks its value")
            value = rest.pop(0)
        values[key] = value
    config.override(config.Config(), values)  # a misspelt key is said before any file is read
    return values


if __name__ == "__main__":
    raise SystemExit(main())
