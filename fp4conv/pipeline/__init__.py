"""Run a plan: threads that each read a block, run one kernel and write the result at its known place.

`run.run` is the entry. It imports the compiled kernels, so nothing here imports it: only a run pays for them.
"""
