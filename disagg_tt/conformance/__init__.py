"""Differential conformance: random calls, each made on the emulator and on the real ttnn with a mock cluster.

    case.py      a call as JSON, and how it is made and described on either
    ops/         generators: one function an op, from a seeded random number generator to a case
    worker.py    a process that makes calls and describes what came back
    compare.py   agreed, or not, or a difference that known.py documents
    known.py     the documented differences, each with its reason
    side.py      a worker of one side, started again when a call crashes it
    run.py       the cases on both sides, counts, the table

Both must accept or both reject a call, and what both accept must give the same: shape, padded shape, dtype, layout, memory
config, and the shape of each chip's shard.
"""
