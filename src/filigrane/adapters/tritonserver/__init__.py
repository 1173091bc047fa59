"""Marked text from NVIDIA's Triton Inference Server, by its Python backend.

    repository   writes a model repository: config.pbtxt and a model.py of three lines
    backend      what that model.py is: requests that Triton has batched are written together
    tensors      what it takes and gives
    answering    the tensors of requests to the tensors of answers; knows nothing of Triton

Importing this package imports neither Triton nor torch. How to serve with it:
docs/serving-triton.md. (Triton the language, for kernels, is something else:
`filigrane.adapters.fused`.)
"""
