"""A `tokenizer.json`: text to token ids and back, by Hugging Face's tokenizers."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.data.sources import DataError

TOKENIZER_JSON = "tokenizer.json"


class Tokenizer:
    """What a `tokenizer.json` says.

    Attributes:
      path: The file.
      sha256: Its hash.
      largest_token: The largest token id it has.
    """

    def __init__(self, path: Path):
        """Reads the file.

        Raises:
          DataError: It cannot be read, or the package that reads it is not installed.
        """
        try:
            import tokenizers
        except ImportError:
            raise DataError(
                f"{path} needs the package tokenizers: pip install 'jaxckpt[experiments]'"
            ) from None
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from None
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the package's own, ValueError among them
            raise DataError(f"{path} is not a readable tokenizer: {error}") from error
        self.path = path
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.largest_token = max(self._tokenizer.get_vocab().values(), default=-1)

    def encode(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """Returns the token ids of each text, uint32, without special tokens around them.

        Bytes that are not UTF-8 become replacement characters.
        """
        decoded = [text.decode("utf-8", errors="replace") for text in texts]
        found = self._tokenizer.encode_batch_fast(decoded, add_special_tokens=False)
        return [np.array(one.ids, np.uint32) for one in found]

    def decode(self, tokens: np.ndarray) -> str:
        """Returns the text of token ids, special tokens too."""
        return self._tokenizer.decode(tokens.tolist(), skip_special_tokens=False)
