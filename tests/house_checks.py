"""What the house's rules ask of a source file, read off it by `ast`: tests/test_house.py runs them."""

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("patterns", "kernels", "lowering")
FOLDERS = ("graphopt", *ROOMS, "tests", "bench")
SHIPPED = ("graphopt", *ROOMS)

# A file imports from its own row or those before it. FACADES: the files of `graphopt/` that are not core.
ORDER = ("core", "ops", "rooms", "defaults", "doors", "tools", "outside")
FACADES = {
    "graphopt.defaults": "defaults",
    "graphopt": "doors",
    "graphopt.api": "doors",
    "graphopt.artifact": "doors",
    "graphopt.backend": "doors",
    "graphopt.live": "doors",
}
# `import graphopt` offers everything by name, the tools too; only its users import it.
PACKAGE = "graphopt"

PRIVATE_TORCH = re.compile(r"torch\.(\w+\.)*(_[a-z]\w*|fx\.experimental)\b")
# Documented by PyTorch in spite of its underscore, or without another way to say it.
PRIVATE_ALLOWED = re.compile(r"torch\._check\w*|torch\.ops\..*")
PRIVATE_ALLOWED_IN = {"graphopt.graph": re.compile(r"torch\._ops\.OpOverload")}
PRIVATE_HOME = "graphopt.torch_private"

MODEL_NAMES = re.compile(
    r"llama|qwen|gemma|gpt|bert|mistral|mixtral|bloom|falcon|phi\d|neox|whisper|deepseek|granite|cohere|olmo"
    r"|stablelm|starcoder|codegen|smollm|electra|mpnet|siglip|dinov|wav2vec|mamba|xlnet|xglm|pegasus|funnel"
    r"|longformer|jamba|ernie|nemotron|hunyuan|inkling|roformer"
    r"|(?<![a-z])(?:t5|opt|glm|mpt|vit|clip|bart|led|dbrx|beam)(?![a-z])",
    re.IGNORECASE,
)
# Who may know a model's name: the zoo, the builder of examples, the demo, and the command line's help.
BUILDERS = tuple(f"graphopt.tools.{name}" for name in ("zoo", "models", "demo", "cli"))
# Who may look at a module's path: what answers users' questions and shows graphs.
PATH_READERS = ("graphopt.tools", "graphopt.question", "graphopt.journal", "graphopt.listing")
HUGGING_FACE = ("transformers", "sentence_transformers", "accelerate")

Check = Callable[[ast.Module, str], list[str]]


# ------------------------------------------------------------------------------------------------ reading


def sources(*folders: str) -> list[Path]:
    """Every Python file under the folders, found through no symlink."""
    found = [p for folder in folders for p in sorted((ROOT / folder).rglob("*.py"))]
    return [p for p in found if not any(q.is_symlink() for q in p.parents)]


def module_name(path: Path) -> str:
    """The name a file is imported by: `kernels/rms_norm.py` -> `graphopt.kernels.rms_norm`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("graphopt", *parts) if parts[0] in ROOMS else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def all_modules() -> set[str]:
    """The names of the files in the repository, and of the packages that hold them."""
    names = {module_name(p) for p in sources(*FOLDERS)} | {f"graphopt.{room}" for room in ROOMS}
    return names | {f"graphopt.{p.name}" for p in (ROOT / "graphopt").iterdir() if p.is_dir()}


def is_type_checking(node: ast.AST) -> bool:
    """Whether a statement is `if TYPE_CHECKING:`, whose imports never run."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def running(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below one, without what stands under `if TYPE_CHECKING:`."""
    for child in ast.iter_child_nodes(node):
        yield child
        if is_type_checking(child):
            for other in child.orelse:  # type: ignore[attr-defined]  # an ast.If
                yield other
                yield from running(other)
        else:
            yield from running(child)


def imports(tree: ast.Module, name: str, types: bool = False) -> Iterator[tuple[str, str]]:
    """(local name, dotted name) of what a module imports; with `types` also what only type checkers see."""
    for node in ast.walk(tree) if types else running(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.asname or alias.name.partition(".")[0], alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if (
                node.level
            ):  # the package that the dots stand for: a module's own package, or itself for an __init__
                parts = name.split(".") if is_package(name) else name.split(".")[:-1]
                base = ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [node.module])])
            for alias in node.names:
                yield alias.asname or alias.name, f"{base}.{alias.name}"


def is_package(name: str) -> bool:
    """Whether a module name is a package with an `__init__.py`."""
    return (ROOT / Path(*name.split(".")) / "__init__.py").exists()


def chains(tree: ast.Module, name: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every imported name and of every whole attribute chain that starts at one."""
    known = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for local, dotted in imports(ast.Module([node], []), name, types=True):
                bound = (
                    dotted if isinstance(node, ast.ImportFrom) or local != dotted.partition(".")[0] else local
                )
                known[local] = bound
                yield node.lineno, dotted
    inner = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    for node in ast.walk(tree):
        if id(node) in inner:
            continue
        parts: list[str] = []
        at: ast.AST = node
        while isinstance(at, ast.Attribute):
            parts, at = [at.attr, *parts], at.value
        if parts and isinstance(at, ast.Name) and at.id in known:
            yield node.lineno, ".".join([known[at.id], *parts])  # type: ignore[attr-defined]  # an expression


# ------------------------------------------------------------------------------------------------- checks


def layer(name: str) -> str:
    """The row of ORDER in which a module of the repository stands."""
    if name in FACADES:
        return FACADES[name]
    head, _, rest = name.partition(".")
    if head != "graphopt":
        return "outside"
    folder = rest.partition(".")[0]
    return {
        "passes": "rooms",
        "sharding": "rooms",
        "ops": "ops",
        "tools": "tools",
        **dict.fromkeys(ROOMS, "rooms"),
    }.get(folder, "core")


def room(name: str) -> str | None:
    """The room in which a module stands, if it does."""
    folder = name.split(".")[1] if name.startswith("graphopt.") else None
    return folder if folder in ROOMS else None


def wrong_arrows(tree: ast.Module, name: str) -> list[str]:
    """Imports that point up the order, or from one room into another."""
    if name == PACKAGE:
        return []
    modules = all_modules()
    wrong = []
    for _, dotted in imports(tree, name):
        if dotted.split(".")[0] not in ("graphopt", "tests", "bench", *ROOMS):
            continue
        if dotted.split(".")[0] in ROOMS:
            wrong.append(f"{name} imports {dotted}; rooms are imported as graphopt.{dotted}")
            continue
        target = dotted if dotted in modules else dotted.rpartition(".")[0] or dotted
        if ORDER.index(layer(target)) > ORDER.index(layer(name)):
            wrong.append(f"{name} ({layer(name)}) imports {dotted} ({layer(target)})")
        if room(name) and room(target) and room(name) != room(target):
            wrong.append(f"{name} imports {dotted}: rooms meet at op names only")
    return wrong


def hugging_face_imports(tree: ast.Module, name: str) -> list[str]:
    """Imports of Hugging Face packages outside the command-line tools."""
    if name.startswith("graphopt.tools"):
        return []
    return [
        f"{name} imports {d}" for _, d in imports(tree, name, types=True) if d.split(".")[0] in HUGGING_FACE
    ]


def private_torch(tree: ast.Module, name: str) -> list[str]:
    """Uses of PyTorch's private parts; they belong into graphopt/torch_private."""
    if name == PRIVATE_HOME or name.startswith(f"{PRIVATE_HOME}."):
        return []
    allowed = PRIVATE_ALLOWED_IN.get(name)
    wrong: dict[tuple[int, str], str] = {}
    for line, dotted in chains(tree, name):
        found = PRIVATE_TORCH.match(dotted)
        if not found or PRIVATE_ALLOWED.match(dotted) or (allowed and allowed.match(dotted)):
            continue
        wrong[line, found.group()] = f"{name}:{line} uses {dotted}; reach it through graphopt/torch_private"
    return list(wrong.values())


def prints(tree: ast.Module, name: str) -> list[str]:
    """Calls of print outside the command-line tools."""
    if name.startswith("graphopt.tools"):
        return []
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    return [f"{name}:{n.lineno} prints" for n in calls if n.func.id == "print"]  # type: ignore[attr-defined]  # a Name


def model_names(tree: ast.Module, name: str) -> list[str]:
    """Identifiers and strings that name a model; docstrings and comments may say where a spelling is from.

    A pattern's function may be called by who writes it so; what builds models for users has to know them.
    """
    if name.startswith(BUILDERS):
        return []
    fields = () if name.startswith("graphopt.patterns") else ("id", "attr", "name", "arg")
    docstrings = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
    wrong = []
    for node in ast.walk(tree):
        words = [v for v in (getattr(node, field, None) for field in fields) if isinstance(v, str)]
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            words.append(node.value)
        wrong += [
            f"{name}:{getattr(node, 'lineno', '?')} names {w!r}" for w in words if MODEL_NAMES.search(w)
        ]
    return wrong


def module_paths(tree: ast.Module, name: str) -> list[str]:
    """Decisions by a module's path: data flow decides; paths are for reports and for what users name."""
    if name.startswith(PATH_READERS):
        return []
    wrong = []
    for node in ast.walk(tree):
        decides = node if isinstance(node, ast.Compare) else getattr(node, "test", None)
        for part in ast.walk(decides) if isinstance(decides, ast.AST) else ():
            called = part.func if isinstance(part, ast.Call) else None
            asks = getattr(called, "attr", getattr(called, "id", "")) == "module_path"
            reads = isinstance(part, ast.Subscript) and isinstance(part.slice, ast.Constant)
            if asks or (reads and part.slice.value == "module_path"):  # type: ignore[union-attr]  # a constant
                wrong.append(f"{name}:{part.lineno} decides by the module path")
    return wrong


def class_names(tree: ast.Module, name: str) -> list[str]:
    """Compares of a module's class by name: `type(m).__name__ == "..."`, `m.__class__.__name__ in (...)`."""
    if name.startswith(BUILDERS):
        return []
    wrong = []
    for compare in (n for n in ast.walk(tree) if isinstance(n, ast.Compare)):
        for part in ast.walk(compare):
            if not isinstance(part, ast.Attribute) or part.attr not in ("__name__", "__qualname__"):
                continue
            of = part.value
            called = isinstance(of, ast.Call) and isinstance(of.func, ast.Name) and of.func.id == "type"
            if called or (isinstance(of, ast.Attribute) and of.attr == "__class__"):
                wrong.append(f"{name}:{part.lineno} decides by a class's name")
    return wrong


def abstract_values(tree: ast.Module, name: str) -> list[str]:
    """`node.meta["val"]` or `node.meta.get("val")` outside graphopt/graph.py."""
    if name == "graphopt.graph":
        return []
    wrong = []
    for node in ast.walk(tree):
        holder, key = None, None
        if isinstance(node, ast.Subscript):
            holder, key = node.value, node.slice
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
            holder, key = node.func.value, node.args[0]
        reads_meta = isinstance(holder, ast.Attribute) and holder.attr == "meta"
        if reads_meta and isinstance(key, ast.Constant) and key.value == "val":
            wrong.append(f"{name}:{key.lineno} reads meta['val']; use graphopt.graph.val or .set_val")
    return wrong


def first_line(tree: ast.Module, name: str) -> list[str]:
    """A file whose first line is not the start of a docstring sentence that says what it is."""
    text = ast.get_docstring(tree)
    if not text or tree.body[0].lineno != 1:
        return [f"{name} does not begin with a docstring; say in one sentence what the file is"]
    sentence = text.split("\n\n")[0].rstrip()
    return [] if sentence.endswith((".", ":", "?")) else [f"{name}: {sentence!r} is not a sentence"]
