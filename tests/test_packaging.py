"""What is installed: the wheel's contents, trees without symlinks, cheap imports, the public names."""

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("patterns", "kernels", "lowering")
SOURCES = ("graphopt", *ROOMS, "pyproject.toml", "README.md", "LICENSE")


def copy_sources(target: Path) -> Path:
    """The files that a build reads, with their symlinks, in a new folder."""
    target.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, target / name, symlinks=True, ignore=ignore)
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, target / name)
    return target


def python(code: str, cwd: Path, path: Path | None = None) -> str:
    """What a fresh interpreter prints for `code` in `cwd`, `path` first; an error in it fails the test."""
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(path or "")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built offline from a copy of the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    source = copy_sources(folder / "source")
    offline = ["--no-deps", "--no-build-isolation", "--no-index"]
    command = [sys.executable, "-m", "pip", "wheel", *offline, "-w", folder, source]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def installed(wheel: Path) -> Path:
    """A folder that holds the unpacked wheel, as site-packages would."""
    folder = wheel.parent / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_wheel_owns_one_name(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"graphopt"}
    assert wheel.name.endswith("-py3-none-any.whl")


def test_wheel_holds_every_source(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {n for n in archive.namelist() if n.endswith(".py")}
    own = [p for p in (ROOT / "graphopt").rglob("*.py") if not any(q.is_symlink() for q in p.parents)]
    expected = {p.relative_to(ROOT).as_posix() for p in own}
    expected |= {
        f"graphopt/{p.relative_to(ROOT).as_posix()}" for room in ROOMS for p in (ROOT / room).rglob("*.py")
    }
    assert packed == expected


def test_wheel_names_backend_and_command(installed: Path) -> None:
    (info,) = installed.glob("*.dist-info")
    points = {(p.group, p.name): p.value for p in PathDistribution(info).entry_points}
    assert points == {
        ("torch_dynamo_backends", "graphopt"): "graphopt.backend:graphopt",
        ("console_scripts", "graphopt"): "graphopt.tools.cli:app",
    }


def test_dynamo_lists_an_installed_graphopt(installed: Path, tmp_path: Path) -> None:
    code = "import torch._dynamo as d; print('graphopt' in d.list_backends())"
    assert python(code, tmp_path, installed) == "True"


def test_dynamo_loads_an_installed_backend(installed: Path, tmp_path: Path) -> None:
    code = "import sys, torch._dynamo as d; print(callable(d.lookup_backend('graphopt')))\n"
    code += "print(sys.modules['graphopt.backend'].__file__)"
    assert python(code, tmp_path, installed).split() == ["True", f"{installed}/graphopt/backend.py"]


def test_requirements_leave_transformers_out(installed: Path) -> None:
    (info,) = installed.glob("*.dist-info")
    required = [r for r in PathDistribution(info).requires or [] if "extra ==" not in r]
    names = {r.split(">")[0].strip() for r in required}
    assert names == {
        "torch",
        "triton",
        "networkx",
        "safetensors",
        "typer",
        "rich",
        "platformdirs",
        "filelock",
    }


@pytest.mark.parametrize("links", ["absent", "text"])
def test_tree_without_symlinks_works(links: str, tmp_path: Path) -> None:
    """Some archives drop symlinks, some turn them into text files that hold the target."""
    tree = copy_sources(tmp_path / "tree")
    for room in ROOMS:
        link = tree / "graphopt" / room
        target = os.readlink(link)
        link.unlink()
        if links == "text":
            link.write_text(target)
        (tree / room / "marker_of_this_tree.py").write_text('"""A module."""\n')
    code = "; ".join(f"import graphopt.{r}.marker_of_this_tree as {r}; print({r}.__file__)" for r in ROOMS)
    files = python(code, tmp_path, tree).splitlines()
    assert files == [str(tree / room / "marker_of_this_tree.py") for room in ROOMS]


def test_bridge_is_off_where_symlinks_are(installed: Path, tmp_path: Path) -> None:
    code = "import graphopt; print(*graphopt.__path__)"
    assert python(code, tmp_path, installed) == str(installed / "graphopt")
    assert python(code, ROOT, ROOT) == str(ROOT / "graphopt")


def test_transformers_imports_from_the_root() -> None:
    """transformers imports a package called `kernels` if there is one; our folder must not pass for it."""
    pytest.importorskip("transformers")
    code = "from transformers import LlamaForCausalLM; import graphopt; print('fine')"
    assert python(code, ROOT, ROOT) == "fine"


def test_a_real_package_wins_over_a_room(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("whose = 'theirs'\n")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import kernels; print(kernels.whose)"
    assert python(code, ROOT, ROOT) == "theirs"


def test_import_is_cheap() -> None:
    heavy = {"transformers", "triton", "torch._dynamo", "rich", "typer"}
    code = (
        f"import sys, torch; own = set(sys.modules); import graphopt; print({heavy} & set(sys.modules) - own)"
    )
    assert python(code, ROOT, ROOT) == "set()"


@pytest.mark.parametrize(
    "order", ["import graphopt", "import graphopt.capture", "from graphopt.capture import Captured"]
)
def test_capture_is_the_function(order: str) -> None:
    """The submodule of the same name may be imported before or after; the public name stays the function."""
    code = (
        f"{order}\nimport graphopt\nfrom graphopt.capture import Captured, capture\nimport graphopt.capture\n"
    )
    code += "assert graphopt.capture is capture and callable(capture)\nprint(Captured.__module__)"
    assert python(code, ROOT, ROOT) == "graphopt.capture"


def test_public_names_resolve() -> None:
    """Each name of `__all__` is there, and is what its home calls so, whatever was imported before it."""
    import graphopt

    missing = {}
    for name in graphopt.__all__:
        try:
            value = getattr(graphopt, name)
        except (ImportError, AttributeError) as error:
            missing[name] = error
            continue
        assert name in ("errors", "ops", "passes") or callable(value), f"graphopt.{name} is {value!r}"
    assert not missing
    assert set(graphopt.__all__) <= set(dir(graphopt))
    with pytest.raises(AttributeError, match="has no attribute 'optimise'"):
        graphopt.optimise  # noqa: B018  # the misspelling is the test
