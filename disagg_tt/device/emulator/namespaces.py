"""ttnn's namespaces, made of what the emulator has: ttnn.experimental, ttnn.transformer, ttnn.distributed, ..."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from disagg_tt.device.emulator import send_recv as _send_recv
from disagg_tt.device.emulator.cluster import ClusterType, get_cluster_type
from disagg_tt.device.emulator.device import is_blackhole, is_wormhole_b0
from disagg_tt.device.emulator.namespace import Namespace, chosen
from disagg_tt.device.emulator.ops import attention as _attention
from disagg_tt.device.emulator.ops import attention_decode as _attention_decode
from disagg_tt.device.emulator.ops import cache as _cache
from disagg_tt.device.emulator.ops import collectives as _collectives
from disagg_tt.device.emulator.ops import heads as _heads
from disagg_tt.device.emulator.ops import matmul as _matmul
from disagg_tt.device.emulator.ops import paged_cache as _paged_cache
from disagg_tt.device.emulator.ops import rope as _rope

transformer = Namespace(
    "ttnn.transformer",
    scaled_dot_product_attention=_attention.scaled_dot_product_attention,
    chunked_scaled_dot_product_attention=_attention.chunked_scaled_dot_product_attention,
    scaled_dot_product_attention_decode=_attention_decode.scaled_dot_product_attention_decode,
    paged_scaled_dot_product_attention_decode=_attention_decode.paged_scaled_dot_product_attention_decode,
)
kv_cache = Namespace(
    "ttnn.kv_cache",
    fill_cache_for_user_=_cache.fill_cache_for_user_,
    update_cache_for_token_=_cache.update_cache_for_token_,
)
experimental = Namespace(
    "ttnn.experimental",
    minimal_matmul=_matmul.minimal_matmul,
    all_gather_async=_collectives.all_gather_async,
    all_reduce_async=_collectives.all_reduce_async,
    reduce_scatter_minimal_async=_collectives.reduce_scatter_minimal_async,
    nlp_create_qkv_heads=_heads.nlp_create_qkv_heads,
    nlp_create_qkv_heads_decode=_heads.nlp_create_qkv_heads_decode,
    nlp_concat_heads=_heads.nlp_concat_heads,
    nlp_concat_heads_decode=_heads.nlp_concat_heads_decode,
    rotary_embedding_hf=_rope.rotary_embedding_hf,
    rotary_embedding_llama=_rope.rotary_embedding_llama,
    paged_fill_cache=_paged_cache.paged_fill_cache,
    paged_update_cache=_paged_cache.paged_update_cache,
    send_async=_send_recv.send_async,
    recv_async=_send_recv.recv_async,
    send_direct_async=_send_recv.send_direct_async,
    recv_direct_async=_send_recv.recv_direct_async,
)


# The same things under ttnn's other names, exactly as many as ttnn has there.
_MESH = ("MeshDevice", "open_mesh_device", "close_mesh_device")
_DISTRIBUTED = (
    *_MESH,
    "create_mesh_device",
    "get_device_ids",
    "get_pcie_device_ids",
    "get_num_devices",
    "get_num_pcie_devices",
    "DispatchCoreType",
    "TensorToMesh",
    "MeshToTensor",
    "ReplicateTensorToMesh",
    "ShardTensorToMesh",
    "ShardTensor2dMesh",
    "ConcatMeshToTensor",
    "ConcatMesh2dToTensor",
    "distribute",
)
_MULTI_DEVICE = (
    *_MESH,
    "MeshShape",
    "MeshCoordinate",
    "MeshCoordinateRange",
    "MeshCoordinateRangeSet",
    "CppTensorToMesh",
    "CppMeshToTensor",
    "MeshMapperConfig",
    "MeshComposerConfig",
    "PlacementReplicate",
    "PlacementShard",
    "create_mesh_mapper",
    "create_mesh_composer",
    "replicate_tensor_to_mesh_mapper",
    "shard_tensor_to_mesh_mapper",
    "concat_mesh_to_tensor_composer",
    "distribute_tensor",
    "aggregate_tensor",
    "get_device_tensors",
    "combine_device_tensors",
    "from_host_shards",
    "Rank",
    "init_distributed_context",
)
_CONTEXT = (
    "is_initialized",
    "get_rank",
    "get_size",
    "world_rank",
    "world_size",
    "local_to_world_rank",
    "barrier",
    "allgather_int",
    "send_bytes",
    "recv_bytes",
    "subcontext_count",
    "subcontext_id",
    "subcontext_size",
    "subcontext_sizes",
)
_DEVICE = (
    "Arch",
    "CloseDevice",
    "CloseDevices",
    "CreateDevice",
    "CreateDevices",
    "DispatchCoreAxis",
    "DispatchCoreConfig",
    "DispatchCoreType",
    "GetDefaultDevice",
    "GetNumAvailableDevices",
    "GetNumPCIeDevices",
    "SetDefaultDevice",
    "close_device",
    "get_dram_alignment",
    "get_l1_alignment",
    "get_max_worker_l1_unreserved_size",
    "is_trace_capture_active",
    "open_device",
    "synchronize_device",
)

cluster = Namespace("ttnn._ttnn.cluster", ClusterType=ClusterType, get_cluster_type=get_cluster_type)


def second_names(names: Mapping[str, Any]) -> tuple[Namespace, Namespace, Namespace]:
    """Return ttnn.distributed, ttnn.device and ttnn._ttnn: other ways to what is among `names`, those of ttnn itself."""
    of_device = chosen(names, _DEVICE)
    context = chosen(names, {name: f"distributed_context_{name}" for name in _CONTEXT})
    return (
        Namespace("ttnn.distributed", **chosen(names, _DISTRIBUTED)),
        Namespace(
            "ttnn.device",
            **of_device,
            Device=names["MeshDevice"],
            get_memory_view=names["get_memory_view"],
            manage_device=names["manage_device"],
            is_wormhole_b0=is_wormhole_b0,
            is_blackhole=is_blackhole,
        ),
        Namespace(
            "ttnn._ttnn",
            multi_device=Namespace("ttnn._ttnn.multi_device", **chosen(names, _MULTI_DEVICE), **context),
            device=Namespace("ttnn._ttnn.device", **of_device, get_arch_name=names["get_arch_name"]),
            cluster=cluster,
        ),
    )
