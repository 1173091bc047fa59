"""The inputs and outputs of the model: what config.pbtxt says, and what answers hold."""

from typing import Final

INPUTS: Final = {
    "text_input": "STRING",
    "input_ids": "INT64",
    "chat": "BOOL",
    "max_tokens": "INT32",
    "temperature": "FP32",
    "top_k": "INT32",
    "top_p": "FP32",
    "seed": "INT64",
    "ignore_eos": "BOOL",
    "filigrane_key": "STRING",
    "filigrane_scheme": "STRING",
    "filigrane_mark": "BOOL",
    "filigrane_tenant": "STRING",
}
"""Name -> Triton's type; all optional, one value a row (`input_ids`: any number), and one of
text_input and input_ids is needed."""
OUTPUTS: Final = {
    "text_output": "STRING",
    "output_ids": "INT64",
    "marked_tokens": "INT32",
    "key_id": "STRING",
    "scheme": "STRING",
    "finish_reason": "STRING",
}
"""Name -> Triton's type. output_ids: without the prompt, padded with -1 where rows differ; key_id
and scheme are empty where the text is not marked."""
