"""Who may import whom (the map in ARCHITECTURE.md), from the source: imports inside functions count as well."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = ("chameleon_ray", "deployments", "chameleon_kernels")
HEAVY = ("vllm", "torch", "ray", "redis")


@dataclass(frozen=True)
class Rule:
    """may_use: the only modules of ours (with all below them) that it may import, besides itself.
    not_external: packages of others that it must not import; only_external: the only ones it may."""

    module: str
    may_use: tuple[str, ...]
    not_external: tuple[str, ...] = ()
    only_external: tuple[str, ...] | None = None


RULES = (
    Rule("chameleon_ray.policy", may_use=(), only_external=("numpy",)),
    Rule("chameleon_ray.routing", may_use=("chameleon_ray.policy",), only_external=("numpy",)),
    Rule("chameleon_ray.config", may_use=(), not_external=HEAVY),
    Rule("chameleon_ray.progress", may_use=(), not_external=HEAVY),
    Rule(
        "chameleon_ray.metrics",
        may_use=("chameleon_ray.policy", "chameleon_ray.engine.report"),
        not_external=("vllm", "torch", "redis"),
    ),
    Rule(
        "chameleon_ray.adapters",
        may_use=("chameleon_ray.policy", "chameleon_ray.config"),
        not_external=("vllm", "ray", "redis"),
    ),
    Rule(
        "chameleon_ray.placement",
        may_use=(
            "chameleon_ray.policy",
            "chameleon_ray.routing",
            "chameleon_ray.config",
            "chameleon_ray.adapters.record",
        ),
        not_external=("vllm", "torch", "ray"),
    ),
    Rule(
        "chameleon_ray.predictor",
        may_use=("chameleon_ray.policy", "chameleon_ray.config"),
        not_external=("vllm", "ray", "redis"),
    ),
    Rule(
        "chameleon_ray.engine",
        may_use=(
            "chameleon_ray.policy",
            "chameleon_ray.routing",
            "chameleon_ray.adapters",
            "chameleon_ray.config",
            "chameleon_ray.predictor",
            "chameleon_ray.progress",
            "chameleon_kernels",
        ),
        not_external=("ray", "redis"),
    ),
    Rule(
        "chameleon_ray.router",
        may_use=(
            "chameleon_ray.policy",
            "chameleon_ray.routing",
            "chameleon_ray.placement",
            "chameleon_ray.config",
            "chameleon_ray.metrics",
        ),
        not_external=("vllm", "torch", "redis"),
    ),
    Rule(
        "chameleon_ray.sim",
        may_use=("chameleon_ray.policy", "chameleon_ray.routing", "chameleon_ray.predictor.lengths"),
        not_external=HEAVY,
    ),
    Rule("chameleon_ray.predictor.lengths", may_use=("chameleon_ray.policy.figures",), only_external=()),
    Rule("chameleon_kernels", may_use=(), not_external=("vllm", "ray", "redis")),
)

NEVER_LOADED = {"deployments.ingress": ("vllm", "torch"), "chameleon_ray.router": ("vllm", "torch")}
"""What a module must not bring in, through whatever it imports: ingress processes stay small and quick to start."""


def is_within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def find_modules(root: Path) -> dict[str, Path]:
    """Our modules by dotted name. The kernel library's top-level package lies in ``kernels/``."""
    found = {}
    for top, base in (("chameleon_ray", root), ("deployments", root), ("chameleon_kernels", root / "kernels")):
        for path in (base / top).rglob("*.py"):
            parts = path.relative_to(base).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(module: str, path: Path, modules: dict[str, Path]) -> Iterator[str]:
    """Dotted names of the modules that ``module`` imports; ``from package import submodule`` names the submodule."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                above = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
                source = f"{above}.{source}".rstrip(".")
            for alias in node.names:
                below = f"{source}.{alias.name}"
                yield below if below in modules else source


def violations(root: Path) -> list[str]:
    modules = find_modules(root)
    imports = {module: set(imports_of(module, path, modules)) for module, path in modules.items()}
    problems = []
    for module, used in imports.items():
        if not is_within(module, ("deployments",)):
            problems += [f"{module} imports {name}" for name in used if is_within(name, ("deployments",))]
        for rule in RULES:
            if is_within(module, (rule.module,)):
                problems += [f"{module} imports {name}" for name in used if not is_allowed(name, rule)]
    for module, unwanted in NEVER_LOADED.items():
        reached, todo = set(), [module] if module in modules else []
        while todo:
            reached.add(here := todo.pop())
            todo += [name for name in imports.get(here, ()) if name in modules and name not in reached]
        problems += [
            f"{module} loads {name} through {here}"
            for here in reached
            for name in imports[here]
            if is_within(name, unwanted)
        ]
    return sorted(set(problems))


def is_allowed(name: str, rule: Rule) -> bool:
    if is_within(name, OURS):
        return is_within(name, (rule.module, *rule.may_use))
    if rule.only_external is not None and name.partition(".")[0] not in sys.stdlib_module_names:
        return is_within(name, rule.only_external)
    return not is_within(name, rule.not_external)


def test_every_import_follows_the_map() -> None:
    assert violations(ROOT) == []


def test_the_scan_sees_the_modules_that_the_rules_are_about() -> None:
    modules = find_modules(ROOT)
    assert {"chameleon_ray.routing.ranking", "chameleon_ray.router", *NEVER_LOADED} <= set(modules)
    assert "chameleon_ray.routing.ranking" in set(
        imports_of("chameleon_ray.router", modules["chameleon_ray.router"], modules)
    )


@pytest.mark.parametrize(
    ("file", "line", "problem"),
    [
        ("chameleon_ray/policy/a.py", "import redis", "chameleon_ray.policy.a imports redis"),
        ("chameleon_ray/policy/a.py", "import pydantic", "chameleon_ray.policy.a imports pydantic"),
        ("chameleon_ray/policy/a.py", "from .. import config", "chameleon_ray.policy.a imports chameleon_ray.config"),
        ("chameleon_ray/policy/a.py", "def f():\n    import torch.nn", "chameleon_ray.policy.a imports torch.nn"),
        ("chameleon_ray/engine/a.py", "from ray import serve", "chameleon_ray.engine.a imports ray"),
        (
            "chameleon_ray/engine/a.py",
            "from chameleon_ray import router",
            "chameleon_ray.engine.a imports chameleon_ray.router",
        ),
        (
            "chameleon_ray/router.py",
            "import chameleon_ray.engine.a",
            "chameleon_ray.router imports chameleon_ray.engine.a",
        ),
        ("chameleon_ray/cli.py", "from deployments import app", "chameleon_ray.cli imports deployments"),
        (
            "deployments/ingress.py",
            "from chameleon_ray.engine import options",
            "deployments.ingress loads vllm through chameleon_ray.engine.options",
        ),
    ],
)
def test_a_forbidden_import_is_found(tmp_path: Path, file: str, line: str, problem: str) -> None:
    clean = {
        "chameleon_ray/config.py": "import pydantic",
        "chameleon_ray/router.py": "import ray",
        "chameleon_ray/engine/options.py": "import vllm",
        "chameleon_ray/policy/a.py": "import heapq, numpy",
        "chameleon_ray/engine/a.py": "import vllm",
        "deployments/ingress.py": "from chameleon_ray import config",
    }
    for name, source in clean.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source)
    assert violations(tmp_path) == []
    (tmp_path / file).write_text(line)
    assert problem in violations(tmp_path)


IMPORT_ALL = """
import importlib, pkgutil, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"vllm", "ray", "redis", "torch", "pydantic"}:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
package = importlib.import_module(sys.argv[1])
for info in pkgutil.walk_packages(package.__path__, sys.argv[1] + "."):
    importlib.import_module(info.name)
print(*sorted(name for name in sys.modules if name.startswith("chameleon_ray")))
"""


def import_all(package: str, root: Path) -> "subprocess.CompletedProcess[str]":
    """Import a package and all below it where vllm, ray, redis, torch and pydantic cannot be imported."""
    return subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, package],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(
    ("package", "module", "with_it"),
    [
        ("chameleon_ray.policy", "chameleon_ray.policy.adapter", set()),
        (
            "chameleon_ray.routing",
            "chameleon_ray.routing.ranking",
            {"chameleon_ray.policy", "chameleon_ray.policy.adapter"},
        ),
    ],
)
def test_decisions_import_where_nothing_else_is_installed(package: str, module: str, with_it: set[str]) -> None:
    result = import_all(package, ROOT)
    assert result.returncode == 0, result.stderr
    loaded = set(result.stdout.split())
    assert module in loaded
    assert {name for name in loaded if not name.startswith(package)} == {"chameleon_ray", *with_it}


def test_the_blocked_import_fails_for_a_package_that_needs_redis(tmp_path: Path) -> None:
    (tmp_path / "needy").mkdir()
    (tmp_path / "needy" / "__init__.py").write_text("")
    (tmp_path / "needy" / "store.py").write_text("def get(): pass\nimport redis")
    result = import_all("needy", tmp_path)
    assert result.returncode != 0 and "redis is blocked" in result.stderr
