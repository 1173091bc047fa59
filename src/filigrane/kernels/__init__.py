"""Compiled twins of the readable references, many lanes at a time (numba).

Nothing here decides anything: each kernel computes exactly what a function in `prf`, `contexts`,
`keys` or `schemes` says in plain numpy, and tests hold the two together bit for bit.
Import these modules inside functions: compiling needs numba, `import filigrane` must not.
"""
