"""The arithmetic of fp4conv: block encode, decode, transcode and scans over plain arrays.

`reference` is the oracle in NumPy, `compiled` the same functions in Numba, bit-equal to it; both obey
`contract`. `window` is integer arithmetic that they share. Importing this package imports neither, so
that commands which read only headers never load a compiler.
"""
