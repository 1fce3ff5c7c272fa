"""Starting an engine from a process that must set its environment first.

vLLM reads thread counts when it is imported, so nothing here imports it at the top.
"""

import logging
import time
from importlib import import_module
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


async def start_engine(config: AppConfig) -> "EngineServer":
    """Import vLLM and start the engine; takes about 20 s on two cores, minutes for a large model on a GPU."""
    set_cpu_environment(config.engine)
    began_s = time.monotonic()
    logger.info("starting the engine for %s", config.model.source)
    server = import_module("chameleon_ray.engine.server")
    metrics = import_module("chameleon_ray.engine.vllm_metrics")
    engine: EngineServer = await server.EngineServer.start(config, (metrics.NamedAdaptersLogger,))
    logger.info("the engine is ready after %.0f s", time.monotonic() - began_s)
    return engine
