"""Sampling is one reproducible stream that follows its distribution; text comes whole, once, and ends."""

import math
import random
import time
from collections.abc import Sequence

import pytest
import torch
from support import SENTENCES, small_tokenizer

from disagg_tt.errors import DeviceError, InputError
from disagg_tt.prompt import Tokenizer
from disagg_tt.tokens import Sampling, TextStream, sample, uniform


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(small_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def byte_fallback() -> Tokenizer:
    """As Llama 2's: decoding strips the space in front of the text, rare characters come byte by byte."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models

    pieces = ["<unk>", "▁Hello", "▁world", "ld", "▁", "é", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = Backend(models.BPE({piece: n for n, piece in enumerate(pieces)}, [], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = Tokenizer.__new__(Tokenizer)
    tokenizer._tokenizer = backend
    return tokenizer


class Pieces:
    """Decodes the id n to the n-th of some pieces of UTF-8."""

    def __init__(self, pieces: list[bytes]):
        self.pieces = pieces

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self.pieces[n] for n in ids).decode(errors="replace")


def draws(logits: torch.Tensor, sampling: Sampling, count: int) -> torch.Tensor:
    """How often each id is drawn at positions 0..count-1, as shares [vocabulary]."""
    ids = torch.tensor([sample(logits, sampling, position) for position in range(count)])
    return torch.bincount(ids, minlength=len(logits)) / count


def test_greedy_takes_the_first_of_the_largest() -> None:
    assert sample(torch.tensor([0.0, 3.0, 3.0, 1.0]), Sampling(), 7) == 1
    assert Sampling().greedy and not Sampling(temperature=0.5).greedy


def test_the_stream_of_random_numbers_is_fixed_forever() -> None:
    """Two machines must agree. Seed 0, whose mix is 0, gives SplitMix64's published first outputs."""
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    for position, output in enumerate(published):
        assert uniform(0, position) == (output >> 12) / 2**52
    assert uniform(2**63 - 1, 131072) != uniform(2**63 - 2, 131072)


def test_random_numbers_are_even_and_uncorrelated_along_positions_and_seeds() -> None:
    for pairs in ([(1, position) for position in range(4000)], [(seed, 5) for seed in range(4000)]):
        values = torch.tensor([uniform(*pair) for pair in pairs], dtype=torch.float64)
        assert values.min() >= 0 and values.max() < 1
        assert values.sort().values.sub(torch.arange(4000) / 4000).abs().max() < 0.03
        centred = values - 0.5
        assert (centred[1:] * centred[:-1]).mean().abs() * 12 < 0.05


def test_the_same_arguments_give_the_same_token_and_other_seeds_others() -> None:
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    first = [sample(logits, Sampling(1.0, seed=3), position) for position in range(50)]
    torch.manual_seed(123)
    assert [sample(logits, Sampling(1.0, seed=3), position) for position in range(50)] == first
    assert [sample(logits, Sampling(1.0, seed=4), position) for position in range(50)] != first
    assert len(set(first)) > 20


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax_at_the_temperature(temperature: float) -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 1.0])
    expected = torch.softmax(logits / temperature, 0)
    assert (draws(logits, Sampling(temperature, seed=2), 4000) - expected).abs().max() < 0.03


def test_top_k_and_top_p_keep_what_they_must() -> None:
    shares = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2])
    logits = shares.log()
    for temperature, top_k, top_p, kept in (
        (1, 2, 1, [1, 3]),
        (1, 1, 1, [1]),
        (1, 5, 1, [0, 1, 2, 3, 4]),
        (1, 99, 1, [0, 1, 2, 3, 4]),
        (1, 0, 0.6, [1, 3]),
        (1, 0, 0.7, [1, 3, 4]),
        (1, 0, 1e-9, [1]),
        (1, 0, 0.39, [1]),
        (1, 0, 0.97, [0, 1, 2, 3, 4]),
        (1, 3, 0.6, [1, 3]),
        (1, 2, 0.9, [1, 3]),
        (0.25, 0, 0.85, [1, 3]),
    ):
        sampling = Sampling(temperature, top_p, top_k)
        drawn = draws(logits, sampling, 1500)
        assert torch.nonzero(drawn).flatten().tolist() == kept, sampling
        expected = torch.zeros(5)
        expected[kept] = shares[kept] ** (1 / sampling.temperature)
        assert (drawn - expected / expected.sum()).abs().max() < 0.05, sampling


def test_the_kept_set_is_the_one_that_a_full_sort_gives() -> None:
    seed = 8
    print("seed", seed)
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    for _ in range(100):
        vocabulary = rng.choice([3, 50, 2000])
        logits = rng.choice([0.1, 1, 5, 20]) * torch.randn(vocabulary, generator=generator)
        logits = logits.bfloat16().float()  # so that many are equal
        sampling = Sampling(
            rng.choice([0.3, 1.0, 2.0]),
            rng.choice([1.0, 0.99, 0.9, 0.3]),
            rng.choice([0, 1, 7, vocabulary]),
            rng.randrange(1000),
        )
        ranked, ids = torch.sort(logits.double(), descending=True, stable=True)
        shares = torch.softmax(ranked[: sampling.top_k or vocabulary] / sampling.temperature, 0)
        kept = int((shares.cumsum(0) < sampling.top_p - 1e-12).sum()) + 1
        allowed = set(ids[:kept].tolist())
        for position in range(20):
            assert sample(logits, sampling, position) in allowed, (vocabulary, sampling, position)


def test_equal_logits_at_the_edge_of_top_k_rank_by_id() -> None:
    drawn = draws(torch.zeros(100), Sampling(1.0, top_k=3), 200)
    assert torch.nonzero(drawn).flatten().tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(1.0),
        Sampling(5.0, top_k=3),
        Sampling(1.0, 0.9),
        Sampling(1e-300),
        Sampling(1e300),
    ],
)
def test_a_logit_that_is_not_finite_is_never_chosen(sampling: Sampling) -> None:
    nan, inf = math.nan, math.inf
    for row in ([nan, 1, inf, -inf], [-inf, 1, -inf, -inf], [inf, 1.0, nan, nan], [-inf, -1e38, -inf, nan]):
        for position in range(40):
            assert sample(torch.tensor(row), sampling, position) == 1
    for row in ([nan, nan], [inf, -inf], [-inf, -inf]):
        with pytest.raises(DeviceError, match="position 5"):
            sample(torch.tensor(row), sampling, 5)


def test_a_sampling_out_of_range_is_refused() -> None:
    for values in ((-1.0, 1.0, 0, 0), (1.0, 0.0, 0, 0), (1.0, 1.0, -1, 0), (1.0, 1.0, 0, -1), ("a", 1.0)):
        with pytest.raises(InputError, match="allowed"):
            Sampling(*values)  # type: ignore[arg-type]


def run(stream: TextStream, ids: list[int]) -> tuple[str, list[str]]:
    """Push `ids` until the stream ends, then flush: the whole text and its pieces."""
    pieces = []
    for token_id in ids:
        pieces.append(stream.push(token_id))
        if stream.finished:
            break
    pieces.append(stream.flush())
    assert "".join(pieces) == stream.text
    assert stream.flush() == ""
    return stream.text, pieces


def test_pieces_of_any_text_join_to_what_decoding_it_whole_gives(tokenizer: Tokenizer) -> None:
    seed = 9
    print("seed", seed)
    rng = random.Random(seed)
    for _ in range(100):
        text = "".join(rng.choices([*"ab é日本😀🇫🇷 \n\u200d\ufffd", *SENTENCES], k=rng.randint(1, 60)))
        ids = tokenizer.encode(text)
        whole, pieces = run(TextStream(tokenizer, (), (4,), 10**6), ids)
        assert whole == text == tokenizer.decode(ids)
        assert sum(piece.count("\ufffd") for piece in pieces) == text.count("\ufffd")


def test_a_character_appears_when_its_last_byte_has_come(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a𝄞b")[1:]
    assert len(ids) == 6, "four tokens of one byte between two letters"
    _, pieces = run(TextStream(tokenizer, (), (), 100), ids)
    assert pieces == ["a", "", "", "", "𝄞", "b", ""]


def test_characters_split_across_misaligned_tokens_are_never_broken() -> None:
    """Merges may join one character's end with the next one's start, so that no token ends on a boundary."""
    pieces = [b"\xf0\x9f", b"\x98", b"\x80\xf0\x9f", b"\x80!"]
    whole, shown = run(TextStream(Pieces(pieces), (), (), 10**6), [0, *[1, 2] * 99, 1, 3])
    assert whole == "😀" * 100 + "!"
    assert shown[1:200] == ["", "😀"] * 99 + [""], "each as soon as it is whole"


def test_a_tokenizer_with_byte_fallback_streams_the_same(byte_fallback: Tokenizer) -> None:
    def spell(text: str) -> list[int]:
        return [6 + byte for byte in text.encode()]

    ids = [1, 2, 3, 4, *spell("日本語の文章です" * 12), 2, 5, *spell("😀"), 1, 4, 2] * 3
    whole, pieces = run(TextStream(byte_fallback, (), (), 10**6), ids)
    assert whole == byte_fallback.decode(ids)
    assert "\ufffd" not in whole and max(map(len, pieces)) <= 6


def test_bytes_that_can_never_become_a_character_do_not_hold_the_text_back(tokenizer: Tokenizer) -> None:
    lone = tokenizer.encode("𝄞")[2]  # a continuation byte
    stream = TextStream(tokenizer, (), (), 10**6)
    shown = ""
    for count in range(1, 200):
        shown += stream.push(lone)
        assert len(shown) >= count - 3
    assert shown + stream.push(tokenizer.encode("a")[1]) == "\ufffd" * 199 + "a"


def test_a_character_that_is_cut_off_shows_only_at_the_end(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, (), (), 100)
    assert "".join(stream.push(token) for token in tokenizer.encode("a𝄞")[1:-1]) == "a"
    assert stream.flush() == "\ufffd"
    assert stream.text == "a\ufffd"


def test_any_ids_stream_to_the_text_of_the_whole(tokenizer: Tokenizer) -> None:
    seed = 10
    print("seed", seed)
    rng = random.Random(seed)
    for _ in range(100):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randint(1, 120))]
        assert run(TextStream(tokenizer, (), (), 10**6), ids)[0] == tokenizer.decode(ids), ids


def test_the_answer_ends_at_eos_or_at_the_limit(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(SENTENCES[0])[1:]
    stream = TextStream(tokenizer, (), (3, 4), 100)
    assert run(stream, [*ids, 4, *ids])[0] == SENTENCES[0] and stream.finished == "stop"
    assert stream.push(ids[0]) == "" and stream.text == SENTENCES[0], "tokens after the end change nothing"
    stream = TextStream(tokenizer, (), (4,), 3)
    assert run(stream, ids)[0] == tokenizer.decode(ids[:3]) and stream.finished == "length"
    stream = TextStream(tokenizer, (), (4,), 3)
    assert run(stream, [*ids[:2], 4])[0] == tokenizer.decode(ids[:2]) and stream.finished == "stop"
    stream = TextStream(tokenizer, (), (4,), 5, ignore_eos=True)
    assert run(stream, [ids[0], 4, ids[1], 4, ids[2]])[0] == tokenizer.decode(ids[:3])
    assert stream.finished == "length"


def test_text_from_a_stop_string_on_never_appears(tokenizer: Tokenizer) -> None:
    seed = 12
    print("seed", seed)
    rng = random.Random(seed)
    for _ in range(300):
        text = "".join(rng.choices("abé😀", k=rng.randint(1, 30)))
        stop = ["".join(rng.choices("abé😀", k=rng.randint(1, 4))) for _ in range(rng.randint(1, 3))]
        stream = TextStream(tokenizer, stop, (4,), 10**6)
        whole, pieces = run(stream, tokenizer.encode(text)[1:])
        ends = [at + len(s) for s in stop if (at := text.find(s)) >= 0]
        if not ends:
            assert whole == text and stream.finished is None
            continue
        assert stream.finished == "stop"
        assert text.startswith(whole)
        # The first stop string to become whole ends the text, at its first character.
        assert len(whole) in {text.find(s) for s in stop if s in text[: min(ends) + 1]}, (text, stop, whole)
        assert not any(s in whole for s in stop)


def test_what_may_become_a_stop_string_waits_and_is_given_when_it_does_not(tokenizer: Tokenizer) -> None:
    def letters(text: str) -> list[int]:
        return [tokenizer.encode(letter)[1] for letter in text]

    stream = TextStream(tokenizer, ("###",), (4,), 100)
    assert [stream.push(token) for token in letters("a##b#")] == ["a", "", "", "##b", ""]
    assert stream.push(4) == "#" and stream.finished == "stop", "EOS settles what waited"
    stream = TextStream(tokenizer, ("###",), (4,), 4)
    assert [stream.push(token) for token in letters("a###")] == ["a", "", "", ""]
    assert (stream.text, stream.finished) == ("a", "stop"), "a stop string at the limit is a stop"
    stream = TextStream(tokenizer, ("###",), (4,), 3)
    assert [stream.push(token) for token in letters("a##")] == ["a", "", "##"] and stream.finished == "length"


def test_nothing_follows_a_stop_string_even_from_its_own_token() -> None:
    stream = TextStream(Pieces([b"a#", b"##b\xf0\x9f"]), ("###",), (), 2)
    assert run(stream, [0, 1]) == ("a", ["a", "", ""])
    assert stream.finished == "stop"


def test_cost_for_a_token_does_not_grow_with_the_text(tokenizer: Tokenizer) -> None:
    decoded = []

    class Counting:
        def decode(self, ids: Sequence[int]) -> str:
            decoded.append(len(ids))
            return tokenizer.decode(ids)

    stream = TextStream(Counting(), ("\x00",), (4,), 10**6)
    ids = tokenizer.encode(" ".join(SENTENCES))[1:]
    start = time.perf_counter()
    for _ in range(20):
        for token in ids:
            stream.push(token)
    print(f"{(time.perf_counter() - start) / 20 / len(ids) * 1e6:.1f} us a token")
    assert max(decoded) <= 48
    assert len(decoded) < 2 * 20 * len(ids)
    assert stream.text == " ".join(SENTENCES) * 20
