"""Starting an engine from a process that must set its environment first.

vLLM reads thread counts when it is imported, so nothing here imports it at the top.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import snapshot_download

from chameleon_ray.config import AppConfig, ConfigError, ModelConfig
from chameleon_ray.engine.environment import set_cpu_environment

if TYPE_CHECKING:
    from chameleon_ray.engine.server import EngineServer

logger = logging.getLogger("ray.serve")


def local_model_folder(model: ModelConfig) -> Path:
    """The base model's folder on this node; a hub id is downloaded first. Raises ConfigError when there is neither."""
    folder = Path(model.source).expanduser()
    if (folder / "config.json").is_file():
        return folder.resolve()
    if folder.is_absolute() or model.source.startswith("."):
        raise ConfigError(f"model.source: {model.source} has no config.json on this node")
    try:
        return Path(snapshot_download(model.source, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:
        raise ConfigError(
            f"model.source: {model.source!r} is neither a model folder on this node nor a readable hub model: {error}"
        ) from error


@contextmanager
def kept_log() -> Iterator[None]:
    """Ray Serve's log goes on as before: vLLM's import configures logging, which closes all handlers there are.

    A closed file opens again with its next line, but a closed buffer has lost the file that it writes to.
    """
    buffers = [handler for handler in logger.handlers if isinstance(handler, MemoryHandler)]
    files = [buffer.target for buffer in buffers]
    try:
        yield
    finally:
        for buffer, file in zip(buffers, files, strict=True):
            buffer.setTarget(file)


async def start_engine(config: AppConfig) -> "EngineServer":
    """Import vLLM and start the engine; takes about 20 s on two cores, minutes for a large model on a GPU."""
    set_cpu_environment(config.engine)
    began_s = time.monotonic()
    logger.info("starting the engine for %s", config.model.source)
    with kept_log():
        server = import_module("chameleon_ray.engine.server")
        metrics = import_module("chameleon_ray.engine.vllm_metrics")
    engine: EngineServer = await server.EngineServer.start(config, (metrics.NamedAdaptersLogger,))
    logger.info("the engine is ready after %.0f s", time.monotonic() - began_s)
    return engine
