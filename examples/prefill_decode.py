"""Llama over two meshes in one file: rank 0 prefills a prompt and streams its K and V, rank 1 decodes the answer.

    tt-run --rank-binding rank_bindings/n300x2_1p1d.yaml python examples/prefill_decode.py
    DISAGG_TT_DEVICE=emulator mpirun -n 2 python examples/prefill_decode.py        # the emulator, without ttnn

Runs unchanged on two N300 boards, on a mock cluster (tt-run's --mock-cluster-rank-binding) and on the emulator. PROMPT
and HF_MODEL in the environment choose the prompt and the checkpoint. `disagg-tt generate` is this with the checks, the
batches and the options.
"""

import os
import sys

from loguru import logger

from disagg_tt.cache import BLOCK, PagedCache
from disagg_tt.config import DEFAULT_PROMPT
from disagg_tt.core import PREFILL, Request
from disagg_tt.decode import Decode
from disagg_tt.device import ttnn
from disagg_tt.kv_stream.control import START_UP_S, expect
from disagg_tt.kv_stream.mesh_socket import MeshSocketReceiver, MeshSocketSender
from disagg_tt.link import Link
from disagg_tt.model import weights
from disagg_tt.model.checkpoint import Checkpoint, find_checkpoint
from disagg_tt.model.llama import Llama
from disagg_tt.perf import Timeline, decode_times, perf_text
from disagg_tt.prefill import Prefill
from disagg_tt.prompt import Tokenizer
from disagg_tt.rank import Seat, be_rank, mesh_shape_of
from disagg_tt.tokens import Sampling, TextStream

TOKENS, NEW_TOKENS = 1024, 32  # of prompt and answer together, and of the answer
DEADLINE_S = 60.0  # of any wait for the other rank


def prefill(link: Link, model: Llama, prompt: list[int]) -> None:
    """Run the prompt through the layers; each layer's K and V leave as soon as they exist."""
    layers = model.config.num_hidden_layers
    sender = MeshSocketSender(
        link.mesh, link.socket, link.control, layers, overlap="inline", direct=True, deadline_s=DEADLINE_S
    )
    stage = Prefill(model, sender, Sampling(), Timeline(PREFILL))
    stage.warm_up(len(prompt))  # compiles, so that nothing below waits for a compiler
    sent = stage.run(
        Request(0, tuple(prompt), NEW_TOKENS), lambda token: logger.info("first token {}", token)
    )
    (_, start, end, _), *_ = (span for span in stage.timeline.spans if span[0] == "prefill")
    perf = {"prompt_tokens": len(prompt), "prefill_ms": (end - start) * 1e3, "kv_bytes": sent}
    logger.info(perf_text(perf, "prefill:"))


def decode(link: Link, model: Llama, tokenizer: Tokenizer) -> None:
    """Reserve a slot for what is announced, take its layers as they come, then make one token a step."""
    cache = PagedCache(link.mesh, model.config, 1, TOKENS // BLOCK, TOKENS // BLOCK, model.kv_dtype)
    stage = Decode(model, cache, Sampling(), Timeline("decode"))
    stage.warm_up()
    receiver = MeshSocketReceiver(link.mesh, link.socket, link.control, model.config, cache, direct=True)

    request = expect(link.control, "announce", START_UP_S, "the prompt to be announced")
    text = TextStream(tokenizer, (), model.config.eos_token_ids, request["max_new_tokens"])
    slot = stage.reserve(request["request"], request["tokens"], text)
    steps = stage.slots[slot].steps
    # tells the other rank that it may begin
    receiver.accept(request["request"], request["tokens"], stage.table_row(slot))
    for _ in range(model.config.num_hidden_layers):
        receiver.receive_layer(expect(link.control, "layer", DEADLINE_S, "the next layer")["layer"])
    expect(link.control, "sent", DEADLINE_S, "the metadata")
    token = stage.start(slot, receiver.finish().next_token)

    print(token.text, end="", flush=True)
    while token.finish_reason is None:
        (token,) = stage.step()
        print(token.text, end="", flush=True)
    print()
    perf = {"kv_bytes": receiver.bytes_received, "new_tokens": 1 + len(steps), **decode_times(steps, 1)}
    logger.info(perf_text(perf, "decode:"))


def main(seat: Seat) -> None:
    """Be one rank: `seat` says which role is this one's and which rank is the other."""
    checkpoint = Checkpoint.open(find_checkpoint(os.environ.get("HF_MODEL")))
    tokenizer, config = Tokenizer(checkpoint.path), checkpoint.config
    message = {"role": "user", "content": os.environ.get("PROMPT") or DEFAULT_PROMPT}

    # Mesh, socket, barrier: before the weights, since the socket's handshake gives up after 10 s.
    link = Link.between_ranks(seat.role, mesh_shape_of(os.environ, None), seat.peer)
    loaded = weights.load(checkpoint, link.mesh, weights.weight_dtype(config, None))
    model = Llama(link.mesh, config, loaded, TOKENS, ttnn.bfloat8_b)
    if seat.role == PREFILL:
        prefill(link, model, tokenizer.encode_chat([message]))
    else:
        decode(link, model, tokenizer)
    link.close()


if __name__ == "__main__":
    sys.exit(be_rank(main, DEADLINE_S, show=lambda event: None))
