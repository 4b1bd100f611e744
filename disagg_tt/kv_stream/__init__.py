"""Moving K and V from the mesh that computed them to the mesh that decodes with them.

base.py         the contract of every transport: sender, receiver, states, metadata
control.py      the messages beside the data: announce, ready, sent, done, failed; programs.py: between two programs
mesh_socket.py  ttnn MeshSocket, between ranks or between two meshes of one process
local.py        one mesh does both: K and V go straight into its cache
staged.py       through the hosts' memories, over a wire
host_wire.py    the contract of the wires tcp.py, mpi.py (between two programs: mpi_programs.py), nixl.py and
                torch_distributed.py; frame.py: the frames they speak; layout.py: where a layer's bytes lie
open_wire.py    joins the wire that --transport names
"""
