"""Modules: any ``nn.Module`` as a pure function of params and buffers.

Read `from_module` first. A call runs on a `functional_copy` of the module, whose parameters and
buffers (`slots`) are the caller's tensors; `batch_norm` lets a trace see its running statistics.
`boundaries` finds the submodules after which a model may be cut; `buffers` averages what a split
batch makes of buffers. `checks`, `references` and `caches` refuse what a copy cannot follow.
"""
