"""vLLM engines."""

import os

# A package that vLLM's OpenAI application imports sets the root logger's level at import, to ERROR unless told
# otherwise, and so would silence the warnings of everybody in the process.
os.environ.setdefault("SAGEMAKER_CONTAINER_LOG_LEVEL", os.environ.get("LOG_LEVEL", "WARNING"))
