"""Which content a LoRARequest means.

vLLM tells adapters apart by name (prefix cache) and number (weights), and both survive a replacement of the files, so
that the new version meets the old one's KV (vLLM issue 42125). Here both come from a digest of the content.
"""

import hashlib
import os

from vllm.lora.request import LoRARequest

from chameleon_ray.adapters.identity import AdapterId
from chameleon_ray.adapters.sources import CONFIG_FILE, WEIGHTS_FILE


def identify(request: LoRARequest) -> tuple[str, AdapterId]:
    """The adapter's name as clients know it, and its identity.

    A name with a digest (``AdapterId.lora_name``) is believed: a replica's folders are addressed by content and never
    change. Otherwise, with vLLM used by itself, the digest is over path, size, inode and times of the two files, so
    that a changed file is a new adapter; that costs two ``stat`` calls and reads nothing.
    """
    name, adapter_id = AdapterId.parse(request.lora_name)
    if adapter_id is not None:
        return name, adapter_id
    parts = [os.path.abspath(request.lora_path)]
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        try:
            status = os.stat(os.path.join(request.lora_path, file))
        except OSError as error:
            parts.append(type(error).__name__)
        else:
            parts.append(f"{status.st_dev} {status.st_ino} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}")
    return name, AdapterId(hashlib.sha256("\0".join(parts).encode()).hexdigest())
