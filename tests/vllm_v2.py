"""Run by tests in vLLM's environment: a few tokens by model runner V2, on Triton's interpreter.

V2 is written for graphics processors and refuses to start without a compiler for Triton. Its
interpreter is told to vLLM here as if it were one; nothing of vLLM or of filigrane is changed.
Reads {"model", "tokens", "arguments", "engine"} from stdin: one text for each of the requests'
arguments, and options of LLM. The last line it writes is JSON.
"""

import json
import os
import sys
import types

os.environ |= {
    "TRITON_INTERPRET": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}

import numpy as np
import triton.runtime.interpreter as interpreter
from triton.backends import backends

backends["cpu"] = types.SimpleNamespace(
    driver=types.SimpleNamespace(is_active=lambda: True), compiler=None
)


def with_boolean_mask(function, position):
    """The compiler takes masks of integers, as vLLM's drafting kernel has; this one does not."""

    def accept(self, *arguments):
        given = list(arguments)
        mask = given[position]
        given[position] = interpreter.TensorHandle(np.asarray(mask.data).astype(bool), mask.dtype)
        return function(self, *given)

    return accept


for name, position in (("create_masked_load", 1), ("create_masked_store", 2)):
    builder = interpreter.InterpreterBuilder
    setattr(builder, name, with_boolean_mask(getattr(builder, name), position))


def main() -> None:
    from vllm import LLM, SamplingParams

    asked = json.load(sys.stdin)
    llm = LLM(
        asked["model"],
        dtype="float32",
        max_model_len=128,
        enforce_eager=True,
        seed=0,
        max_num_seqs=4,
        disable_log_stats=False,
        **asked["engine"],
    )
    prompts = [
        "The sea in winter. The sea in winter. The sea in",
        "one two three four five six one two three four five six one two three four",
        "Paris is a city. Rome is a city. Madrid is a city. Oslo is a city. Bern is",
    ]
    params = [
        SamplingParams(
            max_tokens=asked["tokens"],
            temperature=1.2,
            ignore_eos=True,
            extra_args=arguments,
        )
        for arguments in asked["arguments"]
    ]
    outputs = llm.generate(prompts[: len(params)], params)
    counted = {metric.name: metric for metric in llm.get_metrics()}
    names = {"drafts": "vllm:spec_decode_num_draft_tokens", "preemptions": "vllm:num_preemptions"}
    found = {key: counted[name].value for key, name in names.items() if name in counted}
    texts = [list(output.outputs[0].token_ids) for output in outputs]
    sys.stdout.write("\n" + json.dumps({"texts": texts} | found) + "\n")


if __name__ == "__main__":
    main()
