"""Imports run one way, and `import skink` is light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import skink

PACKAGE = Path(skink.__file__).parent

# Each layer may import those before it.
LAYERS = (
    *("errors", "settings", "kernels", "graph", "budget", "training", "passes", "evaluation", "export"),
    *("compression", "exploration", "cli"),
)

# What a layer must do without, at any depth of its modules; kernels and export keep such imports in their own files.
FORBIDDEN = {
    "kernels": ("onnx", "onnxruntime", "transformers", "triton"),
    "graph": ("onnx", "onnxscript", "onnxruntime", "triton", "peft"),
    "budget": ("onnx", "onnxscript", "onnxruntime", "triton", "peft"),
    "passes": ("onnx", "onnxscript", "onnxruntime", "triton", "peft"),
}
# Loaded only when asked for, by the exporter.
EXCEPTIONS = {("kernels", "onnx_lowering.py"), ("kernels", "triton_kernel.py")}


def modules() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if "assets" not in path.parts]


def imports(path: Path) -> list[tuple[str, bool]]:
    """(module imported, whether at the module's top level) for every import that runs."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        names = (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        )  # fmt: skip
        found += [(name, node in tree.body) for name in names]
    return found


def layer_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "cli" if first == "__main__" else first


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    layer = layer_of(path)
    if layer == "__init__":
        # What makes transformers find our models; it loads nothing itself.
        registration = "skink.export.huggingface.registration"
        assert {name for name, _ in imports(path) if name.startswith("skink")} <= {registration}
        return
    allowed = LAYERS[: LAYERS.index(layer) + 1]
    for name, _ in imports(path):
        if name.split(".")[0] == "skink":
            assert name.split(".")[1] in allowed, f"{layer} imports {name}"
        elif (layer, path.name) not in EXCEPTIONS:
            assert name.split(".")[0] not in FORBIDDEN.get(layer, ()), f"{layer} imports {name}"


def test_every_folder_is_a_layer() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and (path / "__init__.py").exists()}
    files = {path.stem for path in PACKAGE.glob("*.py")}
    assert (folders | files) - {"__init__", "__main__", "assets", "recipes", "spaces"} <= set(LAYERS)


def loaded_by(code: str) -> set[str]:
    """Top-level packages that a fresh process has loaded after `code`."""
    script = f"import sys\n{code}\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=PACKAGE.parent, capture_output=True, text=True, check=True
    )
    return set(result.stdout.split())


def test_importing_skink_loads_little() -> None:
    heavy = {"transformers", "onnx", "onnxscript", "onnxruntime", "triton", "peft", "accelerate", "typer", "torch"}
    assert not loaded_by("import skink") & heavy


def test_the_compiler_core_needs_no_exporter() -> None:
    code = "import skink.graph.capture, skink.graph.pipeline, skink.graph.serialization, skink.passes, skink.kernels"
    assert not loaded_by(code) & {"transformers", "onnx", "onnxscript", "onnxruntime", "peft", "typer"}


def test_public_names_are_there() -> None:
    for name in skink.__all__:
        assert getattr(skink, name) is not None
    assert dir(skink) == skink.__all__
    with pytest.raises(AttributeError, match="module 'skink' has no attribute 'no_such_name'"):
        skink.no_such_name  # noqa: B018


# Who makes graphs: the rewriter, the front ends, state derivation, and what copies or decodes a program.
MAKERS = (
    *("rewriter.py", "lift.py", "frontends.py", "state.py", "last_token.py"),
    *("program.py", "serialization.py", "emit.py"),
)
EDITS = {
    *("call_function", "create_node", "erase_node", "replace_all_uses_with"),
    *("replace_input_with", "update_arg", "update_kwarg", "eliminate_dead_code"),
}


@pytest.mark.parametrize("layer", ["graph", "passes"])
def test_only_the_rewriter_edits_graphs(layer: str) -> None:
    for path in sorted((PACKAGE / layer).rglob("*.py")):
        if path.name in MAKERS:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                assert node.func.attr not in EDITS, f"{path.name}:{node.lineno} edits a graph past the Rewriter"
