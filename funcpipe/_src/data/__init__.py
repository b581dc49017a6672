"""Data: token sequences of any lengths become microbatches of few shapes; public as ``fp.data``.

Plans, compiled units and captured graphs are kept by shape, so few shapes are few of those. Read
`packing` first, which calls the others: `documents` (what a sequence is), `first_fit` (which
document goes into which row), `buckets` (to what length rows are padded).
"""
