"""A Hugging Face encoder from a local folder: prompts in, one vector each out."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModel, AutoTokenizer

from chameleon_ray.predictor.errors import PredictorError

Pooling = Literal["mean", "cls"]

CLIP_CHARACTERS = 4096
"""Of a long prompt the first and the last so many characters are kept."""

_IDENTITY_SUFFIXES = (".json", ".txt", ".model", ".safetensors")


def clip_prompt(text: str) -> str:
    """A prompt with its middle left out where it is long: instructions stand at the beginning or at the end."""
    return text if len(text) <= 2 * CLIP_CHARACTERS else text[:CLIP_CHARACTERS] + text[-CLIP_CHARACTERS:]


class Encoder:
    """Embeds prompts with a frozen encoder, on the CPU in float32.

    window: tokens read of a prompt, special ones included; of a longer one its first and last halves.
    pooling: the mean over the tokens' last hidden states, or the first token's.
    """

    def __init__(self, folder: Path, window: int, pooling: Pooling = "mean") -> None:
        """Raises PredictorError when the folder holds no encoder that can be used so."""
        self.folder = folder.expanduser().resolve()
        self.digest = encoder_digest(self.folder)
        try:
            model: Any = AutoModel.from_pretrained(
                self.folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, trust_remote_code=False
            )
            self._tokenizer: Any = AutoTokenizer.from_pretrained(
                self.folder, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # transformers raises whatever the broken file makes it raise
            raise PredictorError(
                f"encoder {self.folder}: transformers cannot load it: {type(error).__name__}: {error}"
            ) from error
        longest = min(self._tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 1 << 30))
        if not 8 <= window <= longest:
            raise PredictorError(f"encoder {self.folder}: a window of {window} tokens; it takes 8 to {longest}")
        if self._tokenizer.pad_token_id is None:
            raise PredictorError(f"encoder {self.folder}: its tokenizer has no padding token; use a BERT-style encoder")
        self._tokenizer.model_max_length = 1 << 30  # longer prompts are cut below, not by the tokenizer
        self._model = model.eval()
        self.window = window
        self.pooling = pooling
        self.dimension = int(model.config.hidden_size)

    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        """One vector per text: [len(texts), dimension]."""
        padded = self._tokenizer.pad(
            {"input_ids": [self._token_ids(clip_prompt(text)) for text in texts]}, return_tensors="pt"
        )
        with torch.inference_mode():
            hidden = self._model(**padded).last_hidden_state
            if self.pooling == "cls":
                return torch.as_tensor(hidden[:, 0])
            mask = padded["attention_mask"].unsqueeze(-1).to(hidden.dtype)
            return torch.as_tensor((hidden * mask).sum(1) / mask.sum(1))

    def _token_ids(self, text: str) -> list[int]:
        """Token ids with the special ones at both ends, at most ``window``."""
        ids: list[int] = self._tokenizer(text)["input_ids"]
        half = self.window // 2
        return ids if len(ids) <= self.window else ids[: self.window - half] + ids[-half:]


def encoder_digest(folder: Path) -> str:
    """SHA-256 over names and contents of the encoder's files. Raises PredictorError when it is not an encoder's."""
    if not (folder / "config.json").is_file():
        raise PredictorError(f"encoder {folder}: no config.json there; give the folder of a Hugging Face encoder")
    files = sorted(path for path in folder.iterdir() if path.suffix in _IDENTITY_SUFFIXES and path.is_file())
    if not any(path.suffix == ".safetensors" for path in files):
        raise PredictorError(f"encoder {folder}: no *.safetensors there; other weight formats are not read")
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()
