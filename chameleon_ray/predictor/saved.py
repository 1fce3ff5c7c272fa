"""A trained predictor on disk: ``head.safetensors`` and ``predictor.json`` in one folder."""

import hashlib
import json
import os
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load, save

from chameleon_ray.predictor.encoder import Encoder, Pooling
from chameleon_ray.predictor.errors import PredictorError
from chameleon_ray.predictor.head import LengthHead

HEAD_FILE = "head.safetensors"
DESCRIPTION_FILE = "predictor.json"
ENCODER_FOLDER = "encoder"
"""An encoder in the predictor's own folder goes before the path it was trained with: so it can be shipped whole."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class Accuracy(_Part):
    """How one predictor did on the held-out requests."""

    right_bucket_share: float
    within_one_bucket_share: float
    mean_absolute_error_tokens: float


class TrainedOn(_Part):
    """What it was trained with."""

    num_requests: int
    num_held_out: int
    epochs: int
    seed: int


class Description(_Part):
    """``predictor.json``. Bucket i takes outputs of up to ``bucket_edges[i]`` tokens (inclusive); the last, all longer.

    bucket_tokens: the length predicted for each bucket, its median in training.
    """

    format: Literal[1] = 1
    encoder_path: str
    encoder_digest: str
    window: int
    pooling: Pooling
    bucket_edges: list[int] = Field(min_length=1)
    bucket_tokens: list[int]
    head_digest: str
    trained_on: TrainedOn
    accuracy: dict[str, Accuracy]

    @model_validator(mode="after")
    def _buckets_fit(self) -> "Description":
        if len(self.bucket_tokens) != len(self.bucket_edges) + 1:
            raise ValueError("bucket_tokens must be one more than bucket_edges")
        if any(low >= high for low, high in pairwise(self.bucket_edges)) or min(self.bucket_tokens) < 1:
            raise ValueError("bucket_edges must rise and bucket_tokens be at least 1")
        return self


def save_predictor(folder: Path, head: LengthHead, description: Mapping[str, object]) -> Description:
    """Write both files; description: the fields of ``Description`` but ``head_digest``."""
    weights = save({name: tensor.contiguous() for name, tensor in head.state_dict().items()})
    described = Description.model_validate({**description, "head_digest": hashlib.sha256(weights).hexdigest()})
    text = json.dumps(described.model_dump(), indent=2) + "\n"
    for name, content in ((HEAD_FILE, weights), (DESCRIPTION_FILE, text.encode())):
        partial = folder / f".{name}.partial"
        partial.write_bytes(content)
        os.replace(partial, folder / name)
    return described


def load_predictor(folder: Path) -> tuple[Encoder, LengthHead, Description]:
    """What ``save_predictor`` wrote, and its encoder. Raises PredictorError naming the file that is not usable."""
    description = _description(folder / DESCRIPTION_FILE)
    own = folder / ENCODER_FOLDER
    encoder = Encoder(own if own.is_dir() else Path(description.encoder_path), description.window, description.pooling)
    if encoder.digest != description.encoder_digest:
        raise PredictorError(
            f"{folder}: trained with another encoder than what lies in {encoder.folder} now; "
            f"train again, or put the right one into {own}"
        )
    head = LengthHead(encoder.dimension, len(description.bucket_tokens))
    path = folder / HEAD_FILE
    try:
        content = path.read_bytes()
    except OSError as error:
        raise PredictorError(f"{path}: not readable: {error}; train again") from None
    if hashlib.sha256(content).hexdigest() != description.head_digest:
        raise PredictorError(f"{path}: not the weights that {DESCRIPTION_FILE} describes; copy again or train again")
    try:
        head.load_state_dict(load(content))
    except (SafetensorError, RuntimeError) as error:
        raise PredictorError(f"{path}: not this predictor's weights: {error}") from None
    if not all(bool(torch.isfinite(tensor).all()) for tensor in head.state_dict().values()):
        raise PredictorError(f"{path}: weights that are not finite; train again")
    return encoder, head.eval(), description


def _description(path: Path) -> Description:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise PredictorError(
            f"{path}: not readable: {error}; give a folder that `chameleon train-predictor` made"
        ) from None
    try:
        return Description.model_validate_json(content)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, problem['loc'])) or 'file'}: {problem['msg']}" for problem in error.errors()
        )
        raise PredictorError(f"{path}: not a predictor's description: {problems}") from None
