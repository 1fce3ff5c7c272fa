"""Which content a LoRARequest means.

vLLM tells adapters apart by name (prefix cache) and number (weights), and both survive a replacement of the files, so
that the new version meets the old one's KV (vLLM issue 42125). Here the name always ends in ``@`` and a digest of the
content.
"""

import hashlib
import os
import re

from vllm.lora.request import LoRARequest

from chameleon_ray.engine.paged.checkpoint import CONFIG_FILE, WEIGHTS_FILE

_DIGEST = re.compile(r"@([0-9a-f]{16,64})$")


def identified(request: LoRARequest) -> tuple[str, str]:
    """(digest, name that ends in ``@digest``).

    A name that ends so already is believed: a replica's folders are addressed by content and never change. Otherwise,
    with vLLM used by itself, the digest is over path, size, inode and times of the two files, so that a changed file is
    a new adapter; that costs two ``stat`` calls and reads nothing.
    """
    if match := _DIGEST.search(request.lora_name):
        return match[1], request.lora_name
    parts = [os.path.abspath(request.lora_path)]
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        try:
            status = os.stat(os.path.join(request.lora_path, name))
        except OSError as error:
            parts.append(type(error).__name__)
        else:
            parts.append(f"{status.st_dev} {status.st_ino} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}")
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    return digest, f"{request.lora_name}@{digest}"
