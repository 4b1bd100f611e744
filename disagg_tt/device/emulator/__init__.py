"""A strict emulator of the part of ttnn 0.81 that disagg_tt uses: same names, same arguments, same rules.

A call that the real runtime rejects is rejected here too, with what was given, what is allowed and what to do. Where
hardware would hang or corrupt silently, the emulator says so. It is not a timing model.

    types.py        dtypes, layouts, shapes, memory configs
    numeric.py      rounding to bfloat16 and block floats, packing to wire bytes
    queue.py        command queues and events
    mesh.py         meshes, memory, fabric
    spec.py         tensor specs
    tensor.py       tensors
    launch.py       how an op runs
    transfer.py     between host and device
    ops/            the ops
    distributed.py  ranks over MPI
    channel.py      what carries a socket's bytes
    socket.py       MeshSocket
"""

from types import SimpleNamespace

from disagg_tt.device.emulator import socket as _socket
from disagg_tt.device.emulator.distributed import (
    distributed_context_allgather_int,
    distributed_context_barrier,
    distributed_context_get_rank,
    distributed_context_get_size,
    distributed_context_is_initialized,
    distributed_context_recv_bytes,
    distributed_context_send_bytes,
    init_distributed_context,
)
from disagg_tt.device.emulator.mesh import (
    MeshDevice,
    close_mesh_device,
    command_queue,
    event_synchronize,
    open_mesh_device,
    record_event,
    set_fabric_config,
    synchronize_device,
    wait_for_event,
)
from disagg_tt.device.emulator.ops import attention as _attention
from disagg_tt.device.emulator.ops import cache as _cache
from disagg_tt.device.emulator.ops import heads as _heads
from disagg_tt.device.emulator.ops import matmul as _matmul
from disagg_tt.device.emulator.ops.collectives import (
    all_gather,
    all_reduce,
)
from disagg_tt.device.emulator.ops.eltwise import (
    add,
    argmax,
    copy,
    mul,
    plus_one,
    rms_norm,
    typecast,
)
from disagg_tt.device.emulator.ops.layout import (
    embedding,
    interleaved_to_sharded,
    reshape,
    slice,
    to_memory_config,
    transpose,
    unsqueeze_to_4D,
    untilize,
)
from disagg_tt.device.emulator.ops.matmul import (
    linear,
)
from disagg_tt.device.emulator.socket import (
    MeshCoreCoord,
    MeshSocket,
    SocketConfig,
    SocketConnection,
    SocketMemoryConfig,
    create_socket_pair,
)
from disagg_tt.device.emulator.spec import TensorSpec
from disagg_tt.device.emulator.tensor import Tensor
from disagg_tt.device.emulator.trace import (
    begin_trace_capture,
    end_trace_capture,
    execute_trace,
    release_trace,
)
from disagg_tt.device.emulator.transfer import (
    ConcatMeshToTensor,
    ReplicateTensorToMesh,
    ShardTensorToMesh,
    allocate_tensor_on_device,
    copy_host_to_device_tensor,
    deallocate,
    from_torch,
    get_device_tensors,
    to_torch,
    zeros,
    zeros_like,
)
from disagg_tt.device.emulator.types import (
    DRAM_MEMORY_CONFIG,
    L1_HEIGHT_SHARDED_MEMORY_CONFIG,
    L1_MEMORY_CONFIG,
    L1_WIDTH_SHARDED_MEMORY_CONFIG,
    BufferType,
    CoreCoord,
    CoreRange,
    CoreRangeSet,
    DataType,
    DispatchCoreConfig,
    DispatchCoreType,
    FabricConfig,
    Layout,
    MathFidelity,
    MemoryConfig,
    MeshCoordinate,
    MeshShape,
    SDPAProgramConfig,
    Shape,
    ShardOrientation,
    ShardSpec,
    ShardStrategy,
    TensorMemoryLayout,
    UnaryOpType,
    WormholeComputeKernelConfig,
    create_sharded_memory_config,
    num_cores_to_corerangeset,
)

bfloat16, float32, bfloat8_b, bfloat4_b = (
    DataType.BFLOAT16,
    DataType.FLOAT32,
    DataType.BFLOAT8_B,
    DataType.BFLOAT4_B,
)
uint32, int32, uint16, uint8 = DataType.UINT32, DataType.INT32, DataType.UINT16, DataType.UINT8
TILE_LAYOUT, ROW_MAJOR_LAYOUT = Layout.TILE, Layout.ROW_MAJOR

transformer = SimpleNamespace(
    scaled_dot_product_attention=_attention.scaled_dot_product_attention,
    paged_scaled_dot_product_attention_decode=_attention.paged_scaled_dot_product_attention_decode,
)
experimental = SimpleNamespace(
    minimal_matmul=_matmul.minimal_matmul,
    nlp_create_qkv_heads=_heads.nlp_create_qkv_heads,
    nlp_create_qkv_heads_decode=_heads.nlp_create_qkv_heads_decode,
    nlp_concat_heads=_heads.nlp_concat_heads,
    nlp_concat_heads_decode=_heads.nlp_concat_heads_decode,
    rotary_embedding_hf=_attention.rotary_embedding_hf,
    paged_fill_cache=_cache.paged_fill_cache,
    paged_update_cache=_cache.paged_update_cache,
    send_async=_socket.send_async,
    recv_async=_socket.recv_async,
    send_direct_async=_socket.send_direct_async,
    recv_direct_async=_socket.recv_direct_async,
)


def __getattr__(name: str) -> object:
    known = sorted(n for n in globals() if not n.startswith("_"))
    raise AttributeError(f"the emulator has no ttnn.{name}; it has {', '.join(known)}")
