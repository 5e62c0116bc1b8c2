"""The import ladder of the design, read from the syntax trees."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "wkd_jax"
RUNGS = [
    {"__init__", "types", "config", "config_file", "command", "extras", "registry", "cache"},
    {"losses"},
    {"models", "data"},
    {"evaluation"},
    {"methods", "tasks", "weights", "interrelation"},
    {"training"},
    {"report"},
    {"main", "configs", "__main__"},
    {"compare"},
]
LEVEL = {name: level for level, names in enumerate(RUNGS) for name in names}


def part(module: str) -> str:
    """The rung's name of `wkd_jax.x.y` ("x")."""
    return module.split(".")[1] if "." in module else "__init__"


def wrong_edges(source: str, owner: str) -> list[str]:
    """Imports in `source`, a file of the part `owner`, that the ladder forbids."""
    wrong = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "wkd_jax":
            modules = (
                [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "wkd_jax" else [node.module]
            )
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names if alias.name.split(".")[0] == "wkd_jax"]
        else:
            continue
        for module in modules:
            target = part(module)
            if target not in LEVEL:
                target = "__init__"  # A name out of the package itself, such as __version__.
            if target != owner and LEVEL[target] >= LEVEL[owner] and LEVEL[owner] > 0:
                wrong.append(f"{owner} -> {module}")
            if LEVEL[owner] == 0 and LEVEL[target] > 0:
                wrong.append(f"{owner} -> {module}")
    return wrong


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    # A command line stands above everything, wherever its package stands.
    owner = "__main__" if path.name == "__main__.py" else path.relative_to(PACKAGE).with_suffix("").parts[0]
    assert owner in LEVEL, f"{owner} is not on the ladder: add it to RUNGS where it belongs"
    assert wrong_edges(path.read_text(), owner) == []


@pytest.mark.parametrize(
    ("source", "owner"),
    [
        ("from wkd_jax.training import loop", "losses"),
        ("from wkd_jax import methods", "models"),
        ("import wkd_jax.data.memory", "models"),
        ("from wkd_jax import losses", "registry"),
        ("def f():\n  from wkd_jax.tasks import classification", "methods"),
    ],
)
def test_a_wrong_edge_is_found(source, owner):
    assert wrong_edges(source, owner)


def test_only_allowed_files_use_what_they_hide():
    """Orbax stays behind two files; nnx.jit and nnx.grad are not used at all."""
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        if path.name not in ("snapshot.py", "export.py"):
            assert "import orbax" not in text and "from orbax" not in text, path
        for name in ("nnx.jit", "nnx.grad", "nnx.value_and_grad", "nnx.Optimizer", "jax.pmap"):
            assert name not in text, (path, name)
