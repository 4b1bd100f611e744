"""The emulated ops, by kind: matmul, eltwise, layout, attention, cache, collectives.

An op validates its arguments into a plan (the output's spec), which is looked up by the identity of the input specs the
next time, as ttnn's program cache does; then it enqueues the arithmetic. Arithmetic is float32 on values of the input
dtypes, rounded once to the output's dtype, as on hardware with float32 accumulation.
"""
