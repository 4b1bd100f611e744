"""A strict emulator of the part of ttnn 0.81 that disagg_tt uses: same names, same arguments, same rules.

A call that the real runtime rejects is rejected here too, with what was given, what is allowed and what to do. Where
hardware would hang or corrupt silently, the emulator says so. It is not a timing model.

    types.py        enums.py, shape.py, cores.py, coordinates.py, memory_config.py in one place
    numeric.py      rounding to bfloat16 and block floats, packing to wire bytes
    queue.py        command queues and events; trace.py what they capture
    system.py       the chips that this process has; cluster.py what machine that is
    memory.py       what tensors take of them
    mesh.py         meshes, queues, fabric; device.py opens and closes them
    spec.py         tensor specs
    tensor.py       tensors; tensor_methods.py their methods
    launch.py       how an op runs
    transfer.py     between host and device; host.py what the host does; host_buffer.py bytes of host tensors
    mappers.py      tensors cut over chips and joined; parts.py their parts
    creation.py     tensors from nothing
    file.py         tensors in files
    ops/            the ops
    distributed.py  ranks over MPI
    shm.py          memory that the ranks of one host share
    waits.py        waits that end, and deadlocks, seen on the board of board.py
    wire.py         values in packed form, piece by piece
    channel.py      what carries a socket's transfers; mpi_channel.py between hosts
    socket.py       MeshSocket; socket_config.py: what it is made from
    send_recv.py    transfers over it
    namespaces.py   ttnn.experimental and the like
"""

import sys

from disagg_tt.device.emulator.creation import (
    allocate_tensor_on_device,
    allocate_tensor_on_host,
    arange,
    empty,
    empty_like,
    full,
    full_like,
    ones,
    ones_like,
    zeros,
    zeros_like,
)
from disagg_tt.device.emulator.device import (
    CloseDevices,
    CreateDevice,
    CreateDevices,
    GetDefaultDevice,
    SetDefaultDevice,
    close_device,
    close_mesh_device,
    create_mesh_device,
    manage_device,
    open_device,
    open_mesh_device,
)
from disagg_tt.device.emulator.distributed import (
    Rank,
    distributed_context_allgather_int,
    distributed_context_barrier,
    distributed_context_get_rank,
    distributed_context_get_size,
    distributed_context_is_initialized,
    distributed_context_local_to_world_rank,
    distributed_context_recv_bytes,
    distributed_context_send_bytes,
    distributed_context_subcontext_count,
    distributed_context_subcontext_id,
    distributed_context_subcontext_size,
    distributed_context_subcontext_sizes,
    distributed_context_world_rank,
    distributed_context_world_size,
    init_distributed_context,
)
from disagg_tt.device.emulator.file import (
    as_tensor,
    dump_tensor,
    load_tensor,
)
from disagg_tt.device.emulator.host import to_dtype
from disagg_tt.device.emulator.mappers import (
    ConcatMesh2dToTensor,
    ConcatMeshToTensor,
    MeshComposerConfig,
    MeshMapperConfig,
    MeshToTensor,
    PlacementReplicate,
    PlacementShard,
    ReplicateTensorToMesh,
    ShardTensor2dMesh,
    ShardTensorToMesh,
    TensorToMesh,
    concat_mesh_to_tensor_composer,
    create_mesh_composer,
    create_mesh_mapper,
    distribute,
    replicate_tensor_to_mesh_mapper,
    shard_tensor_to_mesh_mapper,
)
from disagg_tt.device.emulator.memory import (
    get_dram_alignment,
    get_l1_alignment,
    get_max_worker_l1_unreserved_size,
    get_memory_view,
)
from disagg_tt.device.emulator.mesh import (
    MeshDevice,
    command_queue,
    event_synchronize,
    get_fabric_config,
    record_event,
    set_fabric_config,
    synchronize_device,
    wait_for_event,
)
from disagg_tt.device.emulator.namespace import missing as _missing
from disagg_tt.device.emulator.namespaces import cluster, experimental, kv_cache, transformer
from disagg_tt.device.emulator.namespaces import second_names as _second_names
from disagg_tt.device.emulator.ops.arithmetic import (
    add,
    add_,
    div,
    div_,
    divide,
    divide_,
    eq,
    eq_,
    ge,
    ge_,
    gt,
    gt_,
    le,
    le_,
    lt,
    lt_,
    maximum,
    minimum,
    mul,
    mul_,
    multiply,
    multiply_,
    ne,
    ne_,
    rsub,
    rsub_,
    sub,
    sub_,
    subtract,
    subtract_,
)
from disagg_tt.device.emulator.ops.cache import fill_cache, update_cache
from disagg_tt.device.emulator.ops.collectives import (
    all_broadcast,
    all_gather,
    all_reduce,
    broadcast,
    reduce_scatter,
)
from disagg_tt.device.emulator.ops.concat import concat, expand, repeat, repeat_interleave, stack
from disagg_tt.device.emulator.ops.copies import clone, copy, plus_one, typecast
from disagg_tt.device.emulator.ops.embedding import EmbeddingsType, embedding
from disagg_tt.device.emulator.ops.functions import GeluVariant, SigmoidMode, UnaryOpType, UnaryWithParam
from disagg_tt.device.emulator.ops.lines import Topology
from disagg_tt.device.emulator.ops.matmul import (
    linear,
    matmul,
)
from disagg_tt.device.emulator.ops.matmul_config import (
    MatmulMultiCoreReuseMultiCast1DProgramConfig,
    MatmulMultiCoreReuseMultiCastDRAMShardedProgramConfig,
    MatmulMultiCoreReuseMultiCastProgramConfig,
    MatmulMultiCoreReuseProgramConfig,
    MinimalMatmulConfig,
)
from disagg_tt.device.emulator.ops.norm import (
    LayerNormDefaultProgramConfig,
    LayerNormShardedMultiCoreProgramConfig,
    layer_norm,
    rms_norm,
)
from disagg_tt.device.emulator.ops.order import argmax, topk
from disagg_tt.device.emulator.ops.place import (
    interleaved_to_sharded,
    move,
    reallocate,
    reshard,
    sharded_to_interleaved,
    to_memory_config,
)
from disagg_tt.device.emulator.ops.point_to_point import point_to_point
from disagg_tt.device.emulator.ops.reduce import max, mean, min, std, sum, var
from disagg_tt.device.emulator.ops.shape import (
    permute,
    reshape,
    squeeze,
    transpose,
    unsqueeze,
    unsqueeze_to_4D,
    view,
)
from disagg_tt.device.emulator.ops.slice import chunk, pad, slice, split
from disagg_tt.device.emulator.ops.softmax import softmax
from disagg_tt.device.emulator.ops.tilize import (
    tilize,
    tilize_with_val_padding,
    tilize_with_zero_padding,
    to_layout,
    untilize,
    untilize_with_unpadding,
)
from disagg_tt.device.emulator.ops.unary import (
    abs,
    clamp,
    exp,
    gelu,
    identity,
    log,
    neg,
    reciprocal,
    relu,
    rsqrt,
    sigmoid,
    silu,
    sqrt,
    square,
    tanh,
)
from disagg_tt.device.emulator.parts import (
    aggregate_tensor,
    combine_device_tensors,
    distribute_tensor,
    from_host_shards,
    get_device_tensors,
)
from disagg_tt.device.emulator.socket import MeshSocket, create_socket_pair
from disagg_tt.device.emulator.socket_config import (
    MeshCoreCoord,
    SocketConfig,
    SocketConnection,
    SocketEndpoint,
    SocketMemoryConfig,
)
from disagg_tt.device.emulator.spec import TensorSpec
from disagg_tt.device.emulator.system import (
    get_arch_name,
    get_device_ids,
    get_num_devices,
    get_num_pcie_devices,
    get_pcie_device_ids,
)
from disagg_tt.device.emulator.tensor import Tensor
from disagg_tt.device.emulator.trace import (
    begin_trace_capture,
    end_trace_capture,
    execute_trace,
    is_trace_capture_active,
    release_trace,
)
from disagg_tt.device.emulator.transfer import (
    copy_device_to_host_tensor,
    copy_host_to_device_tensor,
    deallocate,
    from_device,
    from_torch,
    to_device,
    to_torch,
)
from disagg_tt.device.emulator.types import (
    DRAM_MEMORY_CONFIG,
    L1_BLOCK_SHARDED_MEMORY_CONFIG,
    L1_HEIGHT_SHARDED_MEMORY_CONFIG,
    L1_MEMORY_CONFIG,
    L1_WIDTH_SHARDED_MEMORY_CONFIG,
    TILE_SIZE,
    Arch,
    BufferType,
    CoreCoord,
    CoreGrid,
    CoreRange,
    CoreRangeSet,
    DataType,
    DispatchCoreAxis,
    DispatchCoreConfig,
    DispatchCoreType,
    DumpTensorMode,
    FabricConfig,
    Layout,
    MathFidelity,
    MemoryConfig,
    MeshCoordinate,
    MeshCoordinateRange,
    MeshCoordinateRangeSet,
    MeshShape,
    SDPAProgramConfig,
    Shape,
    ShardOrientation,
    ShardSpec,
    ShardStrategy,
    StorageType,
    TensorMemoryLayout,
    Tile,
    WormholeComputeKernelConfig,
    corerange_to_cores,
    create_sharded_memory_config,
    grid_to_cores,
    num_cores_to_corerangeset,
    num_cores_to_corerangeset_in_subcoregrids,
    tile_size,
)

bfloat16, float32, bfloat8_b, bfloat4_b = (
    DataType.BFLOAT16,
    DataType.FLOAT32,
    DataType.BFLOAT8_B,
    DataType.BFLOAT4_B,
)
uint32, int32, uint16, uint8 = DataType.UINT32, DataType.INT32, DataType.UINT16, DataType.UINT8
TILE_LAYOUT, ROW_MAJOR_LAYOUT = Layout.TILE, Layout.ROW_MAJOR
DEVICE_STORAGE_TYPE = StorageType.DEVICE

# ttnn's second names of the same things
CppTensorToMesh, CppMeshToTensor = TensorToMesh, MeshToTensor
Device, CloseDevice = MeshDevice, close_device
GetNumAvailableDevices, GetNumPCIeDevices = get_num_devices, get_num_pcie_devices

distributed, device, _ttnn = _second_names(globals())


def __getattr__(name: str) -> object:
    raise AttributeError(_missing(sys.modules[__name__], name))
