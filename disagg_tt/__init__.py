"""Llama inference disaggregated over two Tenstorrent meshes: one prefills, the other decodes."""

__version__ = "0.1.0"
