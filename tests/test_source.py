"""The calls that the source may never make, found in its syntax tree; and the finder itself, on planted offences."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "kladi"

# Pattern -> files in which it is allowed. A pattern that ends in a dot forbids everything below that name.
NOWHERE: frozenset[str] = frozenset()
CALLS: dict[str, frozenset[str] | set[str]] = {
    # code from data
    **dict.fromkeys(["eval", "exec", "compile", "__import__"], NOWHERE),
    **dict.fromkeys(
        ["pickle.", "cPickle.", "dill.", "cloudpickle.", "marshal.", "shelve.", "yaml.", "joblib.load"], NOWHERE
    ),
    **dict.fromkeys(["torch.load", "torch.save", "torch.jit.load", "torch.hub.", "logging.config."], NOWHERE),
    "importlib.import_module": {"learn/objectives.py", "learn/presets.py", "learn/plugin.py"},
    # network
    "load_state_dict_from_url": NOWHERE,
    # shell, archives
    **dict.fromkeys(["os.system", "os.popen", "tempfile.mktemp"], NOWHERE),
    # silence and hidden state
    **dict.fromkeys(["random.", "locale.setlocale", "os.putenv"], NOWHERE),
    "torch.manual_seed": {
        "learn/fit.py",
        "learn/gradient_cache.py",
        "evaluate/readouts/finetune.py",
        "evaluate/readouts/published.py",
    },
    "print": {"cli.py", "demo.py"},
    # guards off
    **dict.fromkeys(["Markup", "FileSet", "read_dicomdir"], NOWHERE),
}
IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "yaml", "random"}
IMPORTS |= {
    "socket",
    "http",
    "urllib",
    "requests",
    "httpx",
    "aiohttp",
    "ftplib",
    "smtplib",
    "huggingface_hub",
    "webbrowser",
}
LEGACY_RANDOM = {"seed", "rand", "randn", "randint", "random", "shuffle", "permutation", "choice", "normal", "uniform"}


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def keyword(call: ast.Call, name: str) -> object:
    return next((getattr(k.value, "value", ...) for k in call.keywords if k.arg == name), None)


def offences(code: str, file: str) -> list[str]:
    """Each forbidden thing in `code`, as "line: what"."""
    found = []
    for node in ast.walk(ast.parse(code)):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Call):
            found += [f"{line}: {what}" for what in call_offences(node, file)]
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found += [f"{line}: import {name}" for name in names if name.split(".")[0] in IMPORTS]
        elif isinstance(node, ast.ExceptHandler):
            silent = all(isinstance(s, ast.Pass | ast.Continue) for s in node.body)
            broad = node.type is None or dotted(node.type) in {"Exception", "BaseException"}
            if node.type is None or (broad and silent):
                found.append(f"{line}: an exception is swallowed")
        elif isinstance(node, ast.Assert):
            found.append(f"{line}: assert guards nothing under python -O")
        elif isinstance(node, ast.Attribute) and node.attr == "innerHTML":
            found.append(f"{line}: innerHTML")
        elif isinstance(node, ast.Assign):
            targets = {dotted(t).split(".")[-1] for t in node.targets}
            if targets & {"MAX_IMAGE_PIXELS", "LOAD_TRUNCATED_IMAGES"}:
                found.append(f"{line}: a guard of Pillow is switched off")
    return found


def call_offences(call: ast.Call, file: str) -> list[str]:
    name, found = dotted(call.func), []
    for pattern, allowed in CALLS.items():
        hit = name.startswith(pattern) if pattern.endswith(".") else name == pattern or name.endswith(f".{pattern}")
        if pattern in {"eval", "exec", "compile", "print"}:
            hit = name == pattern  # model.eval() and re.compile() are other things
        if hit and file not in allowed:
            found.append(name)
    if name in {"np.load", "numpy.load"} and keyword(call, "allow_pickle") is not False:
        found.append("np.load without allow_pickle=False")
    if name.startswith(("np.random.", "numpy.random.")) and name.split(".")[-1] in LEGACY_RANDOM:
        found.append(name)
    if keyword(call, "shell") is True or keyword(call, "pretrained") is True or keyword(call, "weights_only") is False:
        found.append("shell=True, pretrained=True or weights_only=False")
    if name.endswith("dcmread") and keyword(call, "force") is True and not file.startswith("data/pixels/dicom"):
        found.append("dcmread(force=True)")
    if name.endswith("Environment") and keyword(call, "autoescape") is not True:
        found.append("jinja2 without autoescape")
    if (
        name.endswith(("filterwarnings", "simplefilter"))
        and any(getattr(a, "value", None) == "ignore" for a in call.args)
        and len(call.args) + len(call.keywords) == 1
    ):
        found.append("every warning is ignored")
    if name.endswith(("extractall", "load_state_dict_from_url")):
        found.append(name)
    if keyword(call, "include_plotlyjs") == "cdn":
        found.append("plotly from the network")
    return found


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE)))
def test_source_makes_no_forbidden_call(path):
    assert offences(path.read_text(), path.relative_to(SOURCE).as_posix()) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle\npickle.loads(b'')",
        "torch.load('x')",
        "np.load('x')",
        "np.load('x', allow_pickle=True)",
        "np.random.seed(0)",
        "random.random()",
        "subprocess.run('x', shell=True)",
        "try:\n    f()\nexcept:\n    g()",
        "try:\n    f()\nexcept Exception:\n    pass",
        "assert x",
        "print(1)",
        "warnings.filterwarnings('ignore')",
        "timm.create_model('x', pretrained=True)",
        "Image.MAX_IMAGE_PIXELS = None",
        "jinja2.Environment()",
        "import urllib.request",
        "from requests import get",
        "tar.extractall()",
        "eval('1')",
        "torch.manual_seed(1)",
    ],
)
def test_the_finder_finds(code):
    assert offences(code, "data/somewhere.py")


@pytest.mark.parametrize(
    "code",
    ["model.eval()", "re.compile('x')", "np.load('x', allow_pickle=False)", "np.random.default_rng(0)", "rng.normal()"],
)
def test_the_finder_lets_pass(code):
    assert offences(code, "data/somewhere.py") == []
