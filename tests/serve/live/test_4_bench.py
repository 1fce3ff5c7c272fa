"""vLLM's own load generator, unchanged, against the application."""

import json
import os
import subprocess
import sys
from pathlib import Path

from live.service import REPO, Service

NUM_PROMPTS, OUTPUT_TOKENS = 40, 6
LIMIT_S = 240.0


def test_vllm_bench_serve_completes_every_request(service: Service, tmp_path: Path) -> None:
    options = {
        "backend": "openai",
        "base-url": service.url,
        "model": service.base,
        "tokenizer": str(service.demo.model),
        "dataset-name": "random",
        "random-input-len": "16",
        "random-output-len": str(OUTPUT_TOKENS),
        "num-prompts": str(NUM_PROMPTS),
        "max-concurrency": "8",
        "seed": "1",
        "result-dir": str(tmp_path),
        "result-filename": "result.json",
    }
    flags = ["--save-result", "--save-detailed", "--ignore-eos", "--disable-tqdm"]
    done = subprocess.run(
        [
            sys.executable,
            str(Path(__file__).parent / "vllm_bench_serve.py"),
            *(word for name, value in options.items() for word in (f"--{name}", value)),
            *flags,
            "--lora-modules",
            *service.demo.adapter_names(),
        ],
        cwd=REPO,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["completed"], result["failed"]) == (NUM_PROMPTS, 0), result["errors"]
    assert result["total_output_tokens"] == NUM_PROMPTS * OUTPUT_TOKENS
    assert not any(result["errors"])
