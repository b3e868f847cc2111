"""Where files lie, which module may import which, where side effects live, and which names are public."""

import ast
import importlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CORE, WRAPPER = ROOT / "mixture_core", ROOT / "mixture_torch"

# From bottom to top: a module imports from lower rows only.
CORE_ROWS = [
    ("config", "pytrees", "inputs", "kernels"),
    ("kernels.assign", "kernels.summary"),
    ("kernels.moments", "moments"),
    ("stats", "absorb_cpu", "readings", "alarms"),
    ("scatter", "pairs"),
    ("seeding", "assign", "absorb"),
    ("step",),
    ("sharded", "relocate"),
    ("null",),
    ("__init__",),
    ("testing",),
]
TOP_LEVEL = {"pyproject.toml", "mixture_core", "mixture_torch", "tests", "benchmarks", "README.md"}
RANKS = WRAPPER / "update" / "ranks.py"
DISK = (WRAPPER / "files" / "disk.py", WRAPPER / "files" / "lock.py")
COLLECTIVES = {
    "all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "all_to_all", "all_to_all_single",
    "barrier", "broadcast", "broadcast_object_list", "gather", "gather_object", "irecv", "isend", "monitored_barrier",
    "recv", "reduce", "reduce_scatter", "reduce_scatter_tensor", "scatter", "scatter_object_list", "send",
}  # fmt: skip
# By the last part of their name, or by the whole name if the last part is harmless elsewhere.
WRITING_CALLS = {
    "FileIO", "fdopen", "flock", "fsync", "ftruncate", "hardlink_to", "link", "mkdtemp",
    "NamedTemporaryFile", "pwrite", "rename", "rmdir", "rmtree", "savez", "symlink", "symlink_to", "to_csv", "touch",
    "truncate", "write_bytes", "write_text", "writev",
    "os.open", "os.remove", "os.replace", "os.unlink", "os.write", "shutil.copy", "shutil.copyfile", "shutil.move",
}  # fmt: skip


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(path: Path) -> Iterator[str]:
    """Yields every module that a file imports, also under `if TYPE_CHECKING` and inside functions."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            assert node.module is not None
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            paths = [ROOT / name.replace(".", "/") for name in names]
            if not all(path.is_dir() or path.with_suffix(".py").exists() for path in paths):
                yield node.module  # it imports an object of the module, not a module of the package
            yield from names


def imported_at_run_time(path: Path) -> set[str]:
    """Returns the modules that a file imports at its top level."""
    names: set[str] = set()
    for node in tree(path).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def module(path: Path) -> str:
    """Returns the name of a module inside its package; "__init__" is the package itself."""
    parts = path.relative_to(ROOT).with_suffix("").parts[1:]
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def siblings(path: Path, package: str) -> set[str]:
    """Returns the modules of the same package that a file imports; "__init__" is the package itself."""
    modules = {module(other) for other in files(ROOT / package)}
    inside = {name.partition(".")[2] or "__init__" for name in imported(path) if name.split(".")[0] == package}
    return inside & modules


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_top_level_is_closed() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git repository")
    found = {line.split("/")[0] for line in listed.stdout.splitlines()}
    assert {name for name in found if not name.startswith(".")} == TOP_LEVEL


@pytest.mark.parametrize("path", files(CORE), ids=ids)
def test_core_imports_go_down_only(path: Path) -> None:
    row = {name: height for height, names in enumerate(CORE_ROWS) for name in names}
    assert module(path) in row, f"{module(path)} has no place in CORE_ROWS"
    upward = {name for name in siblings(path, "mixture_core") if row[name] >= row[module(path)]}
    assert not upward


@pytest.mark.parametrize("path", files(CORE), ids=ids)
def test_core_imports_torch_attrs_and_the_standard_library_alone(path: Path) -> None:
    standard = "__future__ collections functools itertools math numbers reprlib typing warnings"
    extra = {"testing": {"hypothesis"}, "readings": {"scipy"}, "kernels": {"triton", "os", "contextlib"}}.get(
        module(path), set()
    )
    assert {name.split(".")[0] for name in imported(path)} <= {
        "torch",
        "attrs",
        "mixture_core",
        *standard.split(),
    } | extra


@pytest.mark.parametrize("path", [path for path in files(CORE) if path.stem != "testing"], ids=ids)
def test_core_has_no_side_effects(path: Path) -> None:
    nodes = list(ast.walk(tree(path)))
    assert not [node for node in nodes if isinstance(node, ast.Global | ast.Nonlocal)]
    for call in [node for node in nodes if isinstance(node, ast.Call)]:
        name = ast.unparse(call.func)
        assert name not in {"open", "print", "torch.manual_seed", "torch.seed"}, name
        if name.startswith("torch.rand"):
            assert "generator" in {keyword.arg for keyword in call.keywords}, name


def test_wrapper_has_no_import_cycle() -> None:
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files(WRAPPER)}
    edges = {name: imported_at_run_time(path) & set(modules) - {name} for name, path in modules.items()}
    while edges:
        leaves = [name for name, needs in edges.items() if not needs]
        assert leaves, f"these import each other: {edges}"
        edges = {name: needs - set(leaves) for name, needs in edges.items() if name not in leaves}


def test_wings_never_import_each_other() -> None:
    for wing, others in (("files", ("update", "estimator")), ("update", ("files", "estimator"))):
        for path in files(WRAPPER / wing):
            names = {name.split(".")[1] for name in imported(path) if name.startswith("mixture_torch.")}
            assert not names & {*others, "app", "integrations"}, path
            if wing == "files":
                assert names <= {"files"}, path


def test_what_shows_a_run_is_above_what_writes_it() -> None:
    shows = ("mixture_torch.report", "mixture_torch.integrations")
    for path in [*files(WRAPPER / "files"), *files(WRAPPER / "update"), *WRAPPER.glob("[!_]*.py")]:
        assert not [name for name in imported(path) if name.startswith(shows)], path
    for path in files(WRAPPER / "report"):
        names = {name.split(".")[1] for name in imported(path) if name.startswith("mixture_torch.")}
        assert names <= {"files", "update", "report"}, path


def test_disk_knows_nothing_of_the_rest() -> None:
    for path in DISK:
        assert not [name for name in imported(path) if name.split(".")[0] in ("mixture_torch", "torch")]


@pytest.mark.parametrize("path", [path for path in files(WRAPPER) if "app" not in path.parts], ids=ids)
def test_wrapper_never_needs_its_application_to_be_imported(path: Path) -> None:
    assert not [name for name in imported_at_run_time(path) if name.startswith("mixture_torch.app")]


def test_only_integrations_import_a_training_framework() -> None:
    frameworks = {"lightning", "pytorch_lightning", "transformers", "sentence_transformers", "datasets", "accelerate"}
    for path in files(WRAPPER):
        names = {name.split(".")[0] for name in imported(path)} & frameworks
        assert names <= ({path.stem} if "integrations" in path.parts else set()), path


@pytest.mark.parametrize("path", files(WRAPPER), ids=ids)
def test_collectives_are_in_one_file(path: Path) -> None:
    if path == RANKS:
        return
    if "app" not in path.parts:  # the demo makes process groups, as a training script does
        assert not [name for name in imported(path) if name.startswith("torch.distributed")]
    called = [ast.unparse(node.func) for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]
    assert not [
        name for name in called if name.split(".")[0] in ("dist", "distributed") and name.split(".")[-1] in COLLECTIVES
    ]


@pytest.mark.parametrize("path", files(WRAPPER), ids=ids)
def test_files_are_written_in_one_file(path: Path) -> None:
    if path in DISK:
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


def test_collectives_and_writes_are_found_in_their_files() -> None:
    """The two tests above would notice a collective or a write elsewhere."""
    assert "torch.distributed" in imported_at_run_time(RANKS)
    for path in DISK:
        called = {ast.unparse(node.func).split(".")[-1] for node in ast.walk(tree(path)) if isinstance(node, ast.Call)}
        assert called & WRITING_CALLS


@pytest.mark.parametrize(
    ("package", "names"),
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
            "MixtureStats MixtureRuntimeConfig activate active_estimator NTXentLoss StepStats read_log read_scores",
        ),
    ],
)
def test_public_names_exist(package: str, names: str) -> None:
    found = importlib.import_module(package)
    assert [name for name in names.split() if not callable(getattr(found, name, None))] == []


def test_no_file_is_long() -> None:
    sizes = {str(path): len(path.read_text(encoding="utf-8").splitlines()) for path in [*files(CORE), *files(WRAPPER)]}
    assert {path: size for path, size in sizes.items() if size > 260} == {}
