"""The ``chameleon`` command: quick to ask, and every command that is named somewhere exists."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from chameleon_ray import __version__
from chameleon_ray.cli import main

ROOT = Path(__file__).parents[2]
COMMANDS = (
    ["serve"],
    ["demo"],
    ["queues"],
    ["vllm-args"],
    ["fit"],
    ["calibrate"],
    ["plan"],
    ["train-predictor"],
    *(["bench", what] for what in ("local", "policy", "serve", "cold")),
    *(["sim", what] for what in ("run", "schedulers", "cluster")),
)
LOADED_BY_HELP = """
import contextlib, io, json, sys
before = set(sys.modules)
from chameleon_ray.cli import main
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
    main(["--help"])
names = {name.partition(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names
print(json.dumps([sorted(names), sum(name.startswith("chameleon_ray") for name in sys.modules)]))
"""


def test_help_loads_no_command_and_no_package_of_others() -> None:
    loaded = subprocess.run([sys.executable, "-c", LOADED_BY_HELP], capture_output=True, text=True, check=True)
    packages, num_ours = json.loads(loaded.stdout)
    assert packages == ["chameleon_ray"]
    assert num_ours < 8


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_explains_its_options(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    usage, *options = capsys.readouterr().out.split("\n\n", 1)
    assert usage.startswith(f"usage: chameleon {' '.join(command)} [-h]") and options


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"chameleon {__version__}\n"


def test_commands_named_in_code_and_docs_exist() -> None:
    files = [path for top in ("chameleon_ray", "deployments", "docs", "cluster_configs") for path in _texts(ROOT / top)]
    files += [ROOT / "README.md", ROOT / "ARCHITECTURE.md", ROOT / "Makefile"]
    known = {" ".join(command) for command in COMMANDS}
    named = {
        found: str(path.relative_to(ROOT))
        for path in files
        for found in re.findall(r"`+chameleon ((?:bench |sim )?[a-z][a-z-]*)", re.sub(r"\s+", " ", path.read_text()))
    }
    assert len(named) > 10
    assert not {command: where for command, where in named.items() if command not in known | {"bench", "sim"}}


def test_what_docs_run_from_a_checkout_exists_outside_the_package() -> None:
    files = [path for top in ("chameleon_ray", "benchmarks", "experiments", "docs") for path in _texts(ROOT / top)]
    named = {
        found
        for path in files
        for found in re.findall(r"python -m ((?:benchmarks|experiments)[.\w]*)", path.read_text())
    }
    assert len(named) >= 6
    for name in named:
        path = ROOT / name.replace(".", "/")
        path = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
        assert "__main__" in path.read_text(), name
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]
    assert not any(pattern.startswith(("bench", "exp")) for pattern in packages)


def _texts(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.suffix in (".py", ".md", ".yaml")]
