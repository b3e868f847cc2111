"""Which module may import which, where side effects live, and which names are public."""

import ast
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CORE, WRAPPER = ROOT / "mixture_core", ROOT / "mixture_torch"

# From bottom to top: a module imports from lower rows only.
CORE_ROWS = [
    ("config", "pytrees", "inputs"),
    ("kernels",),
    ("moments",),
    ("grouped",),
    ("scatter", "stats"),
    ("assign",),
    ("step",),
    ("shares", "relocate"),
    ("__init__",),
    ("testing",),
]
COLLECTIVES = {
    "all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "all_to_all", "all_to_all_single",
    "barrier", "broadcast", "broadcast_object_list", "gather", "gather_object", "irecv", "isend", "monitored_barrier",
    "recv", "reduce", "reduce_scatter", "reduce_scatter_tensor", "scatter", "scatter_object_list", "send",
}  # fmt: skip
# By their last name, and those that are named like something harmless by their whole name.
WRITING_CALLS = {
    "FileIO", "fdopen", "flock", "fsync", "ftruncate", "hardlink_to", "link", "mkdtemp",
    "NamedTemporaryFile", "pwrite", "rename", "rmdir", "rmtree", "savez", "symlink", "symlink_to", "to_csv", "touch",
    "truncate", "write_bytes", "write_text", "writev",
    "os.open", "os.remove", "os.replace", "os.unlink", "os.write", "shutil.copy", "shutil.copyfile", "shutil.move",
}  # fmt: skip


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports anywhere, also below `if TYPE_CHECKING` and inside functions."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            assert node.module is not None
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            if not all((ROOT / name.replace(".", "/")).with_suffix(".py").exists() for name in names):
                yield node.module  # something in it, and not modules of a package
            yield from names


def imported_at_run_time(path: Path) -> set[str]:
    """The modules that a file imports as soon as it is imported itself."""
    names: set[str] = set()
    for node in tree(path).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def siblings(path: Path, package: str) -> set[str]:
    """The modules of the same package that a file imports, "__init__" where it imports the package itself."""
    names: set[str] = set()
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == package and len(parts) == 1:
            names.add("__init__")
        elif parts[0] == package and (ROOT / package / f"{parts[1]}.py").exists():
            names.add(parts[1])
    return names


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", files(CORE), ids=ids)
def test_core_never_imports_the_wrapper(path: Path) -> None:
    assert not [name for name in imported(path) if name.split(".")[0] == "mixture_torch"]


@pytest.mark.parametrize("path", files(CORE), ids=ids)
def test_core_imports_go_down_only(path: Path) -> None:
    row = {module: height for height, row in enumerate(CORE_ROWS) for module in row}
    assert path.stem in row, f"{path.stem} has no place in CORE_ROWS"
    upward = {module for module in siblings(path, "mixture_core") if row[module] >= row[path.stem]}
    assert not upward


@pytest.mark.parametrize("path", files(CORE), ids=ids)
def test_core_imports_torch_attrs_and_the_standard_library_alone(path: Path) -> None:
    standard = {"__future__", "collections", "functools", "itertools", "math", "numbers", "typing", "warnings"}
    extra = {"testing": {"hypothesis"}, "kernels": {"triton"}}.get(path.stem, set())
    assert {name.split(".")[0] for name in imported(path)} <= {"torch", "attrs", "mixture_core"} | standard | extra


@pytest.mark.parametrize("path", [path for path in files(CORE) if path.stem != "testing"], ids=ids)
def test_core_has_no_global_random_number_and_no_file(path: Path) -> None:
    calls = [node for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]
    for call in calls:
        name = ast.unparse(call.func)
        assert name not in {"open", "print", "torch.manual_seed", "torch.seed"}, name
        if name.startswith("torch.rand"):
            assert "generator" in {keyword.arg for keyword in call.keywords}, name


@pytest.mark.parametrize("path", [path for path in files(CORE) if path.stem != "testing"], ids=ids)
def test_core_has_no_global_state(path: Path) -> None:
    assert not [node for node in ast.walk(tree(path)) if isinstance(node, ast.Global | ast.Nonlocal)]


def test_wrapper_has_no_import_cycle() -> None:
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files(WRAPPER)}
    edges = {name: imported_at_run_time(path) & set(modules) - {name} for name, path in modules.items()}
    while edges:
        leaves = [name for name, needs in edges.items() if not needs]
        assert leaves, f"these import each other: {edges}"
        edges = {name: needs - set(leaves) for name, needs in edges.items() if name not in leaves}


FILES = WRAPPER / "files"


@pytest.mark.parametrize("path", files(FILES), ids=ids)
def test_files_import_nothing_of_the_rest(path: Path) -> None:
    outside = {name.split(".")[0] for name in imported(path)} - set(sys.stdlib_module_names)
    assert outside <= {"torch", "mixture_torch"} | ({"numpy"} if path.stem == "log" else set())
    ours = [name for name in imported(path) if name.startswith("mixture_torch")]
    assert [name for name in ours if not name.startswith("mixture_torch.files")] == []


@pytest.mark.parametrize("path", files(WRAPPER / "update"), ids=ids)
def test_updates_never_import_files(path: Path) -> None:
    assert not [name for name in imported(path) if name.startswith("mixture_torch.files")]


@pytest.mark.parametrize("name", ["disk", "lock"])
def test_disk_and_lock_know_nothing_of_formats(name: str) -> None:
    assert {module.split(".")[0] for module in imported(FILES / f"{name}.py")} <= set(sys.stdlib_module_names)


def test_files_stay_small() -> None:
    sizes = {path.name: len(path.read_text().splitlines()) for path in files(FILES)}
    assert sum(sizes.values()) <= 1500
    assert max(sizes.values()) <= 260


@pytest.mark.parametrize("path", sorted(WRAPPER.glob("*.py")), ids=ids)
def test_wrapper_never_needs_its_application_to_be_imported(path: Path) -> None:
    assert not [name for name in imported_at_run_time(path) if name.startswith("mixture_torch.app")]


@pytest.mark.parametrize("path", files(WRAPPER), ids=ids)
def test_collectives_are_in_one_file(path: Path) -> None:
    if path == WRAPPER / "distributed.py":
        return
    if "app" not in path.parts:  # the application makes process groups, as a training script does
        assert not [name for name in imported(path) if name.startswith("torch.distributed")]
    called = [ast.unparse(node.func) for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]
    assert not [
        name for name in called if name.split(".")[0] in ("dist", "distributed") and name.split(".")[-1] in COLLECTIVES
    ]


@pytest.mark.parametrize("path", files(WRAPPER), ids=ids)
def test_files_are_written_in_one_file(path: Path) -> None:
    if path in (FILES / "disk.py", FILES / "lock.py"):
        return
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            assert not {name, name.split(".")[-1]} & WRITING_CALLS, name
            if name.endswith(".save"):  # into memory
                assert ast.unparse(node.args[1]) == "buffer", ast.unparse(node)
            if name in {"open", "io.open", "os.open"} or (name.endswith(".open") and name != "zipped.open"):
                mode = [
                    ast.unparse(argument) for argument in (*node.args, *(keyword.value for keyword in node.keywords))
                ]
                assert not [
                    text for text in mode if text.strip("'\"") in {"w", "a", "x", "wb", "ab", "xb", "r+", "r+b"}
                ]


def test_collectives_and_writes_are_where_they_are_looked_for() -> None:
    # That the two tests above would see them.
    assert "torch.distributed" in imported_at_run_time(WRAPPER / "distributed.py")
    called = {
        ast.unparse(node.func).removeprefix("os.")
        for node in ast.walk(tree(FILES / "disk.py"))
        if isinstance(node, ast.Call)
    }
    assert {"ftruncate", "fsync"} <= called & WRITING_CALLS


@pytest.mark.parametrize(
    ("module", "names"),
    [
        (
            "mixture_core",
            "MixtureConfig Moments MixtureState StepStats init step assign merge decay batch_moments kmeans_plusplus "
            "lloyd responsibilities_from_labels",
        ),
        (
            "mixture_core.testing",
            "embeddings mixtures labels states oracle_batch_moments oracle_merge oracle_derived oracle_nearest "
            "oracle_lloyd oracle_step",
        ),
        (
            "mixture_torch",
            "MixtureStats MixtureRuntimeConfig activate active_estimator NTXentLoss read_log read_scores",
        ),
    ],
)
def test_public_names_of_the_design_exist(module: str, names: str) -> None:
    found = importlib.import_module(module)
    assert [name for name in names.split() if not callable(getattr(found, name, None))] == []


@pytest.mark.parametrize("module", ["mixture_core", "mixture_torch"])
def test_everything_exported_exists_and_is_documented(module: str) -> None:
    found = importlib.import_module(module)
    for name in found.__all__:
        assert getattr(found, name).__doc__, name


def test_step_of_the_package_is_the_function() -> None:
    # The module of the same name must not hide it.
    import mixture_core

    assert mixture_core.step.__module__ == "mixture_core.step"
    assert callable(mixture_core.step)
