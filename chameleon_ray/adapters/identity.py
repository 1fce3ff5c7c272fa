"""What an adapter is known by: the digest of its content, and the name and number that vLLM gets for it."""

import re
from dataclasses import dataclass

DIGEST = re.compile(r"[0-9a-f]{64}")
_LORA_NAME = re.compile(rf"(.*)@({DIGEST.pattern})", re.DOTALL)
_NUM_NUMBERS = 2**31 - 1
"""vLLM keeps adapter numbers in signed 32-bit integers, and 0 means none."""


@dataclass(frozen=True, slots=True)
class AdapterId:
    """One version of an adapter's content. digest: SHA-256 in lower-case hex."""

    digest: str

    @property
    def short(self) -> str:
        """For messages and logs."""
        return self.digest[:16]

    def lora_name(self, name: str) -> str:
        """vLLM's name for the adapter, and so the prefix cache's key: ``name`` is what clients use."""
        return f"{name}@{self.digest}"

    @classmethod
    def parse(cls, lora_name: str) -> "tuple[str, AdapterId | None]":
        """The two parts of a ``lora_name``; (``lora_name``, None) when it is none of ours."""
        match = _LORA_NAME.fullmatch(lora_name)
        return (lora_name, None) if match is None else (match[1], cls(match[2]))


class AdapterNumbers:
    """Adapters' numbers in one process (``LoRARequest.lora_int_id``, and what workers know an adapter by).

    A number comes from the digest, so that the same content keeps it after ``release``; of two digests that agree in
    it, the later one gets the next free number.
    """

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._digests: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._numbers)

    def number(self, digest: str) -> int:
        """The adapter's number, from 1 to 2**31 - 1, given at the first call."""
        if (number := self._numbers.get(digest)) is None:
            place = int(digest, 16) % _NUM_NUMBERS
            while place + 1 in self._digests:
                place = (place + 1) % _NUM_NUMBERS
            number = self._numbers[digest] = place + 1
            self._digests[number] = digest
        return number

    def digest(self, number: int) -> str | None:
        """Whose number it is."""
        return self._digests.get(number)

    def release(self, digest: str) -> None:
        """Forget an adapter, also one that never had a number."""
        if (number := self._numbers.pop(digest, None)) is not None:
            del self._digests[number]
